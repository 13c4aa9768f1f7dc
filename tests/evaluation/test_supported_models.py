"""Every plain transformer of timm's, built small: pruned rightly, or refused with a reason."""

from __future__ import annotations

import importlib
import pkgutil
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from hypothesis import given
from hypothesis import strategies as st
from timm.optim import param_groups_layer_decay
from torch import Tensor, nn

from dynamicvit import SparseViT, UnsupportedBackbone, cli, sparsify
from dynamicvit.core import paths
from dynamicvit.core import tokens as tokens_module
from dynamicvit.evaluation import supported_models as zoo
from dynamicvit.models.lvvit import LVViT
from tests.conftest import randomise

REFUSED = {
    "Beit": "its attention adds a position bias for the whole grid",
    "VisionTransformerRelPos": "its attention adds a position bias for the whole grid",
    "VisionTransformerSAM": "its attention adds a position bias for the whole grid",
}
DOCS = Path(__file__).parents[2] / "docs" / "models.md"
NAMES = zoo.names()
# One of each kind; the others are marked `slow` (`make test-all`).
QUICK = {
    "deit_256",
    "deit_base_distilled_patch16_224",
    "deit3_small_patch16_224",
    "eva_giant_patch14_224",
    "eva02_base_patch14_448",
    "flexivit_small",
    "lvvit_tiny",
    "vit_base_patch16_clip_224",
    "vit_base_patch16_rope_reg1_gap_256",
    "vit_base_patch16_siglip_224",
    "vit_base_patch16_xp_224",
    "vit_base_r26_s32_224",
    "vit_giantopt_patch16_siglip_256",
    "vit_large_patch16_dinov3",
    "vit_medium_patch16_gap_240",
    "vit_pe_core_small_patch16_384",
    "vit_pe_spatial_base_patch16_512",
    "vit_small_patch14_reg4_dinov2",
    "vit_small_patch16_18x2_224",
    "vit_small_patch16_36x1_224",
    "vit_small_patch16_rope_mixed_224",
    "vit_so150m2_patch16_reg1_gap_256",
    "vit_srelpos_medium_patch16_224",
    "vit_tiny_r_s16_p8_224",
    "beit_base_patch16_224",
    "samvit_base_patch16",
}


def _small(name: str) -> Any:
    """A few narrow blocks and a 4×4 grid, every parameter moved away from its initial value."""
    full = zoo.build_on_meta(name)
    patch = full.patch_embed.feat_ratio(as_scalar=False)
    options: dict[str, Any] = {"img_size": (4 * patch[0], 4 * patch[1]), "num_classes": 7}
    # Some stems end in the tokens themselves.
    width = full.embed_dim if isinstance(full.patch_embed.proj, nn.Identity) else 48
    if name.endswith("sapiens2"):
        options["num_kv_heads"] = 1
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = timm.create_model(name, embed_dim=width, depth=4, num_heads=2, **options)
    randomise(model)
    return model.eval()


def _images(model: Any) -> Tensor:
    return torch.randn(2, 3, *model.patch_embed.img_size)


def _near(actual: Tensor, expected: Tensor) -> None:
    torch.testing.assert_close(actual, expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in NAMES]
)
@torch.no_grad()
def test_a_plain_transformer_is_pruned_rightly_or_refused(name: str) -> None:
    full = zoo.build_on_meta(name)
    family = type(full).__name__
    if family in REFUSED:
        with pytest.raises(
            UnsupportedBackbone, match=f"{family} is not supported: {REFUSED[family]}"
        ):
            sparsify(full, keep_ratio=0.7)
        return
    dense = _small(name)
    images = _images(dense)
    _near(sparsify(dense, keep_ratio=1.0)(images), dense(images))
    sparse = sparsify(dense, keep_ratio=0.7)
    pruned = sparse.pruned(images)
    assert pruned.logits.shape == (2, 7)
    assert [int(keep.sum()) for keep in pruned.keep] == [2 * 11, 2 * 7, 2 * 5]
    masked = sparse.masked(images, decisions=pruned.keep)
    logits = masked.logits
    if isinstance(dense, LVViT):  # the losses see its two heads apart
        dropped = masked.keep[-1].unsqueeze(-1) == 0
        logits = logits + 0.5 * masked.tokens.masked_fill(dropped, float("-inf")).amax(dim=1)
    _near(logits, pruned.logits)
    _near(sparse(images), pruned.logits)


def test_every_module_of_timm_s_that_builds_on_these_is_asked() -> None:
    """A module that has VisionTransformer or Eva in it may build models of that class."""
    others = {"naflexvit"}  # takes VisionTransformer's arguments, and is another class
    for module in pkgutil.iter_modules(timm.models.__path__):
        if module.name.startswith("_"):
            continue
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # some are only kept under old names
            names = vars(importlib.import_module(f"timm.models.{module.name}"))
        if {"VisionTransformer", "Eva"} & names.keys():
            assert module.name in {*zoo.MODULES, *others}


def test_nearly_all_plain_transformers_of_timm_are_supported() -> None:
    table, _, refused = DOCS.read_text().partition("## Not supported")
    listed = re.findall(r"^\| (\w+) \| \d", table, re.MULTILINE)
    no = dict(re.findall(r"^\| (\w+) \| (\w+) \|", refused, re.MULTILINE)[1:])
    assert sorted([*listed, *no]) == NAMES, "run `make zoo` to write docs/models.md again"
    assert set(no.values()) <= set(REFUSED), "all of VisionTransformer and Eva are supported"
    assert f"{len(listed)} of {len(NAMES)} are supported" in table


@pytest.mark.parametrize(
    "name", ["deit_small_patch16_224", "lvvit_small", "eva02_tiny_patch14_224"]
)
def test_the_table_says_what_is_counted(name: str) -> None:
    row = " | ".join(zoo._row(zoo.check(name)))
    assert f"| {row} |" in DOCS.read_text()


ROTARY = ["eva02_tiny_patch14_224", "vit_small_patch16_dinov3", "vit_small_patch16_rope_mixed_224"]


@pytest.mark.parametrize("name", ROTARY)
@given(seed=st.integers(0, 1000))
@torch.no_grad()
def test_positions_leave_with_their_tokens(name: str, seed: int) -> None:
    """The order in which kept tokens go on says nothing: their rotary embeddings come along."""
    sparse = sparsify(_SMALL.setdefault(name, _small(name)), keep_ratio=0.6)
    images = _images(sparse.backbone)
    expected = sparse(images)
    shuffle = torch.Generator().manual_seed(seed)
    topk = paths.topk_keep

    def shuffled(scores: Tensor, count: int) -> Tensor:
        kept = topk(scores, count)
        order = torch.rand(kept.shape, generator=shuffle).argsort(dim=1)
        return kept.gather(1, order)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(paths, "topk_keep", shuffled)
        _near(sparse(images), expected)
    # The test can fail: without its embeddings a token is another one.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(paths, "topk_keep", shuffled)
        patch.setattr(
            tokens_module, "gather_rope", lambda rope, kept: rope[..., : kept.shape[1], :]
        )
        assert (sparse(images) - expected).abs().max() > 1e-3


_SMALL: dict[str, Any] = {}


def test_rotary_embeddings_follow_a_dynamic_image_size() -> None:
    dense = timm.create_model(
        "eva02_tiny_patch14_224",
        img_size=56, embed_dim=48, depth=4, num_heads=2, num_classes=7, dynamic_img_size=True,
    )  # fmt: skip
    randomise(dense)
    dense.eval()
    images = torch.randn(2, 3, 56, 84)
    with torch.no_grad():
        _near(sparsify(dense, keep_ratio=1.0)(images), dense(images))
        sparse = sparsify(dense, keep_ratio=0.5)
        pruned = sparse.pruned(images)
        _near(sparse.masked(images, decisions=pruned.keep).logits, pruned.logits)


def test_rotary_models_compile_and_train() -> None:
    dense = _small("vit_small_patch16_rope_mixed_224")
    sparse = sparsify(dense, keep_ratio=0.7)
    images = _images(dense)
    with torch.no_grad():
        compiled = torch.compile(sparse, fullgraph=True, backend="aot_eager")
        _near(compiled(images), sparse(images))
    sparse.set_grad_checkpointing(True)
    sparse.train()
    with torch.autocast("cpu", torch.bfloat16):
        sparse.masked(images).logits.float().square().sum().backward()
    gradients = [p.grad for p in sparse.backbone.blocks.parameters() if p.requires_grad]
    assert all(g is not None and g.isfinite().all() for g in gradients)


def test_eva_s_patch_dropout_is_refused() -> None:
    model = timm.create_model("eva02_tiny_patch14_224", patch_drop_rate=0.5, depth=3)
    with pytest.raises(UnsupportedBackbone, match="Eva is not supported: its random patch dropout"):
        sparsify(model, keep_ratio=0.7)


@pytest.mark.parametrize("name", ["deit_small_patch16_224", "deit_256", "lvvit_small"])
def test_sparse_models_have_names_in_timm_s_registry(name: str) -> None:
    small: dict[str, Any] = {"embed_dim": 32, "depth": 4, "num_heads": 2, "img_size": 64}
    sparse = timm.create_model(f"dynamicvit_{name}", keep_ratio=0.5, num_classes=3, **small).eval()
    assert isinstance(sparse, SparseViT)
    assert sparse.schedule.ratios == (0.5, 0.25, 0.125)
    images = torch.randn(2, 3, 64, 64)
    assert sparse(images).shape == (2, 3)
    features = sparse.forward_features(images)
    assert features.shape == (2, 1 + 2, 32)
    assert sparse.forward_head(features, pre_logits=True).shape == (2, 32)
    sparse.reset_classifier(0)
    assert isinstance(sparse.get_classifier(), nn.Identity)
    assert sparse(images).shape == (2, 32)
    bare = timm.create_model(f"dynamicvit_{name}", num_classes=0, **small).eval()
    assert bare(images).shape == (2, 32)
    assert isinstance(bare, SparseViT)
    assert bare.schedule.ratios[0] == 0.7
    assert timm.data.resolve_input_data_config(sparse)["input_size"] == (3, 64, 64)
    sparse.set_input_size((32, 64))
    assert timm.data.resolve_input_data_config(sparse)["input_size"] == (3, 32, 64)
    groups = param_groups_layer_decay(sparse, layer_decay=0.5)
    assert len({group["lr_scale"] for group in groups}) == 4 + 1  # blocks, and the stem


def test_sparse_names_refuse_what_they_cannot_do() -> None:
    with pytest.raises(ValueError, match="features_only needs a token at every position"):
        timm.create_model("dynamicvit_deit_256", features_only=True)
    with pytest.raises(ValueError, match=r"keep_ratio must lie in \(0, 1\]"):
        timm.create_model("dynamicvit_deit_256", keep_ratio=1.5)


def test_models_are_listed(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    output = tmp_path / "models.md"
    assert cli.main(["models", "*deit_256", "--keep_ratio", "0.8", "--output", str(output)]) == 0
    assert "1 models; not supported: 0" in capsys.readouterr().out
    assert "| deit_256 | 224×224 | 196 → 156 → 125 → 100 |" in output.read_text()
    config = tmp_path / "models.yaml"
    config.write_text("filter: 'test_vit'\nkeep_ratio: 0.1\n")
    assert cli.main(["models", "--config", str(config)]) == 0
    found = capsys.readouterr().out
    assert "not supported: 1" in found
    assert "test_vit: ratios must leave at least one" in found


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnet50", r"ResNet is not supported: .*; near in size: \w+, deit_small_patch16_224"),
        ("resnet50.tv_in1k", "ResNet is not supported: "),
        ("resnet*", "models of other kinds do, such as resnet"),
        ("deit_smal", "near: deit_small_distilled_patch16_224, deit_small_patch16_224"),
        ("diet_small_patch16_224", "near: deit_small_patch16_224"),
        ("zzzz", "near: none, `dynamicvit models` lists all"),
        ("me/resnet", "ResNet is not supported"),
        ("me/deit-small-patch16-224", "'vit'.*near: .*deit_small_patch16_224"),
        ("me/odd", "filter must be .* got 'me/odd'"),
        ("me/none", "got 'me/none': no route"),
        ("me/deit-small", "got 'me/deit-small': no route; near: deit_small"),
        ("timm/resnet18.a1_in1k", "ResNet is not supported: .*; near in size: "),
    ],
)
def test_models_says_what_is_wrong_and_what_is_near(
    name: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _serve(tmp_path, monkeypatch)
    with pytest.raises(ValueError, match=message):
        zoo.models(name)


def _serve(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A hub of four models."""
    configs = {
        "me/vit": '{"architecture": "deit_256"}',
        "me/resnet": '{"architecture": "resnet18"}',
        "me/deit-small-patch16-224": '{"model_type": "vit"}',
        "me/odd": "[]",
    }

    def download(hub_id: str, name: str) -> str:
        if hub_id not in configs:
            raise OSError("no route")
        (folder / name).write_text(configs[hub_id])
        return str(folder / name)

    monkeypatch.setattr(zoo, "hf_hub_download", download)
    monkeypatch.setattr("dynamicvit.io.hub._reachable", lambda: True)


def test_models_takes_hub_ids_and_names_of_weights(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _serve(tmp_path, monkeypatch)
    for name in ("me/vit", "deit_256.untrained"):
        assert [item.name for item in zoo.models(name, quiet=True)] == ["deit_256"]
    found = zoo.models("timm/deit_tiny_patch16_224.fb_in1k", quiet=True)
    assert [item.name for item in found] == ["deit_tiny_patch16_224"]


def test_the_list_fits_into_80_columns(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    longest = max(NAMES, key=len)
    zoo.models(longest)
    text = capsys.readouterr().out
    assert longest in text
    assert max(map(len, text.splitlines())) <= 80
    zoo.models(longest, quiet=True)
    assert capsys.readouterr().out == ""


def test_models_names_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"keep_ratio must lie in \(0, 1\], got 2"):
        zoo.models("deit_256", keep_ratio=2)
    with pytest.raises(ValueError, match="output must be a file, got the folder"):
        zoo.models("deit_256", output=str(tmp_path))
