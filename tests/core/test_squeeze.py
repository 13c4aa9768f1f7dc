"""Squeezing: what leaves is merged into the most similar token that stays."""

from __future__ import annotations

import math
from typing import Any, cast

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from dynamicvit import KeepSchedule, SparseViT, sparsify
from dynamicvit.core.macs import count_gmacs
from dynamicvit.core.tokens import others, squeeze
from tests.conftest import tiny_vit

FAMILIES = ["vit_tiny_patch16_224", "eva02_tiny_patch14_224", "lvvit_small"]


def _sparse(name: str = FAMILIES[0], scorer: str = "learned", **options: Any) -> SparseViT:
    model = tiny_vit(name, **options)
    return sparsify(model, keep_ratio=0.6, scorer=scorer, squeeze=True).eval()


def _by_hand(host: Tensor, left: Tensor) -> Tensor:
    """The formula of arXiv 2304.10716, token by token, for one image."""
    total, weight = math.e * host, torch.full((len(host), 1), math.e)
    for token in left:
        similarity = F.cosine_similarity(host, token[None], dim=1)
        at = int(similarity.argmax())
        total[at] += similarity[at].exp() * token
        weight[at] += similarity[at].exp()
    return total / weight


@given(st.integers(0, 2**31), st.integers(1, 9))
@settings(deadline=None)
def test_squeezing_is_the_formula_in_both_forms(seed: int, count: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, 10, 8, generator=generator)
    kept = torch.rand(2, 10, generator=generator).topk(count, dim=1).indices
    rest = others(kept, 10)
    assert all({*a, *b} == {*range(10)} for a, b in zip(kept.tolist(), rest.tolist(), strict=True))
    expected = torch.stack([_by_hand(x[i, kept[i]], x[i, rest[i]]) for i in range(2)])
    rows = torch.arange(2)[:, None]
    pruned = squeeze(x[rows, kept], x[rows, rest])
    torch.testing.assert_close(pruned, expected, atol=1e-5, rtol=1e-5)
    keep = torch.zeros(2, 10).scatter(1, kept, 1.0)
    masked = squeeze(x, x, 1.0 - keep, can_host_BK=keep)
    torch.testing.assert_close(masked[rows, kept], expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(masked[rows, rest], x[rows, rest])


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_both_paths_agree_and_differ_from_dropping(name: str) -> None:
    sparse = _sparse(name)
    images = torch.randn(3, 3, 32, 32)
    pruned, masked = sparse.pruned(images), sparse.masked(images)
    torch.testing.assert_close(pruned.logits, sparse(images))
    for own, other in zip(pruned.keep, masked.keep, strict=True):
        assert torch.equal(own, other)
    if not sparse.adapter.token_logits:  # the masked head gives class logits alone
        torch.testing.assert_close(masked.logits, pruned.logits, atol=1e-5, rtol=0)
    again = sparse.masked(images, decisions=pruned.keep)
    torch.testing.assert_close(again.tokens, masked.tokens, atol=1e-5, rtol=0)
    dropping = SparseViT(sparse.backbone, sparse.schedule, sparse.scorers)
    assert (dropping(images) - pruned.logits).abs().max() > 1e-4


@torch.no_grad()
def test_nothing_is_squeezed_where_all_stay() -> None:
    sparse = _sparse()
    images = torch.randn(2, 3, 32, 32)
    full = sparse.at(keep_ratio=1.0)
    assert full.squeeze
    torch.testing.assert_close(full(images), sparse.backbone(images))
    torch.testing.assert_close(full.masked(images).logits, full(images), atol=1e-5, rtol=0)


def test_the_decision_to_leave_learns_from_what_it_gives() -> None:
    sparse = _sparse()
    images = torch.randn(2, 3, 32, 32)
    decisions = [torch.ones(2, 16) for _ in range(3)]
    decisions[0] = torch.zeros(2, 16)
    decisions[0][:, :8] = 1.0
    decisions[0].requires_grad_()
    sparse.masked(images, decisions).logits.square().sum().backward()
    assert decisions[0].grad is not None
    assert (decisions[0].grad.abs() > 0).all()
    # An image that keeps nothing: no NaN.
    nothing = [torch.zeros(2, 16, requires_grad=True) for _ in range(3)]
    sparse.masked(images, nothing).logits.sum().backward()
    assert nothing[0].grad is not None
    assert nothing[0].grad.isfinite().all()


def test_training_in_bfloat16_is_finite() -> None:
    sparse = _sparse().train()
    with torch.autocast("cpu", torch.bfloat16):
        loss = sparse.masked(torch.randn(2, 3, 32, 32)).logits.float().sum()
    loss.backward()
    assert all(p.grad is None or p.grad.isfinite().all() for p in sparse.parameters())


@torch.no_grad()
def test_it_compiles_whole_and_is_exported() -> None:
    sparse = _sparse()
    images = torch.randn(2, 3, 32, 32)
    expected = sparse(images)
    compiled = torch.compile(sparse, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(images), expected, atol=1e-5, rtol=0)
    shapes = {"images": {0: torch.export.Dim("batch", min=1)}}
    program = torch.export.export(sparse, (images,), dynamic_shapes=shapes).module()
    more = torch.randn(5, 3, 32, 32)
    torch.testing.assert_close(program(more), sparse(more), atol=1e-5, rtol=0)


def test_its_cost_is_counted() -> None:
    with torch.device("meta"):
        sparse = sparsify(tiny_vit(embed_dim=128, img_size=64), keep_ratio=0.5, squeeze=True).eval()
    counted = count_gmacs(sparse.to("meta"), (3, 64, 64))
    assert sparse.budget().cost(sparse.schedule) == pytest.approx(counted, rel=0.01)


def test_merging_selectors_have_nothing_to_squeeze() -> None:
    with pytest.raises(ValueError, match="squeeze needs scorers that choose tokens, got Pooling"):
        sparsify(tiny_vit(), keep_ratio=0.5, scorer="pooling", squeeze=True)


@torch.no_grad()
def test_each_image_may_have_its_budget() -> None:
    sparse = _sparse(img_size=48)
    images = torch.linspace(0.1, 2, 20).view(-1, 1, 1, 1) * torch.randn(20, 3, 48, 48)
    sparse.calibrate(images, (0.4, 0.6, 1.0))
    each = sparse.at(keep_ratio=0.5, per_image=True)
    assert each.squeeze
    torch.testing.assert_close(each(images), each.masked(images).logits, atol=1e-5, rtol=0)
    assert cast(Any, each.levels).schedules[0] == KeepSchedule((1, 2, 3), (0.4, 0.4**2, 0.4**3))
