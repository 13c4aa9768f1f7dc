from __future__ import annotations

import copy
import shutil
from pathlib import Path
from typing import Any, cast

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from timm.models import vision_transformer as vit
from torch import Tensor, nn

from dynamicvit import (
    KeepSchedule,
    SparseOutput,
    SparseViT,
    TokenScorer,
    count_gmacs,
    sparsify,
)
from dynamicvit.core.selectors import Selector, Stage
from tests.conftest import randomise, tiny_vit

THREE = KeepSchedule.from_keep_ratio(0.7, depth=4)


def tiny_sparse(
    schedule: KeepSchedule = THREE, name: str = "vit_tiny_patch16_224", **options: Any
) -> SparseViT:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        sparse = sparsify(tiny_vit(name, **options), schedule=schedule)
    randomise(sparse.scorers)  # fresh scorers hardly tell tokens apart
    return sparse


def _images(*size: int) -> Tensor:
    return torch.randn(2, *(size or (3, 32, 32)))


# name, options of the model, images, schedule
Case = tuple[str, dict[str, Any], tuple[int, ...], KeepSchedule]
OPTIONS: list[tuple[str, dict[str, Any], tuple[int, ...]]] = [
    ("registers", {"reg_tokens": 3}, (3, 32, 32)),
    ("no position for prefix", {"no_embed_class": True, "reg_tokens": 2}, (3, 32, 32)),
    ("no prefix", {"class_token": False, "global_pool": "avg"}, (3, 32, 32)),
    ("not square", {"img_size": (32, 48)}, (3, 32, 48)),
    ("one channel", {"in_chans": 1}, (1, 32, 32)),
    ("any size", {"dynamic_img_size": True}, (3, 48, 40)),
    ("differential attention", {"attn_layer": "diff"}, (3, 32, 32)),
]
CASES: dict[str, Case] = {
    **{
        f"pool {pool}": ("vit_tiny_patch16_224", {"global_pool": pool}, (3, 32, 32), THREE)
        for pool in ("token", "avg", "max", "avgmax", "map")
    },
    **{
        f"pool {pool} with prefix": (
            "vit_tiny_patch16_224",
            {"global_pool": pool, "pool_include_prefix": True, "reg_tokens": 1},
            (3, 32, 32),
            THREE,
        )
        for pool in ("avg", "max", "avgmax", "map")
    },
    **{
        block.__name__: ("vit_tiny_patch16_224", {"block_fn": block}, (3, 32, 32), THREE)
        for block in (
            vit.ResPostBlock,
            vit.ParallelScalingBlock,
            vit.ParallelThingsBlock,
            vit.DiffParallelScalingBlock,
        )
    },
    **{title: ("vit_tiny_patch16_224", options, size, THREE) for title, options, size in OPTIONS},
    "distilled": ("deit_tiny_distilled_patch16_224", {}, (3, 32, 32), THREE),
    "hybrid": ("vit_tiny_r_s16_p8_224", {"img_size": 64, "patch_size": 1}, (3, 64, 64), THREE),
    **{
        f"stages at {blocks}": (
            "vit_tiny_patch16_224",
            {},
            (3, 32, 32),
            KeepSchedule(blocks, ratios),
        )
        for blocks, ratios in [
            ((0,), (0.5,)),
            ((2,), (0.07,)),  # one token is left
            ((1, 3), (1.0, 0.3)),
            ((0, 1, 2, 3), (0.9, 0.9, 0.5, 0.2)),
        ]
    },
}


@pytest.mark.parametrize(("name", "options", "size", "schedule"), CASES.values(), ids=CASES.keys())
@torch.no_grad()
def test_blocking_tokens_gives_the_logits_of_removing_them(
    name: str, options: dict[str, Any], size: tuple[int, ...], schedule: KeepSchedule
) -> None:
    sparse = tiny_sparse(schedule, name, **options)
    images = _images(*size)
    pruned = sparse.pruned(images)
    masked = sparse.masked(images, decisions=pruned.keep)
    # A blocked token keeps a weight of 1e-6, which the norm right after the attention of a
    # post-norm block magnifies.
    tolerance = 1e-3 if options.get("block_fn") is vit.ResPostBlock else 1e-4
    torch.testing.assert_close(masked.logits, pruned.logits, atol=tolerance, rtol=0)
    torch.testing.assert_close(sparse(images), pruned.logits, atol=1e-5, rtol=0)

    for stage, (a, b) in enumerate(zip(masked.keep, pruned.keep, strict=True)):
        assert torch.equal(a, b)
        # tokens are scored alike wherever both paths have them
        there = pruned.keep[stage - 1] > 0.5 if stage else torch.ones_like(a, dtype=torch.bool)
        assert torch.equal(pruned.scores[stage].isfinite(), there)
        score = masked.scores[stage][there]
        torch.testing.assert_close(score, pruned.scores[stage][there], atol=1e-3, rtol=0)
    # kept patch tokens agree too, as sets
    kept = masked.tokens[pruned.keep[-1] > 0.5].view_as(pruned.tokens)
    torch.testing.assert_close(
        kept.sum(dim=1), pruned.tokens.sum(dim=1), atol=50 * tolerance, rtol=0
    )

    # The checks above would also pass if nothing had left, or scorers did not matter.
    dense = sparse.backbone(images)
    assert (pruned.logits - dense).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("name", "options", "size"), [case[:3] for case in CASES.values()], ids=CASES.keys()
)
@torch.no_grad()
def test_keeping_everything_is_the_dense_model(
    name: str, options: dict[str, Any], size: tuple[int, ...]
) -> None:
    dense, images = tiny_vit(name, **options), _images(*size)
    sparse = sparsify(dense, keep_ratio=1.0)
    expected = dense(images)
    torch.testing.assert_close(sparse(images), expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(sparse.pruned(images).logits, expected, atol=1e-5, rtol=0)
    ones = [torch.ones_like(keep) for keep in sparse.pruned(images).keep]
    masked = sparse.masked(images, decisions=ones)
    torch.testing.assert_close(masked.logits, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("pool", ["token", "avg", "max", "avgmax", "map"])
def test_an_image_that_loses_every_token_stays_finite(pool: str) -> None:
    """Sampling can do that in training; it must not put a NaN into the weights."""
    sparse = tiny_sparse(global_pool=pool)
    output = sparse.masked(_images(), decisions=[torch.zeros(2, 16)] * 3)
    output.logits.sum().backward()
    assert output.logits.isfinite().all()
    assert all(p.grad.isfinite().all() for p in sparse.parameters() if p.grad is not None)


@pytest.mark.parametrize("training", [True, False])
def test_sparsify_copies_and_keeps_the_mode(training: bool) -> None:
    dense = tiny_vit().train(training)
    before = copy.deepcopy(dense.state_dict())
    modules = list(dense.modules())
    sparse = sparsify(dense, keep_ratio=0.7)
    assert sparse.training == sparse.backbone.training == sparse.scorers.training == training
    assert not {id(p) for p in dense.parameters()} & {id(p) for p in sparse.parameters()}
    torch.testing.assert_close(
        dict(sparse.backbone.state_dict()), dict(before), atol=0, rtol=0, msg="weights changed"
    )

    with torch.no_grad():
        for parameter in sparse.parameters():
            parameter.add_(1.0)
    sparse.reset_classifier(3)
    sparse.train(not training)
    assert dense.training == training
    assert [id(module) for module in dense.modules()] == [id(module) for module in modules]
    assert before.keys() == dense.state_dict().keys()
    assert all(torch.equal(before[key], value) for key, value in dense.state_dict().items())


def test_scorers_follow_the_backbone() -> None:
    assert all(p.dtype == torch.bfloat16 for p in sparsify(tiny_vit().bfloat16(), 0.7).parameters())
    assert all(p.is_meta for p in sparsify(tiny_vit().to("meta"), 0.7).parameters())


def test_train_and_eval_run_the_same_algorithm() -> None:
    # patch_drop is random patch removal of timm's; what leaves is for the schedule alone to say
    sparse, images = tiny_sparse(patch_drop_rate=0.5), _images()
    expected = sparse.eval()(images)
    actual = sparse.train()(images)
    assert torch.equal(actual, expected)
    assert isinstance(sparse.train().masked(images), SparseOutput)
    assert isinstance(sparse.eval().masked(images), SparseOutput)

    torch.manual_seed(1)
    one = sparse.train().masked(images).keep[0]
    two = sparse.train().masked(images).keep[0]
    assert not torch.equal(one, two), "training draws decisions"
    again = sparse.eval().masked(images)
    assert torch.equal(again.keep[0], sparse.eval().masked(images).keep[0])
    pruned = sparse.pruned(images)
    assert all(torch.equal(*both) for both in zip(again.keep, pruned.keep, strict=True))


def test_a_distilled_model_returns_one_tensor_in_training() -> None:
    dense = tiny_vit("deit_tiny_distilled_patch16_224")
    cast(Any, dense).set_distilled_training(True)
    images = _images()
    expected = SparseViT(dense, THREE)(images)
    for sparse in (sparsify(dense, schedule=THREE), SparseViT(dense, THREE)):
        assert sparse.train()(images).shape == sparse.masked(images).logits.shape == (2, 5)
        assert dense.distilled_training, "the caller's model is as it was"
    assert expected.shape == (2, 5)


@settings(max_examples=10)
@given(st.permutations(range(4)), st.integers(0, 1000))
@torch.no_grad()
def test_images_of_a_batch_do_not_mix(order: list[int], seed: int) -> None:
    sparse = tiny_sparse()
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(seed))
    expected = sparse(images)[order]
    torch.testing.assert_close(sparse(images[order]), expected, atol=1e-5, rtol=0)
    alone = torch.cat([sparse(image[None]) for image in images[order]])
    torch.testing.assert_close(alone, expected, atol=1e-5, rtol=0)


@settings(max_examples=10)
@given(st.integers(0, 1000), st.sampled_from(["pruned", "masked in train", "masked in eval"]))
@torch.no_grad()
def test_a_token_that_left_never_comes_back(seed: int, path: str) -> None:
    sparse = tiny_sparse(KeepSchedule((0, 1, 2, 3), (0.9, 0.7, 0.5, 0.2)))
    torch.manual_seed(seed)
    images = torch.randn(3, 3, 32, 32)
    sparse.train(path == "masked in train")
    output = sparse.pruned(images) if path == "pruned" else sparse.masked(images)
    for keep in output.keep:
        assert set(keep.unique().tolist()) <= {0.0, 1.0}
    for before, after in zip(output.keep, output.keep[1:], strict=False):
        assert (after <= before).all()
    if path == "pruned":
        counts = [keep.sum(dim=1).unique().tolist() for keep in output.keep]
        assert counts == [[count] for count in sparse.schedule.counts(16)]
        assert output.tokens.shape[1] == 3


def test_later_decisions_are_multiplied_with_earlier_ones() -> None:
    sparse = tiny_sparse()
    decisions = [torch.rand(2, 16) for _ in range(3)]
    keep = sparse.masked(_images(), decisions=decisions).keep
    torch.testing.assert_close(keep[0], decisions[0])
    torch.testing.assert_close(keep[1], decisions[0] * decisions[1])
    torch.testing.assert_close(keep[2], decisions[0] * decisions[1] * decisions[2])


def test_images_may_repeat_and_a_batch_may_be_empty() -> None:
    sparse, image = tiny_sparse(), _images()[:1]
    logits = sparse(image.repeat(3, 1, 1, 1))
    torch.testing.assert_close(logits, logits[:1].repeat(3, 1), atol=1e-6, rtol=0)
    assert sparse(image[:0]).shape == sparse.masked(image[:0]).logits.shape == (0, 5)
    # equal tokens, hence equal scores: ties must not cost or add a token
    flat = sparse.pruned(torch.zeros(1, 3, 32, 32))
    assert [int(keep.sum()) for keep in flat.keep] == list(sparse.schedule.counts(16))


@pytest.mark.parametrize("bfloat16", [False, True])
def test_every_parameter_learns_from_the_masked_path(bfloat16: bool) -> None:
    sparse = tiny_sparse().train()
    with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
        output = sparse.masked(_images())
    (output.logits.float().square().mean() + output.tokens.float().square().mean()).backward()
    for name, parameter in sparse.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.isfinite().all(), name
        assert parameter.grad.abs().max() > 0, name


def test_gradient_checkpointing_changes_no_gradient() -> None:
    images = _images()
    decisions = [(torch.rand(2, 16) > 0.3).float() for _ in range(3)]
    gradients = []
    for enable in (False, True):
        sparse = tiny_sparse().train()
        sparse.set_grad_checkpointing(enable)
        (sparse(images).sum() + sparse.masked(images, decisions).logits.sum()).backward()
        gradients.append(sparse.backbone.patch_embed.proj.weight.grad)
    torch.testing.assert_close(*gradients)


def test_float16_is_refused_where_it_would_lose_the_gradient() -> None:
    sparse, images = tiny_sparse(), _images()
    with (
        torch.autocast("cpu", torch.float16),
        pytest.raises(TypeError, match="masked needs float32 or bfloat16, got float16"),
    ):
        sparse.masked(images)
    with pytest.raises(TypeError, match="masked needs float32 or bfloat16, got float16"):
        sparse.half().masked(images.half())


# torch's default backend writes C++, which needs a compiler.
BACKENDS = ["aot_eager", *(["inductor"] if shutil.which("g++") else [])]


# torch 2.11's own inductor still uses torch.jit.
@pytest.mark.filterwarnings("ignore:`torch.jit:DeprecationWarning")
@pytest.mark.parametrize("backend", BACKENDS)
def test_both_paths_compile_to_one_graph(backend: str) -> None:
    sparse = tiny_sparse(KeepSchedule((1,), (0.5,)), depth=2)
    forward = torch.compile(sparse, fullgraph=True, backend=backend)
    masked = torch.compile(sparse.masked, fullgraph=True, backend=backend)
    with torch.no_grad():
        for batch in (2, 3):
            images = torch.randn(batch, 3, 32, 32)
            torch.testing.assert_close(forward(images), sparse(images), atol=1e-5, rtol=0)
            decisions = [(torch.rand(batch, 16) > 0.5).float()]
            compiled, eager = masked(images, decisions), sparse.masked(images, decisions)
            torch.testing.assert_close(compiled.logits, eager.logits, atol=1e-5, rtol=0)
            torch.testing.assert_close(compiled.tokens, eager.tokens, atol=1e-5, rtol=0)


def test_it_answers_timms_questions_as_the_dense_model_does() -> None:
    dense = tiny_vit()
    sparse = sparsify(dense, keep_ratio=0.7)
    for name in ("num_classes", "num_features", "head_hidden_size", "embed_dim", "in_chans"):
        assert getattr(sparse, name) == getattr(dense, name)
    for name in ("num_prefix_tokens", "global_pool", "pretrained_cfg", "default_cfg"):
        assert getattr(sparse, name) == getattr(dense, name)
    assert sparse.get_classifier() is sparse.backbone.head
    parameters = {name for name, _ in sparse.named_parameters()}
    assert parameters & sparse.no_weight_decay() == {"backbone.pos_embed", "backbone.cls_token"}

    images = _images()
    features = sparse.forward_features(images)
    assert features.shape == (2, 1 + sparse.schedule.counts(16)[-1], 32)
    assert torch.equal(sparse.forward_head(features), sparse(images))
    assert sparse.forward_head(features, pre_logits=True).shape == (2, 32)
    with pytest.raises(ValueError, match=r"x must be tokens \[B, N, 32\], got \[2, 17, 31\]"):
        sparse.forward_head(torch.zeros(2, 17, 31))
    sparse.reset_classifier(7)
    assert sparse.num_classes == 7
    assert sparse(images).shape == sparse.masked(images).logits.shape == (2, 7)


def test_scorers_can_be_given() -> None:
    """A selector of one's own: here the first tokens are worth most."""

    class First(Selector):
        def forward(
            self, x_BNC: Tensor, keep_BN: Tensor | None = None, stage: Stage | None = None
        ) -> Tensor:
            return 4.5 - torch.arange(x_BNC.shape[1], dtype=x_BNC.dtype).expand(x_BNC.shape[:2])

    sparse = SparseViT(tiny_vit(), KeepSchedule((1,), (0.25,)), [First()]).eval()
    for found in (sparse.pruned(_images()), sparse.masked(_images())):
        assert found.keep[0].tolist() == [[1.0] * 4 + [0.0] * 12] * 2
    with pytest.raises(TypeError, match="each of scorers must be a Selector, got Linear"):
        SparseViT(tiny_vit(), KeepSchedule((1,), (0.25,)), [nn.Linear(2, 2)])


DENSE = tiny_vit()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"keep_ratio": 0}, ValueError, r"keep_ratio must lie in \(0, 1\], got 0"),
        ({"keep_ratio": 1.5}, ValueError, r"keep_ratio must lie in \(0, 1\], got 1\.5"),
        ({"keep_ratio": float("nan")}, ValueError, r"keep_ratio must lie in \(0, 1\], got nan"),
        ({"keep_ratio": "a"}, TypeError, "keep_ratio must be a number.*got 'a'"),
        ({"keep_ratio": True}, TypeError, "keep_ratio must be a number.*got True"),
        ({"schedule": 3, "align": 16}, TypeError, "schedule must be a KeepSchedule, got 3"),
        ({"keep_ratio": 0.2}, ValueError, "at least one of the 16 patch tokens"),
        (
            {"keep_ratio": 0.7, "schedule": THREE},
            ValueError,
            "keep_ratio or schedule, not both, got",
        ),
        ({"schedule": 0.7}, TypeError, r"schedule must be a KeepSchedule, got 0\.7"),
        ({"schedule": KeepSchedule((4,), (0.5,))}, ValueError, "below the backbone's depth of 4"),
    ],
)
def test_a_bad_request_to_sparsify_is_refused(
    options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        sparsify(DENSE, **options)


def test_a_model_that_cannot_have_scorers_is_refused() -> None:
    sparse = sparsify(DENSE, keep_ratio=0.7)
    with pytest.raises(TypeError, match="model must be dense, got a SparseViT"):
        sparsify(sparse, keep_ratio=0.7)
    with pytest.raises(ValueError, match="scorers must be one a stage, 3, got 1"):
        SparseViT(DENSE, THREE, [TokenScorer(32)])
    with pytest.raises(ValueError, match="dim must be a positive multiple of 4, got 30"):
        sparsify(tiny_vit(embed_dim=30), keep_ratio=0.7)


GOOD = torch.ones(2, 16)


@pytest.mark.parametrize(
    ("decisions", "error", "message"),
    [
        ([GOOD, GOOD], ValueError, "decisions must be one a stage, 3, got 2"),
        (torch.ones(3, 2, 16), TypeError, "decisions must be a list of 3 tensors, got Tensor"),
        (5, TypeError, "decisions must be a list of 3 tensors, got int"),
        ([GOOD + 0j] * 3, TypeError, r"decisions\[0\] must be real numbers, got torch.complex64"),
        ([GOOD.to("meta")] * 3, ValueError, r"decisions\[0\] must be on .* cpu, got meta"),
        ((d for d in [GOOD] * 3), TypeError, "must be a list of 3 tensors, got generator"),
        ([GOOD, GOOD, [[1.0]]], TypeError, r"decisions\[2\] must be a tensor, got list"),
        ([GOOD, GOOD[:1], GOOD], ValueError, r"decisions\[1\].*\[2, 16\], got \[1, 16\]"),
        ([GOOD[:, :9], GOOD, GOOD], ValueError, r"decisions\[0\].*\[2, 16\], got \[2, 9\]"),
        ([GOOD[..., None]] * 3, ValueError, r"decisions\[0\].*\[2, 16\], got \[2, 16, 1\]"),
    ],
)
def test_bad_decisions_are_refused(decisions: Any, error: type[Exception], message: str) -> None:
    sparse = sparsify(DENSE, keep_ratio=0.7)
    with pytest.raises(error, match=message):
        sparse.masked(_images(), decisions=decisions)


@torch.no_grad()
def test_a_fused_model_gives_the_same_logits_and_keeps_the_same_tokens() -> None:
    sparse = sparsify(tiny_vit(), keep_ratio=0.7)
    randomise(sparse.scorers)
    fused = sparse.train().fuse()
    assert not fused.training
    images = torch.randn(4, 3, 32, 32)
    expected, pruned = sparse.eval().pruned(images), fused.pruned(images)
    torch.testing.assert_close(pruned.logits, expected.logits)
    for ours, theirs in zip(pruned.keep, expected.keep, strict=True):
        assert torch.equal(ours, theirs)
    compiled = torch.compile(fused, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(images), expected.logits)
    torch.testing.assert_close(fused.masked(images).logits, sparse.masked(images).logits)


def test_a_fused_model_is_not_saved(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="got FusedScorer; of a fused model, save the one it was"):
        sparsify(tiny_vit(), keep_ratio=0.7).fuse().save_pretrained(tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_aligned_models_cost_what_was_asked() -> None:
    with torch.device("meta"):
        dense = timm.create_model("deit_small_patch16_224")
    sparse = sparsify(dense, keep_ratio=0.7, align=16)
    assert sparse.schedule.counts(196) == (143, 95, 63)
    asked = count_gmacs(sparsify(dense, keep_ratio=0.7), (3, 224, 224))
    assert count_gmacs(sparse, (3, 224, 224)) == pytest.approx(asked, rel=0.02)


def test_given_noise_decides_what_is_sampled() -> None:
    sparse = sparsify(DENSE, keep_ratio=0.7).train()
    noise, images = [torch.rand(2, 16) for _ in range(3)], _images()
    one, two = (sparse.masked(images, noise=noise) for _ in range(2))
    for stage in range(3):
        assert torch.equal(one.keep[stage], two.keep[stage])
        drawn = (one.scores[stage] + torch.logit(noise[stage]) > 0).float()
        before = one.keep[stage - 1] if stage else torch.ones(2, 16)
        assert torch.equal(one.keep[stage].detach(), before * drawn)
    sparse.eval()
    assert torch.equal(sparse.masked(images, noise=noise).logits, sparse.masked(images).logits)


def test_temperature_changes_gradients_not_decisions() -> None:
    sparse = sparsify(DENSE, keep_ratio=0.7).train()
    noise, images = [torch.rand(2, 16) for _ in range(3)], _images()
    gradients = []
    for temperature in (1.0, 0.5):
        sparse.zero_grad()
        output = sparse.masked(images, noise=noise, temperature=temperature)
        output.keep[0].sum().backward()
        gradients.append((output.keep[0].detach(), next(sparse.scorers.parameters()).grad))
    assert torch.equal(gradients[0][0], gradients[1][0])
    assert not torch.equal(cast(Any, gradients[0][1]), cast(Any, gradients[1][1]))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"noise": [GOOD] * 2}, ValueError, "noise must be one a stage, 3, got 2"),
        ({"noise": GOOD}, TypeError, "noise must be a list of 3 tensors, got Tensor"),
        ({"noise": [GOOD, GOOD, GOOD[:1]]}, ValueError, r"noise\[2\] must have shape .*\[1, 16\]"),
        ({"threshold": 3}, TypeError, "threshold must be a function, got 3"),
        ({"temperature": 0.0}, ValueError, r"temperature must be above 0, got 0\.0"),
        ({"temperature": float("nan")}, ValueError, "temperature must be above 0, got nan"),
    ],
)
def test_bad_sampling_options_are_refused(
    options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        sparsify(DENSE, keep_ratio=0.7).train().masked(_images(), **options)


# Another budget.


def test_another_budget_shares_all_weights() -> None:
    sparse, images = tiny_sparse(), _images()
    own = {id(tensor) for tensor in sparse.parameters()}
    before = sparse(images)
    half = sparse.at(keep_ratio=0.5)
    assert half.schedule.blocks == sparse.schedule.blocks
    assert half.schedule.ratios == (0.5, 0.25, 0.125)
    assert {id(tensor) for tensor in half.parameters()} == own
    fresh = SparseViT(sparse.backbone, half.schedule, sparse.scorers)
    assert torch.equal(half(images), fresh(images))
    assert torch.equal(sparse(images), before)
    torch.testing.assert_close(sparse.at(keep_ratio=1.0)(images), sparse.backbone(images))
    assert half.training == sparse.training
    sparse.train().backbone.norm.eval()
    assert sparse.at(keep_ratio=0.5).training
    assert not sparse.backbone.norm.training, "the shared parts stay as they are"


def test_another_budget_takes_the_scorers_of_its_stages() -> None:
    sparse = tiny_sparse()
    last = sparse.schedule.blocks[-1]
    alone = sparse.at(schedule=KeepSchedule((last,), (0.5,)))
    assert list(alone.scorers) == [sparse.scorers[-1]]
    outer = sparse.at(schedule=KeepSchedule((sparse.schedule.blocks[0], last), (0.8, 0.4)))
    assert list(outer.scorers) == [sparse.scorers[0], sparse.scorers[-1]]
    moved = sparse.at(schedule=KeepSchedule((0, 1, 2), (0.9, 0.8, 0.7)))
    assert list(moved.scorers) == list(sparse.scorers)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({}, ValueError, "give one of keep_ratio, schedule and gmacs, got keep_ratio=None"),
        (
            {"keep_ratio": 0.5, "schedule": KeepSchedule((1,), (0.5,))},
            ValueError,
            "give one of keep_rat",
        ),
        ({"keep_ratio": 0}, ValueError, r"keep_ratio must lie in \(0, 1\], got 0"),
        ({"keep_ratio": "a"}, TypeError, "keep_ratio must be a number.*got 'a'"),
        ({"schedule": (1, 2)}, TypeError, r"schedule must be a KeepSchedule, got \(1, 2\)"),
        ({"schedule": KeepSchedule((0,), (0.5,))}, ValueError, r"blocks among .*got \(0,\)"),
        ({"schedule": KeepSchedule((1, 2, 9), (0.5,) * 3)}, ValueError, "depth of 4, got"),
    ],
)
def test_a_budget_that_does_not_fit_is_refused(
    options: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        tiny_sparse().at(**options)
