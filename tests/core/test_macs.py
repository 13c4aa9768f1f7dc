from __future__ import annotations

import pytest
import timm
import torch

from dynamicvit import count_gmacs, sparsify
from tests.conftest import tiny_vit

SIZE = (3, 224, 224)


@pytest.fixture(scope="module")
def deit_small() -> torch.nn.Module:
    with torch.device("meta"):  # no memory, no arithmetic
        model: torch.nn.Module = timm.create_model("deit_small_patch16_224")
    return model


def test_dense_count_and_size_are_the_published_ones(deit_small: torch.nn.Module) -> None:
    assert count_gmacs(deit_small, SIZE) == pytest.approx(4.608, rel=0.01)
    sparse = sparsify(deit_small, keep_ratio=0.7)
    parameters = sum(parameter.numel() for parameter in sparse.parameters())
    assert parameters / 1e6 == pytest.approx(22.774, abs=0.001)


@pytest.mark.parametrize(("keep_ratio", "gmacs"), [(0.9, 4.050), (0.8, 3.471), (0.7, 2.988)])
def test_pruned_counts_are_the_published_ones(
    deit_small: torch.nn.Module, keep_ratio: float, gmacs: float
) -> None:
    assert count_gmacs(sparsify(deit_small, keep_ratio), SIZE) == pytest.approx(gmacs, rel=0.01)


def test_a_linear_layer_is_counted_exactly() -> None:
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(3 * 4 * 5, 7))
    assert count_gmacs(model, (3, 4, 5)) == pytest.approx(3 * 4 * 5 * 7 / 1e9)


def test_counting_does_not_change_the_model() -> None:
    model = tiny_vit(global_pool="map").train()
    assert model.cls_token is not None
    model.cls_token.requires_grad_(False)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    count_gmacs(model, (3, 32, 32))
    assert model.training
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    fixed = [name for name, parameter in model.named_parameters() if not parameter.requires_grad]
    assert fixed == ["cls_token"]
