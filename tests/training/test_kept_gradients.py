from __future__ import annotations

import weakref
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from timm.models import vision_transformer as vit
from torch import Tensor

from dynamicvit import KeepSchedule, SparseViT, sparsify
from dynamicvit.core.paths import Masked
from dynamicvit.evaluation.processor import has_bfloat16
from dynamicvit.training import kept_gradients
from dynamicvit.training.kept_gradients import KeptGradients, KeptMasked
from dynamicvit.training.task import SparseTask
from tests.conftest import randomise, tiny_vit

IMAGES = torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(0))
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("vit_tiny_patch16_224", {}),
    "average pooled": ("vit_tiny_patch16_224", {"global_pool": "avg"}),
    "attention pooled": ("vit_tiny_patch16_224", {"global_pool": "map", "class_token": False}),
    "registers": ("vit_tiny_patch16_224", {"reg_tokens": 3}),
    "post-norm": ("vit_tiny_patch16_224", {"block_fn": vit.ResPostBlock}),
    "parallel": ("vit_tiny_patch16_224", {"block_fn": vit.ParallelThingsBlock}),
    "scaling": ("vit_tiny_patch16_224", {"block_fn": vit.ParallelScalingBlock}),
    "differential": ("vit_tiny_patch16_224", {"attn_layer": "diff"}),
    "rotary": ("eva02_tiny_patch14_224", {"patch_size": 8}),
}


def _sparse(name: str = "vit_tiny_patch16_224", **options: Any) -> SparseViT:
    sparse = sparsify(tiny_vit(name, **options), schedule=KeepSchedule((1, 2, 3), (0.7, 0.5, 0.3)))
    randomise(sparse.scorers)
    scorer: Any
    for scorer in sparse.scorers:  # some of each image's tokens are to be kept
        scorer.set_keep_prior(0.8)
    return sparse.train()


def _gradients(
    sparse: SparseViT, enable: bool, dtype: torch.dtype | None = None
) -> dict[str, Tensor]:
    """Of a loss that sees what the paper's losses see: logits, kept tokens, decisions."""
    path = KeptMasked if enable else Masked
    sparse.zero_grad()
    torch.manual_seed(0)
    with torch.autocast("cpu", dtype, enabled=dtype is not None):
        found = sparse.masked(IMAGES, path=path)
        tokens = found.tokens.square() * (found.keep[-1].detach() > 0).unsqueeze(-1)
        shares = torch.stack([keep.mean() for keep in found.keep])
        loss = found.logits.float().square().mean() + tokens.float().mean() + shares.square().sum()
    assert (found.keep[0] == 0).any()
    assert (found.keep[-1].sum(1) > 0).all()
    loss.backward()
    return {name: p.grad for name, p in sparse.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("alone", [False, True])
@pytest.mark.parametrize(("name", "options"), MODELS.values(), ids=MODELS.keys())
def test_gradients_are_those_of_all_tokens(
    name: str, options: dict[str, Any], alone: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if alone:  # attention image by image, as where images are large
        monkeypatch.setattr(kept_gradients, "GROUP", 1)
    sparse = _sparse(name, **options)
    plain, kept = _gradients(sparse, False), _gradients(sparse, True)
    assert plain.keys() == kept.keys()
    largest = max(float(gradient.norm()) for gradient in plain.values())
    for key, gradient in plain.items():
        error = float((kept[key] - gradient).norm())
        assert error <= 1e-4 * float(gradient.norm()) + 1e-7 * largest, key
    assert any(not torch.equal(kept[key], plain[key]) for key in plain), "it is another way"


@pytest.mark.parametrize("by_onednn", [False, True])
def test_gradients_in_mixed_precision(by_onednn: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """On processors without bfloat16 too, where oneDNN refuses it and torch has loops for it."""
    if by_onednn and not has_bfloat16():
        pytest.skip("this processor has no bfloat16")
    asked: list[torch.dtype] = []

    def product(x: Tensor, *others: Tensor | None) -> Tensor:
        asked.append(x.dtype)
        return _product(x, *others)

    _product: Any = kept_gradients._product
    monkeypatch.setattr(kept_gradients, "_product", product)
    monkeypatch.setattr(kept_gradients, "has_bfloat16", lambda: by_onednn)
    sparse = _sparse()
    plain = _gradients(sparse, False, torch.bfloat16)
    kept = _gradients(sparse, True, torch.bfloat16)
    for key, gradient in plain.items():
        assert kept[key].isfinite().all()
        assert (kept[key] - gradient).norm() <= 0.05 * gradient.norm() + 1e-4, key
    assert (torch.bfloat16 in asked) == by_onednn


def test_gradients_in_double_precision() -> None:
    sparse = _sparse().double()
    gradients = []
    for enable in (False, True):
        path = KeptMasked if enable else Masked
        sparse.zero_grad()
        torch.manual_seed(0)
        sparse.masked(IMAGES.double(), path=path).logits.square().mean().backward()
        gradients.append(sparse.backbone.patch_embed.proj.weight.grad)
    torch.testing.assert_close(*gradients, atol=1e-8, rtol=1e-6)


def test_where_no_token_is_kept() -> None:
    sparse = _sparse(class_token=False, global_pool="avg")
    given = [torch.zeros(3, 16)] * 3
    gradients = []
    for enable in (False, True):
        path = KeptMasked if enable else Masked
        sparse.zero_grad()
        sparse.masked(IMAGES, given, path=path).logits.square().mean().backward()
        gradients.append(sparse.backbone.head.weight.grad)
    torch.testing.assert_close(*gradients)
    assert sparse.masked(IMAGES[:0], path=KeptMasked).logits.shape == (0, sparse.num_classes)


def test_there_are_no_second_order_gradients() -> None:
    x = torch.randn(1, 2, 4, requires_grad=True)
    with KeptGradients(torch.ones(1, 2)):
        y = torch.nn.Linear(4, 4)(x)
    [gradient] = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


@pytest.mark.parametrize("between", ["nothing", "in place", "another reader", "hook"])
def test_a_chain_is_one_only_if_nothing_comes_between(between: str) -> None:
    keep = torch.tensor([[1.0, 0, 1, 1]])
    layers = torch.nn.Linear(6, 8), torch.nn.GELU(), torch.nn.Linear(8, 6)
    x = torch.randn(1, 4, 6)
    gradients = []
    for mode in (nullcontext(), KeptGradients(keep)):
        input = x.clone().requires_grad_()
        with mode:
            hidden = layers[0](input)
            also = hidden.square().sum(-1, keepdim=True) if between == "another reader" else 0.0
            if between == "in place":
                hidden.mul_(2.0)
            if between == "hook":
                hidden.register_hook(torch.zeros_like)
            activated = layers[1](hidden)
            if between == "in place":
                activated.mul_(3.0)
            y = layers[2](activated) + also
        loss = (y * keep.unsqueeze(-1)).square().sum()
        gradients.append(torch.autograd.grad(loss, [input, *layers[0].parameters()]))
    for plain, kept in zip(*gradients, strict=True):
        torch.testing.assert_close(kept, plain)


class _Saved:
    """A tensor that the backward pass will read."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def test_less_is_kept_for_the_backward_pass() -> None:
    sparse = _sparse()
    sizes = []
    for enable in (False, True):
        path = KeptMasked if enable else Masked
        saved: weakref.WeakSet[_Saved] = weakref.WeakSet()  # those that something still holds

        def pack(tensor: Tensor, saved: weakref.WeakSet[_Saved] = saved) -> _Saved:
            box = _Saved(tensor)
            saved.add(box)
            return box

        torch.manual_seed(0)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda box: box.tensor):
            output = sparse.masked(IMAGES, path=path)
        storages = {box.tensor.untyped_storage() for box in saved}
        sizes.append(sum({s.data_ptr(): s.nbytes() for s in storages}.values()))
        del output
    assert sizes[1] < 0.85 * sizes[0]


def test_nothing_else_changes() -> None:
    sparse = _sparse()
    torch.manual_seed(0)
    plain = sparse.masked(IMAGES)
    torch.manual_seed(0)
    kept = sparse.masked(IMAGES, path=KeptMasked)
    torch.testing.assert_close(kept, plain)


def test_decisions_in_between_drop_nothing() -> None:
    """A token that is half kept has a gradient in full."""
    sparse = _sparse()
    given = [torch.full((3, 16), 0.5)] * 3
    gradients = []
    for enable in (False, True):
        path = KeptMasked if enable else Masked
        sparse.zero_grad()
        sparse.masked(IMAGES, given, path=path).logits.square().mean().backward()
        gradients.append(sparse.backbone.patch_embed.proj.weight.grad)
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_other_savings_come_first(checkpointing: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Checkpointed blocks are run again where nothing stands in."""
    sparse = _sparse()
    sparse.set_grad_checkpointing(checkpointing)
    task = SparseTask(sparse, tiny_vit(), kept_gradients=True).train()
    entered: list[str] = []
    enter = KeptGradients.__enter__

    def note(self: KeptGradients) -> Any:
        entered.append("here")
        return enter(self)

    monkeypatch.setattr(KeptGradients, "__enter__", note)
    task(IMAGES, torch.arange(3))
    assert bool(entered) != checkpointing


def test_a_compiled_task_leaves_nothing_out() -> None:
    task = SparseTask(_sparse(), tiny_vit(), kept_gradients=True)
    compiled = torch.compile(task, backend="aot_eager", fullgraph=True)
    losses = []
    for run in (task, compiled):
        torch.manual_seed(0)
        losses.append(run(IMAGES, torch.arange(3))["loss"])
    torch.testing.assert_close(*losses, atol=1e-4, rtol=1e-4)
