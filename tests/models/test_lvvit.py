"""LV-ViT and DeiT-256; what the published models compute is in tests/test_golden.py."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch

from dynamicvit import KeepSchedule, SparseViT, count_gmacs, sparsify
from dynamicvit.models.lvvit import LVViT, from_official
from dynamicvit.models.names import build_on_meta
from tests.conftest import randomise

SMALL: dict[str, Any] = {
    "img_size": 64,
    "embed_dim": 32,
    "depth": 4,
    "num_heads": 2,
    "num_classes": 5,
}


def _small(name: str = "lvvit_small", **options: Any) -> LVViT:
    model = timm.create_model(name, **(SMALL | options))
    assert isinstance(model, LVViT)
    randomise(model)
    return model.eval()


@pytest.mark.parametrize(
    ("name", "keep_ratio", "gmacs", "parameters"),
    [
        ("lvvit_small", 0.9, 5.893, 26.876),
        ("lvvit_small", 0.8, 5.221, 26.876),
        ("lvvit_small", 0.7, 4.664, 26.876),
        ("lvvit_medium", 0.9, 11.231, 57.115),
        ("lvvit_medium", 0.8, 9.804, 57.115),
        ("lvvit_medium", 0.7, 8.612, 57.115),
    ],
)
def test_the_published_models_sizes(
    name: str, keep_ratio: float, gmacs: float, parameters: float
) -> None:
    dense = build_on_meta(name)
    schedule = KeepSchedule.from_keep_ratio(keep_ratio, depth=len(dense.blocks))
    sparse = SparseViT(dense, schedule)
    assert count_gmacs(sparse, (3, 224, 224)) == pytest.approx(gmacs, rel=0.01)
    count = sum(parameter.numel() for parameter in sparse.parameters()) / 1e6
    assert count == pytest.approx(parameters, rel=1e-3)


@pytest.mark.parametrize(
    ("name", "blocks"),
    [
        ("lvvit_tiny", (3, 6, 9)),
        ("lvvit_small", (4, 8, 12)),
        ("lvvit_medium", (5, 10, 15)),
        ("lvvit_large", (6, 12, 18)),
        ("deit_256", (3, 6, 9)),
    ],
)
def test_stages_lie_where_the_paper_has_them(name: str, blocks: tuple[int, ...]) -> None:
    depth = len(build_on_meta(name).blocks)
    assert KeepSchedule.from_keep_ratio(0.7, depth=depth).blocks == blocks


@torch.no_grad()
@pytest.mark.parametrize("size", [(64, 64), (96, 64), (32, 160)])
def test_any_input_size(size: tuple[int, int]) -> None:
    dense = _small()
    dense.set_input_size(size)
    images = torch.randn(2, 3, *size)
    assert dense(images).shape == (2, 5)
    torch.testing.assert_close(sparsify(dense, keep_ratio=1.0)(images), dense(images))
    dynamic = _small(dynamic_img_size=True)
    sparse = sparsify(dynamic, keep_ratio=0.5)
    pruned = sparse.pruned(images)
    grid = (size[0] // 16) * (size[1] // 16)
    assert pruned.keep[0].shape == (2, grid)
    with pytest.raises(ValueError, match="multiples of the patch size 16×16"):
        sparse(torch.randn(2, 3, size[0], size[1] + 8))


def test_the_prediction_is_that_of_both_heads() -> None:
    model = _small()
    x = torch.randn(2, 17, 32)
    expected = model.head(x[:, 0]) + 0.5 * model.aux_head(x[:, 1:]).max(dim=1).values
    torch.testing.assert_close(model.forward_head(x), expected)
    torch.testing.assert_close(model.train().forward_head(x), expected)
    torch.testing.assert_close(model.forward_head(x, pre_logits=True), x[:, 0])


def test_both_heads_are_replaced_together() -> None:
    model = _small()
    model.reset_classifier(3)
    assert model(torch.randn(1, 3, 64, 64)).shape == (1, 3)
    assert model.aux_head.weight.shape == (3, 32)
    model.reset_classifier(0)
    assert model(torch.randn(1, 3, 64, 64)).shape == (1, 32)


def test_the_residual_scale_divides_fresh_branches() -> None:
    torch.manual_seed(0)
    plain = timm.create_model("lvvit_small", **SMALL, residual_scale=1.0)
    torch.manual_seed(0)
    scaled = timm.create_model("lvvit_small", **SMALL)
    for key, value in scaled.state_dict().items():
        factor = 2 if key.endswith(("attn.proj.weight", "mlp.fc2.weight")) else 1
        torch.testing.assert_close(factor * value, plain.state_dict()[key])


def test_official_weights_of_an_unknown_depth_are_refused() -> None:
    weights = {"patch_embed.conv1.weight": torch.zeros(1), "blocks.0.norm1.weight": torch.zeros(1)}
    with pytest.raises(ValueError, match="LV-ViT has 12 or 16 or 20 or 24 blocks, got 1"):
        from_official(weights)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"global_pool": "avg"}, "global_pool of an LV-ViT is 'token', got 'avg'"),
        ({"patch_size": 15}, "patch_size must be an even integer, got 15"),
        ({"patch_size": (16, 16)}, r"patch_size must be an even integer, got \(16, 16\)"),
    ],
)
def test_what_does_not_fit_is_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        timm.create_model("lvvit_small", **(SMALL | options))
    with pytest.raises(ValueError, match="global_pool of an LV-ViT is 'token', got 'avg'"):
        _small().reset_classifier(5, "avg")


def test_features_are_those_of_timm() -> None:
    features = timm.create_model("lvvit_small", features_only=True, **SMALL)(
        torch.randn(1, 3, 64, 64)
    )
    assert features[-1].shape == (1, 32, 4, 4)


def test_other_image_channels() -> None:
    assert _small(in_chans=1)(torch.randn(1, 1, 64, 64)).shape == (1, 5)
