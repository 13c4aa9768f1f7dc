"""Every rule by its name: counts, prefix tokens, agreement of paths, gradients, files, programs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast

import pytest
import timm
import torch
from hypothesis import given
from hypothesis import strategies as st
from timm.models import vision_transformer as vit
from torch import Tensor, nn

from dynamicvit import KeepSchedule, SparseViT, count_gmacs, explain, load, sparsify
from dynamicvit.core.backbones import Adapter, UnsupportedBackbone, adapter_of
from dynamicvit.core.backbones.attention import class_attention
from dynamicvit.core.selectors import SELECTORS, Stage, create, name_of
from dynamicvit.core.selectors.learned import TokenScorer
from dynamicvit.core.selectors.merging import SimilarityMerger, merge_similar, pooling_shares
from dynamicvit.core.selectors.rules import ClassAttentionScorer, RandomScorer, StaticScorer
from dynamicvit.core.tokens import Tokens, keep_mask, key_bias
from dynamicvit.deploy.export import export_model
from dynamicvit.io.folder import CONFIG
from dynamicvit.training.config import TrainConfig, complete
from dynamicvit.training.task import SparseTask
from tests.conftest import randomise, tiny_vit

SCHEDULE = KeepSchedule((1, 2, 3), (0.7, 0.4, 0.15))  # 16 → 11 → 6 → 2: the last by more than half
MERGING = ("class_attention_merging", "similarity_merging", "pooling")
CHOOSING = tuple(name for name in SELECTORS if name not in MERGING)
REPEATABLE = tuple(name for name in CHOOSING if name != "random")
ROTARY = "eva02_tiny_patch14_224"


def tiny(scorer: str, name: str = "vit_tiny_patch16_224", **options: Any) -> SparseViT:
    sparse = sparsify(tiny_vit(name, **options), schedule=SCHEDULE, scorer=scorer)
    randomise(sparse.scorers)
    return sparse


def _images(batch: int = 2) -> Tensor:
    return torch.randn(batch, 3, 32, 32)


def _stage(model: Any, x: Tensor, num_kept: int) -> Stage:
    """Before block 1, with one prefix token."""
    return Stage(0, 1, num_kept, Tokens(x, 1, (4, 4)), model, adapter_of(model))


@pytest.mark.parametrize("scorer", SELECTORS)
@pytest.mark.parametrize("prefix", [0, 3])
@torch.no_grad()
def test_as_many_tokens_go_on_as_the_schedule_says_and_prefix_tokens_stay(
    scorer: str, prefix: int
) -> None:
    sparse = tiny(scorer, reg_tokens=prefix)
    assert {type(module) for module in sparse.scorers} == {SELECTORS[scorer]}
    seen: list[int] = []
    for block in sparse.backbone.blocks:
        block.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1]))
    features = sparse.forward_features(_images())
    assert seen == [1 + prefix + count for count in (16, 11, 6, 2)]
    assert features.shape == (2, 1 + prefix + 2, 32)

    # The first stage's block gets the prefix tokens as the block before gave them.
    given: list[Tensor] = []
    sparse.backbone.blocks[0].register_forward_hook(lambda _, args, out: given.append(out))
    sparse.backbone.blocks[1].register_forward_pre_hook(lambda _, args: given.append(args[0]))
    images = _images()
    sparse(images)
    assert torch.equal(given[0][:, : 1 + prefix], given[1][:, : 1 + prefix])


def test_all_cost_about_the_same() -> None:
    with torch.device("meta"):
        dense = timm.create_model("deit_small_patch16_224")
        whole = count_gmacs(dense, (3, 224, 224))
    costs = {}
    for scorer in SELECTORS:
        sparse = sparsify(dense, 0.7, scorer=scorer)
        costs[scorer] = count_gmacs(sparse, (3, 224, 224))
    assert max(costs.values()) < 0.66 * whole
    assert max(costs.values()) - min(costs.values()) < 0.05 * whole


@pytest.mark.parametrize("scorer", REPEATABLE)
@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", ROTARY, "vit_small_patch16_dinov3"])
@torch.no_grad()
def test_both_paths_agree(scorer: str, name: str) -> None:
    sparse, images = tiny(scorer, name), _images()
    pruned = sparse.pruned(images)
    masked = sparse.masked(images, decisions=pruned.keep)
    torch.testing.assert_close(masked.logits, pruned.logits, atol=1e-4, rtol=0)
    for stage in range(3):
        there = pruned.scores[stage].isfinite()
        torch.testing.assert_close(masked.scores[stage][there], pruned.scores[stage][there])
    assert (pruned.logits - sparse.backbone(images)).abs().max() > 1e-3
    if getattr(sparse.scorers[0], "ranks_only", False):  # then no decisions need be given
        for mode in (True, False):
            own = sparse.train(mode).masked(images)
            for ours, theirs in zip(own.keep, pruned.keep, strict=True):
                assert torch.equal(ours, theirs)
            torch.testing.assert_close(own.logits, pruned.logits, atol=1e-4, rtol=0)


@pytest.mark.parametrize("training", [True, False])
@torch.no_grad()
def test_random_choice_takes_the_noise_that_it_is_given(training: bool) -> None:
    """So that each process of many draws what one process would for the same images."""
    sparse, images, noise = tiny("random").train(training), _images(4), torch.rand(3, 4, 16)
    whole = sparse.masked(images, noise=noise.unbind()).keep
    half = sparse.masked(images[2:], noise=noise[:, 2:].unbind()).keep
    assert torch.equal(whole[0], keep_mask(noise[0].topk(11).indices, 16))
    for ours, theirs in zip(half, whole, strict=True):
        assert torch.equal(ours, theirs[2:])


def test_random_choice_keeps_the_count_and_never_brings_back() -> None:
    sparse = tiny("random").train()
    keep = sparse.masked(_images(5)).keep
    assert [mask.sum(dim=1).tolist() for mask in keep] == [[11.0] * 5, [6.0] * 5, [2.0] * 5]
    assert (keep[0] >= keep[1]).all()
    assert not torch.equal(keep[0][0], keep[0][1])


@pytest.mark.parametrize("name", ["vit_tiny_patch16_224", ROTARY, "vit_small_patch16_dinov3"])
@torch.no_grad()
def test_class_attention_is_what_the_block_computes(name: str) -> None:
    model = tiny_vit(name, qk_norm=True) if name == "vit_tiny_patch16_224" else tiny_vit(name)
    adapter = adapter_of(model)
    tokens = adapter.embed(model, _images())
    attn = cast(Any, model.blocks[2]).attn
    attn.fused_attn = False
    weights: list[Tensor] = []
    attn.attn_drop.register_forward_pre_hook(lambda _, args: weights.append(args[0]))
    keep = keep_mask(torch.arange(9).expand(2, -1), 16)
    prefix = model.num_prefix_tokens
    for mask in (None, keep):
        bias = None if mask is None else key_bias(mask)
        if bias is not None:
            bias = nn.functional.pad(bias, (prefix, 0))[:, None, None].expand(
                -1, 1, 16 + prefix, -1
            )
        given = tokens._replace(keep=mask, bias=bias)
        adapter.run_block(model, 2, given)
        expected = weights[-1][:, :, 0, prefix:].mean(dim=1)
        torch.testing.assert_close(class_attention(model, 2, given), expected)


@pytest.mark.parametrize("scorer", SELECTORS)
def test_training_reaches_the_backbone_and_scorers_that_learn(scorer: str) -> None:
    task = SparseTask(tiny(scorer).train(), tiny_vit()).train()
    result = task(_images(4), torch.arange(4))
    result["loss"].backward()
    for name, parameter in task.student.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name
    learns = scorer in ("learned", "static")
    assert bool(list(task.student.scorers.parameters())) == learns
    names = {"loss", "output", "cross_entropy", "logit_kl"}
    more = set() if scorer in MERGING else {"ratio", "token", "kept"}
    assert result.keys() == names | more
    parts = {"cross_entropy": 1.0, "logit_kl": 0.5, "token": 0.5, "ratio": 2.0 / 3}
    total = sum(weight * result[name] for name, weight in parts.items() if name in result)
    torch.testing.assert_close(result["loss"].detach(), total)
    if scorer not in (*MERGING, "learned", "static"):
        assert result["kept"].tolist() == pytest.approx([11 / 16, 6 / 16, 2 / 16])


@pytest.mark.parametrize("scorer", SELECTORS)
def test_bfloat16_is_finite_and_learns(scorer: str) -> None:
    images, labels = _images(4), torch.arange(4)
    task = SparseTask(tiny(scorer).train(), tiny_vit())
    with torch.autocast("cpu", torch.bfloat16):
        loss = task(images, labels)["loss"]
    loss.backward()
    grads = [parameter.grad for parameter in task.student.parameters()]
    assert all(grad is not None and grad.isfinite().all() for grad in grads)
    half = tiny(scorer).bfloat16()(images.bfloat16())
    assert half.dtype == torch.bfloat16
    assert half.isfinite().all()


def test_merging_trains_an_lvvit_on_its_class_head() -> None:
    teacher = tiny_vit("lvvit_small", stem_width=8)
    student = sparsify(teacher, keep_ratio=1.0, scorer="similarity_merging").eval()
    result = SparseTask(student, teacher)(_images(4), torch.arange(4))
    assert result["logit_kl"].item() == pytest.approx(0.0, abs=1e-5)


@pytest.mark.parametrize("scorer", SELECTORS)
@torch.no_grad()
def test_a_saved_model_comes_back_the_same(scorer: str, tmp_path: Path) -> None:
    sparse, images = tiny(scorer), _images()
    sparse.save_pretrained(tmp_path / "model")
    assert json.loads((tmp_path / "model" / CONFIG).read_text())["dynamicvit"]["scorer"] == scorer
    loaded = load(tmp_path / "model")
    assert isinstance(loaded, SparseViT)
    assert name_of(loaded.scorers) == scorer
    torch.manual_seed(1)
    expected = sparse(images)
    torch.manual_seed(1)
    assert torch.equal(loaded(images), expected)


def _edit(folder: Path, **changes: Any) -> None:
    config = json.loads((folder / CONFIG).read_text())
    config["dynamicvit"] |= changes
    (folder / CONFIG).write_text(json.dumps(config))


def test_a_folder_names_its_rule(tmp_path: Path) -> None:
    tiny("learned").save_pretrained(tmp_path)
    _edit(tmp_path, scorer="telepathy")
    with pytest.raises(ValueError, match=r"config\.json: scorer must be one of .*got 'telepathy'"):
        load(tmp_path)
    _edit(tmp_path, scorer=["learned"])
    with pytest.raises(ValueError, match=r"config\.json: scorer must be .*got \['learned'\]"):
        load(tmp_path)
    config = json.loads((tmp_path / CONFIG).read_text())
    del config["dynamicvit"]["scorer"]
    (tmp_path / CONFIG).write_text(json.dumps(config))
    assert name_of(load(tmp_path).scorers) == "learned"


@pytest.mark.parametrize("scorer", SELECTORS)
def test_forward_compiles_whole(scorer: str) -> None:
    sparse, images = tiny(scorer), _images()
    compiled = torch.compile(sparse, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        found, expected = compiled(images), sparse(images)
    assert found.shape == expected.shape
    if scorer != "random":
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("scorer", [name for name in SELECTORS if name != "random"])
def test_programs_of_any_batch_size_are_exported(scorer: str) -> None:
    sparse = tiny(scorer)
    batch = torch.export.Dim("batch", min=1)
    program = torch.export.export(sparse, (_images(2),), dynamic_shapes=({0: batch},))
    images = _images(3)
    with torch.no_grad():
        torch.testing.assert_close(program.module()(images), sparse(images))


@pytest.mark.parametrize("scorer", ["class_attention", "similarity_merging"])
def test_a_training_step_compiles_whole(scorer: str) -> None:
    task = SparseTask(tiny(scorer).train(), tiny_vit())
    compiled = torch.compile(task, fullgraph=True, backend="aot_eager")
    images, labels = _images(4), torch.arange(4)
    losses = [run(images, labels)["loss"].item() for run in (task, compiled)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)


@pytest.mark.parametrize("scorer", ["class_attention", "static"])
def test_choosing_rules_are_exported(scorer: str, tmp_path: Path) -> None:
    done = export_model(tiny(scorer), tmp_path / "model.onnx", samples=8)
    assert done.agreement.kept_agreement == 100.0


def test_what_merging_has_no_answer_for_is_refused() -> None:
    sparse = tiny("similarity_merging")
    assert (sparse.pruned(_images()).keep, sparse.pruned(_images()).scores) == ((), ())
    with pytest.raises(TypeError, match="scorers that choose tokens, got SimilarityMerger"):
        sparse.masked(_images())
    with pytest.raises(ValueError, match="got SimilarityMerger, which merges them"):
        explain(sparse, _images())


@pytest.mark.parametrize("scorer", [*MERGING, "random"])
def test_other_rules_are_not_exported(scorer: str, tmp_path: Path) -> None:
    message = f"deterministic selector .* got {SELECTORS[scorer].__name__}"
    with pytest.raises(ValueError, match=message):
        export_model(tiny(scorer), tmp_path / "model.onnx", precision="int8", images="nowhere")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("scorer", "options", "message"),
    [
        (
            "class_attention",
            {"class_token": False, "global_pool": "avg"},
            "VisionTransformer is not supported by this scorer: it has no class token",
        ),
        (
            "class_attention_merging",
            {"class_token": False, "global_pool": "avg"},
            "it has no class token",
        ),
        (
            "class_attention",
            {"block_fn": vit.ResPostBlock},
            "attention cannot be read from its blocks, ResPostBlock",
        ),
        (
            "similarity_merging",
            {"attn_layer": "diff"},
            "queries and keys cannot be read from DiffAttention",
        ),
        *(
            (
                "similarity_merging",
                {"class_token": False, "global_pool": pool},
                f"with global_pool '{pool}' is not supported by SimilarityMerger: its mean",
            )
            for pool in ("avg", "map")
        ),
        *(
            (
                scorer,
                {"name": ROTARY},
                rf"Eva is not supported by {SELECTORS[scorer].__name__}: .* no",
            )
            for scorer in MERGING
        ),
    ],
)
def test_an_unfit_backbone_is_refused(scorer: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UnsupportedBackbone, match=message):
        sparsify(tiny_vit(**options), schedule=SCHEDULE, scorer=scorer)


def test_a_rule_needs_no_keep_ratio() -> None:
    sparse = sparsify(tiny_vit(), scorer="class_attention")
    assert sparse.schedule == KeepSchedule.from_keep_ratio(0.7, depth=4)


@pytest.mark.parametrize("scorer", ["Learned", "", None, 3])
def test_an_unknown_rule_is_refused(scorer: Any) -> None:
    message = r"scorer must be one of learned, random, static, .*, pooling, got "
    with pytest.raises(ValueError, match=message):
        sparsify(tiny_vit(), 0.7, scorer=scorer)
    kind, match = (
        (ValueError, message) if isinstance(scorer, str) else (TypeError, "scorer must be")
    )
    with pytest.raises(kind, match=match):
        TrainConfig(data="", output="", scorer=scorer)


def test_rules_do_not_mix() -> None:
    modules: list[nn.Module] = [SimilarityMerger(), RandomScorer(), RandomScorer()]
    with pytest.raises(TypeError, match="all choose tokens or all merge them, got SimilarityMer"):
        SparseViT(tiny_vit(), SCHEDULE, modules)
    modules = [TokenScorer(32), RandomScorer(), RandomScorer()]
    mixed = SparseViT(tiny_vit(), SCHEDULE, modules)
    assert mixed(_images()).shape == (2, 5)
    with pytest.raises(TypeError, match="one known kind to be saved, got TokenScorer, RandomScor"):
        mixed.save_pretrained("nowhere")
    assert not Path("nowhere").exists()


@pytest.mark.parametrize("name", ["warm_start", "freeze_epochs"])
def test_what_has_nothing_to_learn_is_not_taught(name: str) -> None:
    options: dict[str, Any] = {"data": "", "output": "", name: 3}
    with pytest.raises(ValueError, match=f"{name} must be 0 with scorer pooling, .* got 3"):
        TrainConfig(scorer="pooling", **options)
    TrainConfig(scorer="static", **options)
    done = complete(TrainConfig(data="", output="", scorer="random"), images=1000, batch=10)
    assert done.freeze_epochs == 0


# The static mask.


@torch.no_grad()
def test_a_static_mask_keeps_the_same_positions_of_every_image() -> None:
    sparse = tiny("static")
    keep = sparse.pruned(_images(3)).keep
    assert all(torch.equal(mask[0], mask[1]) and torch.equal(mask[0], mask[2]) for mask in keep)
    weight = cast(StaticScorer, sparse.scorers[0]).weight
    assert torch.equal(keep[0][0], keep_mask(weight.topk(11).indices[None], 16)[0])


def test_a_static_mask_starts_at_the_ratio_and_its_gradient_has_a_direction() -> None:
    scorer = StaticScorer(16)
    scorer.set_keep_prior(0.7)
    odds = scorer.weight.detach() * StaticScorer.SCALE
    assert odds.mean().sigmoid().item() == pytest.approx(0.7)
    assert odds.std() > 0, "ties would be broken by accident"


def test_a_static_mask_is_for_one_size() -> None:
    model = tiny_vit()
    cast(Any, model.patch_embed).num_patches = None
    with pytest.raises(ValueError, match="must not be static for images of any size, got 'static'"):
        create("static", model, 3)
    sparse = tiny("static", dynamic_img_size=True)
    with pytest.raises(ValueError, match="images of 16 patches, got 6×5"):
        sparse(torch.randn(1, 3, 48, 40))
    larger = tiny_vit(img_size=48)
    with pytest.raises(ValueError, match="must be for images of 36 patches, got one for 16"):
        SparseViT(larger, sparse.schedule, sparse.scorers)


# Merging.


@given(
    seed=st.integers(0, 1000),
    tokens=st.integers(2, 13),
    share=st.floats(0.0, 1.0),
    same=st.booleans(),
)
@torch.no_grad()
def test_merging_keeps_the_sum(seed: int, tokens: int, share: float, same: bool) -> None:
    """Nothing is lost: sizes sum to what they did, and so do tokens times sizes."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(3, tokens, 4, generator=generator)
    keys = torch.ones(3, tokens, 2) if same else torch.randn(3, tokens, 2, generator=generator)
    sizes = torch.randint(1, 5, (3, tokens), generator=generator).float()
    count = 1 + round(share * (tokens - 1))
    merged, grown = merge_similar(x, keys, sizes, count)
    assert merged.shape == (3, count, 4)
    assert grown.shape == (3, count)
    torch.testing.assert_close(grown.sum(dim=1), sizes.sum(dim=1))
    before, after = ((a * b[..., None]).sum(dim=1) for a, b in ((x, sizes), (merged, grown)))
    torch.testing.assert_close(after, before, atol=1e-4, rtol=0)


@torch.no_grad()
def test_the_most_similar_merge() -> None:
    # 0 and 3 point the same way, 2 and 1 nearly; 4 has no like
    keys = torch.tensor([[[1.0, 0], [0, 1], [0.1, 1], [2, 0], [-1, -1]]])
    x = torch.arange(5.0).view(1, 5, 1)
    merged, sizes = merge_similar(x, keys, torch.tensor([[1.0, 1, 1, 3, 1]]), 4)
    found = sorted(zip(merged.flatten().tolist(), sizes.flatten().tolist(), strict=True))
    assert found == [(1, 1), (2, 1), (2.25, 4), (4, 1)]
    merged, _ = merge_similar(x, keys, torch.tensor([[1.0, 1, 1, 3, 1]]), 3)
    assert sorted(merged.flatten().tolist()) == [1.5, 2.25, 4]


@torch.no_grad()
def test_attention_counts_a_token_as_often_as_its_size_says(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Tokens in equal pairs: merging them changes nothing for the others."""
    model = tiny_vit()
    first, half = torch.randn(2, 1, 32), torch.randn(2, 8, 32)
    x = torch.cat([first, half.repeat_interleave(2, dim=1)], dim=1)
    adapter = adapter_of(model)
    stage = _stage(model, x, 8)
    merged, sizes = SimilarityMerger()(x[:, 1:], None, stage)
    assert torch.equal(sizes, torch.full((2, 8), 2.0))
    bias = nn.functional.pad(sizes.log(), (1, 0))[:, None, None]
    tokens = Tokens(torch.cat([first, merged], dim=1), 1, (4, 4), bias=bias)
    short = adapter.run_block(model, 1, tokens)
    expected = adapter.run_block(model, 1, stage.tokens)[:, 0]
    torch.testing.assert_close(short[:, 0], expected)
    # which is the bias's doing, and which a SparseViT gives
    plain = adapter.run_block(model, 1, tokens._replace(x=tokens.x[:, :5], bias=None))
    assert (plain[:, 0] - expected).abs().max() > 1e-3
    given: list[Tensor] = []
    sparse = tiny("similarity_merging")
    run = Adapter.run_block

    def note(self: Adapter, model: Any, block: int, tokens: Tokens) -> Tensor:
        given.append(cast(Tensor, tokens.bias))
        return run(self, model, block, tokens)

    monkeypatch.setattr(Adapter, "run_block", note)
    sparse(_images())
    assert given[0] is None
    assert [mask.shape[-1] for mask in given[1:]] == [12, 7, 3]
    for mask in given[1:]:
        assert torch.equal(mask[..., 0], torch.zeros(2, 1, 1))
        torch.testing.assert_close(mask[..., 1:].exp().sum(dim=-1), torch.full((2, 1, 1), 16.0))


@pytest.mark.parametrize("rank", [0, 3])
@torch.no_grad()
def test_similarity_merging_is_what_a_slow_loop_computes(rank: int) -> None:
    """The whole model, image by image and pair by pair, with blocks written out."""
    sparse = tiny("similarity_merging", reg_tokens=rank).eval()
    model, images = cast(Any, sparse.backbone), _images()
    prefix = 1 + rank
    for image, expected in zip(images, sparse(images), strict=True):
        rows = list(sparse.adapter.embed(model, image[None]).x[0])
        sizes = [1.0] * len(rows)
        for index, block in enumerate(model.blocks):
            if index in SCHEDULE.blocks:
                count = SCHEDULE.counts(16)[SCHEDULE.blocks.index(index)]
                keys = [_slow_heads(block, row)[1].mean(0) for row in rows]
                while len(rows) - prefix > count:
                    _slow_round(rows, sizes, keys, prefix, count)
            heads = [_slow_heads(block, row) for row in rows]
            after = []
            for row, (query, _, _) in zip(rows, heads, strict=True):
                logits = torch.stack([(query * key).sum(-1) for _, key, _ in heads])  # [n, heads]
                weight = (logits * query.shape[-1] ** -0.5).exp() * torch.tensor(sizes)[:, None]
                values = torch.stack([value for _, _, value in heads])
                mixed = (weight[..., None] * values).sum(0) / weight.sum(0)[:, None]
                row = row + block.ls1(block.attn.proj(mixed.flatten()))
                after.append(row + block.ls2(block.mlp(block.norm2(row))))
            rows = after
        found = model.forward_head(model.norm(torch.stack(rows))[None])[0]
        torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)


def _slow_heads(block: Any, row: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Query, key and value of one token, [heads, D] each."""
    query, key, value = block.attn.qkv(block.norm1(row)).view(3, block.attn.num_heads, -1)
    return query, key, value


def _slow_round(
    rows: list[Tensor], sizes: list[float], keys: list[Tensor], prefix: int, count: int
) -> None:
    """Merge even patch tokens into odd ones, the most similar pairs first, down to `count`."""
    even, odd = range(prefix, len(rows), 2), range(prefix + 1, len(rows), 2)
    pairs = []
    for left in even:
        cosines = [
            float(keys[left] @ keys[right] / keys[left].norm() / keys[right].norm())
            for right in odd
        ]
        best = max(range(len(cosines)), key=cosines.__getitem__)
        pairs.append((cosines[best], left, odd[best]))
    merged = sorted(pairs, reverse=True)[: len(rows) - prefix - count]
    gone = {left for _, left, _ in merged}
    for right in odd:
        group = [right] + [left for _, left, target in merged if target == right]
        total = sum(sizes[member] for member in group)
        for values in (rows, keys):
            mean = torch.stack([values[member] * (sizes[member] / total) for member in group])
            values[right] = mean.sum(0)
        sizes[right] = total
    stay = [*range(prefix), *(left for left in even if left not in gone), *odd]
    # In ToMe's order: what is left of the even ones, then the odd ones. In the order of their
    # similarity here, which decides who is even in the next round.
    order = {left: rank for rank, (_, left, _) in enumerate(sorted(pairs, reverse=True))}
    stay.sort(key=lambda at: (at >= prefix, at in odd, order.get(at, at)))
    everything: tuple[list[Any], ...] = (rows, sizes, keys)
    for each in everything:
        each[:] = [each[at] for at in stay]


@torch.no_grad()
def test_what_is_dropped_is_merged_by_attention() -> None:
    sparse, images = tiny("class_attention_merging"), _images()
    x = sparse.adapter.embed(sparse.backbone, images).x
    stage = _stage(sparse.backbone, x, 5)
    attention = ClassAttentionScorer()(x[:, 1:], None, stage)
    merged, sizes = sparse.scorers[0](x[:, 1:], None, stage)
    for image in range(2):
        order = attention[image].argsort(descending=True)
        torch.testing.assert_close(merged[image, :4], x[image, 1 + order[:4]])
        share = attention[image, order[4:], None] / attention[image, order[4:]].sum()
        torch.testing.assert_close(merged[image, 4], (share * x[image, 1 + order[4:]]).sum(0))
    assert sizes.tolist() == [[1.0] * 4 + [12.0]] * 2


@given(
    rows=st.integers(1, 9),
    columns=st.integers(1, 9),
    before=st.floats(0, 1),
    after=st.floats(0, 1),
)
def test_pooling_averages_all_of_the_area(
    rows: int, columns: int, before: float, after: float
) -> None:
    n = 1 + round(before * (rows * columns - 1))
    k = 1 + round(after * (n - 1))
    share = pooling_shares(n, k, (rows, columns))
    assert share.shape == (k, n)
    assert (share >= 0).all()
    torch.testing.assert_close(share.sum(dim=1), torch.ones(k))
    assert (share.sum(dim=0) > 0).all(), "a token that goes nowhere"
    torch.testing.assert_close(pooling_shares(n, n, (rows, columns)), torch.eye(n))


def test_with_a_quarter_of_an_even_grid_it_is_pooling_of_two_by_two() -> None:
    grid = torch.randn(1, 3, 6, 8)
    expected = nn.functional.avg_pool2d(grid, 2).flatten(2)
    found = pooling_shares(48, 12, (6, 8)) @ grid.flatten(2).transpose(1, 2)
    torch.testing.assert_close(found.transpose(1, 2), expected)
