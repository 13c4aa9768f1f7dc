"""SparseViT: a dense timm ViT plus scorers, and the two ways to run it."""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any, NamedTuple, cast, overload

import torch
from timm.models.deit import VisionTransformerDistilled
from torch import Tensor, nn

from dynamicvit.core import backbone as adapter
from dynamicvit.core.baselines import Merger, Place, PlacedScorer, check_scorer, create_scorers
from dynamicvit.core.schedule import KeepSchedule
from dynamicvit.core.scorer import FusedScorer, RandomScorer, TokenScorer
from dynamicvit.core.tokens import (
    attention_bias,
    gather_tokens,
    keep_mask,
    sample_keep,
    threshold_keep,
    topk_keep,
)

if TYPE_CHECKING:
    from dynamicvit.io.predictions import ImageSource, Prediction


class SparseOutput(NamedTuple):
    """What `SparseViT.masked` and `SparseViT.pruned` return.

    Attributes:
        logits: [B, num_classes]; from `masked`, what cross-entropy sees: of an LV-ViT the class
            head's alone.
        tokens: what the token loss sees: patch tokens after the final norm, or an LV-ViT's
            auxiliary logits. [B, N, C] from `masked`, [B, K, C] (the kept ones) from `pruned`.
        keep: for each stage, [B, N] float: 1 where a token is still there, 0 where it has left.
            Empty, as `scores` is, where tokens are merged.
        scores: for each stage, [B, N]: log-odds of keeping. From `pruned`, tokens that had left
            before a stage have score -inf there.
    """

    logits: Tensor
    tokens: Tensor
    keep: tuple[Tensor, ...]
    scores: tuple[Tensor, ...]


class SparseViT(nn.Module):
    """A vision transformer whose uninformative patch tokens leave on the way.

    Made by `sparsify`; `forward` really removes tokens, `masked` only blocks them (for training).
    `train()` and `eval()` change dropout and sampling noise, never the algorithm.

    Args:
        backbone: a timm VisionTransformer or Eva, used as it is (not copied).
        schedule: where tokens leave and how many stay.
        scorers: one module a stage, [B, N, C] tokens (and optionally a [B, N] keep mask) → [B, N]
            scores; or the name of a rule in `dynamicvit.core.baselines`, whose new modules then
            serve. Those with an attribute `ranks_only` that is true give no log-odds: `masked`
            then keeps the best, as many as the schedule says.

    Raises:
        UnsupportedBackbone: if the backbone is not understood.
        TypeError, ValueError: if the schedule does not fit it, or the scorers the schedule.

    Source: DynamicViT, arXiv 2106.02034.
    """

    def __init__(
        self,
        backbone: nn.Module,
        schedule: KeepSchedule,
        scorers: Sequence[nn.Module] | str = "learned",
    ) -> None:
        super().__init__()
        adapter.check_backbone(backbone)
        model = cast(adapter.Backbone, backbone)
        if not isinstance(schedule, KeepSchedule):
            raise TypeError(f"schedule must be a KeepSchedule, got {schedule!r}")
        schedule.check_depth(len(model.blocks))
        num_patches = model.patch_embed.num_patches
        if num_patches is not None:
            schedule.counts(num_patches)  # refuses a schedule that keeps no token, here not later
        if isinstance(scorers, str):
            scorers = create_scorers(scorers, model, schedule)
        if len(scorers) != len(schedule.blocks):
            raise ValueError(
                f"scorers must be one a stage, {len(schedule.blocks)}, got {len(scorers)}"
            )
        for scorer in scorers:
            if isinstance(scorer, Merger | PlacedScorer):
                scorer.check(model)
        if len({isinstance(scorer, Merger) for scorer in scorers}) > 1:
            kinds = ", ".join(type(scorer).__name__ for scorer in scorers)
            raise TypeError(f"scorers must all choose tokens or all merge them, got {kinds}")
        if isinstance(model, VisionTransformerDistilled):
            model.set_distilled_training(False)  # it would return two logits in train()
        self.backbone = model
        self.scorers = nn.ModuleList(scorers).train(model.training)
        self.schedule = schedule
        self.training = model.training
        self.kept_gradients = False

    # The two ways to run it.

    def forward(self, images: Tensor) -> Tensor:
        """Classify, with tokens really leaving.

        Args:
            images: [B, in_chans, H, W], normalised as `pretrained_cfg` says, floating point.

        Returns:
            [B, num_classes] logits.

        Raises:
            TypeError, ValueError: if `images` has the wrong type, rank, channels or size.
        """
        return self.forward_head(self.forward_features(images))

    def forward_features(self, images: Tensor) -> Tensor:
        """Prefix and kept patch tokens after the final norm: [B, P + K, C]."""
        return self._run_pruned(images)[0]

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Pool and classify the tokens that `forward_features` gave, as timm's models do."""
        return self.backbone.forward_head(x, pre_logits=pre_logits)

    def pruned(self, images: Tensor) -> SparseOutput:
        """`forward`, and also says which tokens stayed. Arguments and errors as there.

        >>> import timm
        >>> sparse = sparsify(timm.create_model("vit_tiny_patch16_224"), keep_ratio=0.7).eval()
        >>> [int(keep.sum()) for keep in sparse.pruned(torch.randn(1, 3, 224, 224)).keep]
        [137, 96, 67]
        """
        x, stages, num_tokens = self._run_pruned(images, trace=True)
        tokens = adapter.masked_head(self.backbone, x)[1]
        scores = tuple(
            torch.full(
                (len(score), num_tokens), float("-inf"), dtype=score.dtype, device=score.device
            ).scatter(1, present, score)
            for present, score, _ in stages
        )
        keep = tuple(keep_mask(index, num_tokens) for _, _, index in stages)
        return SparseOutput(self.forward_head(x), tokens, keep, scores)

    def masked(
        self,
        images: Tensor,
        decisions: Sequence[Tensor] | None = None,
        *,
        noise: Sequence[Tensor] | None = None,
        temperature: float = 1.0,
    ) -> SparseOutput:
        """Classify with every token present and dropped ones blocked inside attention.

        This is the differentiable path that training uses. Decisions are drawn from the scorers:
        by straight-through Gumbel sampling in `train()`, by threshold at probability one half in
        `eval()`; so the number of kept tokens varies from image to image. Scorers that only rank
        (random, class attention) have nothing to learn: their best are kept, as in the pruned path,
        and gradients go to the backbone alone.

        Args:
            images: as for `forward`.
            decisions: raw keep decisions to use instead, one [B, N] tensor a stage, with values in
                [0, 1], which is not checked (it would wait for the GPU); stage s keeps the product
                of the first s + 1.
            noise: uniform draws in [0, 1) for the sampling, and for random scorers, in place of
                fresh ones: one [B, N] tensor a stage. In `eval()`, where nothing is sampled, they
                are for random scorers alone.
            temperature: of the sampling's relaxation, > 0: low ones have sharper gradients.

        Raises:
            TypeError, ValueError: as for `forward`, and for decisions or noise of the wrong number
                or shape; for float16, in which the attention bias loses its gradient; and for a
                model that merges tokens: the pruned path, differentiable then, is its only one.
        """
        if self.merges:
            kind = type(self.scorers[0]).__name__
            raise TypeError(
                f"masked needs scorers that choose tokens, got {kind}, which merges them"
            )
        if not temperature > 0:
            raise ValueError(f"temperature must be above 0, got {temperature}")
        from dynamicvit.training.kept_gradients import KeptGradients

        model = self.backbone
        adapter.check_images(model, images)
        x, rope = adapter.embed(model, images)
        _check_masked_dtype(x)
        num_prefix = model.num_prefix_tokens
        num_tokens = x.shape[1] - num_prefix
        if decisions is not None:
            decisions = self._check_stages("decisions", decisions, len(x), num_tokens)
        if noise is not None:
            noise = self._check_stages("noise", noise, len(x), num_tokens)
        counts = self.schedule.counts(num_tokens)
        positions = torch.arange(num_tokens, device=x.device).expand(len(x), -1)
        grid = _grid(model, images)
        keep = x.new_ones(len(x), num_tokens, dtype=torch.float32)
        bias: Tensor | None = None
        save = self.kept_gradients and not (
            model.grad_checkpointing or torch.compiler.is_compiling()
        )
        learn_from: AbstractContextManager[Any] = KeptGradients() if save else nullcontext()
        keeps: list[Tensor] = []
        scores: list[Tensor] = []
        for index in range(len(model.blocks)):
            if index in self.schedule.blocks:
                stage = len(keeps)
                draws = None if noise is None else noise[stage]
                if isinstance(self.scorers[stage], RandomScorer) and draws is not None:
                    score = draws
                else:
                    score = self.score(stage, Place(model, index, x, rope, positions, grid), keep)
                if decisions is not None:
                    decision = decisions[stage].float()
                elif getattr(self.scorers[stage], "ranks_only", False):
                    there = score.detach().masked_fill(keep < 0.5, float("-inf"))
                    decision = keep_mask(topk_keep(there, counts[stage]), num_tokens)
                elif self.training:
                    decision = sample_keep(score, draws, temperature)
                else:
                    decision = threshold_keep(score)
                keep = keep * decision
                bias = attention_bias(keep, num_prefix).to(x.dtype)
                keeps.append(keep)
                scores.append(score)
                if save:
                    learn_from = KeptGradients(nn.functional.pad(keep, (num_prefix, 0), value=1.0))
            with learn_from:
                x = adapter.run_block(model, index, x, rope, bias)
        logits, tokens = adapter.masked_head(model, model.norm(x), keep)
        return SparseOutput(logits, tokens, tuple(keeps), tuple(scores))

    def _run_pruned(
        self, images: Tensor, trace: bool = False
    ) -> tuple[Tensor, list[tuple[Tensor, Tensor, Tensor]], int]:
        """Final tokens; with `trace`, for each stage the original positions of the tokens present,
        their scores, and the original positions of those kept (nothing, where tokens are merged);
        and N."""
        model = self.backbone
        adapter.check_images(model, images)
        x, rope = adapter.embed(model, images)
        num_prefix = model.num_prefix_tokens
        num_tokens = x.shape[1] - num_prefix
        counts = self.schedule.counts(num_tokens)
        stages: list[tuple[Tensor, Tensor, Tensor]] = []
        present = torch.arange(num_tokens, device=x.device).expand(len(x), -1)
        prefix = torch.arange(num_prefix, device=x.device).expand(len(x), -1)
        places = trace or any(isinstance(scorer, PlacedScorer) for scorer in self.scorers)
        grid = _grid(model, images)
        sizes = x.new_ones(len(x), num_tokens)
        bias: Tensor | None = None
        stage = 0
        for index in range(len(model.blocks)):
            if index in self.schedule.blocks:
                scorer, count = self.scorers[stage], counts[stage]
                place = Place(model, index, x, rope, present, grid)
                # A stage that keeps everything changes nothing: no need to ask its scorer.
                if isinstance(scorer, Merger):
                    if count < x.shape[1] - num_prefix:
                        patches, sizes = scorer(x[:, num_prefix:], count, sizes, place)
                        x = torch.cat([x[:, :num_prefix], patches], dim=1)
                        if scorer.weighs:
                            weight = nn.functional.pad(sizes.log(), (num_prefix, 0))
                            bias = weight[:, None, None, :].to(x.dtype)
                elif trace or count < x.shape[1] - num_prefix:
                    score = self.score(stage, place)
                    kept = topk_keep(score, count)
                    x = gather_tokens(x, torch.cat([prefix, kept + num_prefix], dim=1))
                    if rope is not None:
                        rope = adapter.gather_rope(rope, kept)
                    if places:
                        before, present = present, gather_tokens(present, kept)
                    if trace:
                        stages.append((before, score, present))
                stage += 1
            x = adapter.run_block(model, index, x, rope, bias)
        return model.norm(x), stages, num_tokens

    def score(self, stage: int, place: Place, keep: Tensor | None = None) -> Tensor:
        """A stage's scores, [B, n], of the patch tokens at `place`; `keep` tells which are there,
        if not all."""
        scorer = self.scorers[stage]
        patches = place.x[:, self.backbone.num_prefix_tokens :]
        if isinstance(scorer, PlacedScorer):
            return cast(Tensor, scorer(patches, keep, place))
        return cast(Tensor, scorer(patches) if keep is None else scorer(patches, keep))

    @property
    def merges(self) -> bool:
        """Whether tokens are merged, not chosen."""
        return isinstance(self.scorers[0], Merger)

    def _check_stages(
        self, name: str, values: Sequence[Tensor], batch: int, num_tokens: int
    ) -> Sequence[Tensor]:
        stages = len(self.schedule.blocks)
        if isinstance(values, Tensor) or not isinstance(values, Sequence):
            raise TypeError(
                f"{name} must be a list of {stages} tensors, got {type(values).__name__}"
            )
        if len(values) != stages:
            raise ValueError(f"{name} must be one a stage, {stages}, got {len(values)}")
        for stage, value in enumerate(values):
            if not isinstance(value, Tensor):
                raise TypeError(f"{name}[{stage}] must be a tensor, got {type(value).__name__}")
            if tuple(value.shape) != (batch, num_tokens):
                raise ValueError(
                    f"{name}[{stage}] must have shape [B, N] = [{batch}, {num_tokens}], "
                    f"got {list(value.shape)}"
                )
        return values

    # From files, and to files.

    @overload  # a str is a sequence of str too, and read as a path
    def predict(self, image: ImageSource, top_k: int = 5) -> list[Prediction]: ...  # type: ignore[overload-overlap]
    @overload
    def predict(self, image: Sequence[ImageSource], top_k: int = 5) -> list[list[Prediction]]: ...
    def predict(
        self, image: ImageSource | Sequence[ImageSource], top_k: int = 5
    ) -> list[Prediction] | list[list[Prediction]]:
        """Classify image files: `sparse.predict("cat.jpg")[0].name`.

        Args:
            image: a path, a PIL image, or a sequence of these; prepared as `pretrained_cfg` says.
            top_k: how many classes to give; all, if the model has fewer.

        Returns:
            The `top_k` likeliest classes, `Prediction(name, index, probability)`, best first; for a
            sequence, a list of such lists.

        Raises:
            FileNotFoundError: if there is no such file.
            TypeError, ValueError: if an image cannot be read, or naming a bad argument.
        """
        from dynamicvit.io.predictions import predict

        return predict(self, image, top_k)

    def save_pretrained(
        self, folder: str | os.PathLike[str], class_names: Sequence[str] | None = None
    ) -> None:
        """Write `config.json` and `model.safetensors` into `folder`, for `dynamicvit.load`.

        Arguments and errors as for `dynamicvit.io.folder.save_folder`.
        """
        from dynamicvit.io.folder import save_folder

        save_folder(self, folder, class_names)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool = False,
        token: str | None = None,
        commit_message: str | None = None,
        class_names: Sequence[str] | None = None,
    ) -> str:
        """Upload the model to the Hugging Face Hub, for `dynamicvit.load(repo_id)`.

        Returns the repository's address. Arguments and errors as for
        `dynamicvit.io.hub.push_to_hub`.
        """
        from dynamicvit.io.hub import push_to_hub

        return push_to_hub(
            self,
            repo_id,
            private=private,
            token=token,
            commit_message=commit_message,
            class_names=class_names,
        )

    # What timm's tools look for.

    @property
    def num_classes(self) -> int:
        return self.backbone.num_classes

    @property
    def num_features(self) -> int:
        return self.backbone.num_features

    @property
    def head_hidden_size(self) -> int:
        return self.backbone.head_hidden_size

    @property
    def embed_dim(self) -> int:
        return self.backbone.embed_dim

    @property
    def in_chans(self) -> int:
        return self.backbone.in_chans

    @property
    def num_prefix_tokens(self) -> int:
        return self.backbone.num_prefix_tokens

    @property
    def global_pool(self) -> str:
        return self.backbone.global_pool

    @property
    def patch_embed(self) -> nn.Module:
        return self.backbone.patch_embed

    @property
    def _traits(self) -> dict[str, Any]:  # where timm looks up the input size
        return getattr(self.backbone, "_traits", {})

    @property
    def pretrained_cfg(self) -> dict[str, Any]:
        return getattr(self.backbone, "pretrained_cfg", {})

    @property
    def default_cfg(self) -> dict[str, Any]:
        return self.pretrained_cfg

    def get_classifier(self) -> nn.Module:
        return self.backbone.get_classifier()

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classification head (and, if given, the pooling)."""
        if global_pool is not None:
            adapter.check_pooling(global_pool)
        try:
            self.backbone.reset_classifier(num_classes, global_pool)
        except AssertionError as error:
            raise ValueError(f"global_pool does not fit: {error} Got {global_pool!r}") from error

    def fuse(self) -> SparseViT:
        """A copy for inference, in eval mode, whose scorers take fewer operations.

        Its logits and kept tokens are those of this model, up to rounding. Save this model, not
        the copy.
        """
        fused = copy.deepcopy(self).eval()
        for stage, scorer in enumerate(fused.scorers):
            if type(scorer) is TokenScorer:  # a subclass may score otherwise
                fused.scorers[stage] = FusedScorer(scorer).eval()
        return fused

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.backbone.set_grad_checkpointing(enable)

    def set_kept_gradients(self, enable: bool = True) -> None:
        """Leave out of `masked`'s backward pass what dropped tokens receive.

        It takes less time and memory on a CPU. For a loss that sees logits, kept tokens and
        decisions, as the paper's do, gradients stay the same up to rounding: to the others a
        dropped token is worth e⁻²⁸ of itself. (But in a model without prefix tokens an image that
        keeps nothing teaches later blocks nothing.)

        Has no effect where `masked` is compiled by torch.compile, nor with gradient checkpointing
        as `set_grad_checkpointing` switches it on. There are no second-order gradients.
        """
        self.kept_gradients = enable

    def set_input_size(self, img_size: tuple[int, int]) -> None:
        """Change the input height and width in pixels; timm resamples position embeddings."""
        self.backbone.set_input_size(img_size=img_size)

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """How timm's optimisers find layers, for a learning rate that decays with depth."""
        tokens = "cls_token|dist_token|reg_token|pos_embed|patch_embed|norm_pre|rope"
        return {
            "stem": rf"^backbone\.(?:{tokens})",
            "blocks": [(r"^backbone\.blocks\.(\d+)", None), (r".*", (99999,))],
        }

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that weight decay should leave alone."""
        return {f"backbone.{name}" for name in self.backbone.no_weight_decay()}


def sparsify(
    model: nn.Module,
    keep_ratio: float | None = None,
    *,
    schedule: KeepSchedule | None = None,
    align: int | None = None,
    scorer: str = "learned",
) -> SparseViT:
    """Turn a trained dense ViT into a SparseViT: its weights, unchanged, plus untrained scorers.

    Args:
        model: a timm VisionTransformer or Eva; it is copied, not modified.
        keep_ratio: share of tokens each of three evenly spaced stages keeps, in (0, 1]; the paper's
            models use 0.9, 0.8, 0.7 and 0.5. By default 0.7. At 1.0 the result returns the dense
            model's logits.
        schedule: the stages in full, instead of `keep_ratio`.
        align: round the kept counts, prefix tokens included, to multiples of this, where matrix
            engines like it (16, for example), at a cost within 2% of what was asked for.
        scorer: what decides, "learned" or another rule to compare with. class_attention,
            class_attention_merging, similarity_merging and pooling are of use without training;
            random and static hardly are. similarity_merging needs a head on the class token.
            Sources: arXiv 2202.07800 (EViT), 2210.09461 (ToMe).

    Raises:
        UnsupportedBackbone: if the model is not understood, saying why.
        TypeError, ValueError: naming the argument and what was got.

    >>> import timm
    >>> dense = timm.create_model("deit_small_patch16_224")
    >>> sparse = sparsify(dense, keep_ratio=0.7)
    >>> sparse.schedule.counts(196)
    (137, 96, 67)
    >>> sparse.eval()(torch.randn(2, 3, 224, 224)).shape
    torch.Size([2, 1000])
    """
    if isinstance(model, SparseViT):
        raise TypeError("model must be dense, got a SparseViT; its dense part is `.backbone`")
    adapter.check_backbone(model)
    check_scorer(scorer)
    if keep_ratio is not None and schedule is not None:
        raise ValueError(
            f"give keep_ratio or schedule, not both, got keep_ratio={keep_ratio!r} "
            f"and schedule={schedule!r}"
        )
    if schedule is None:
        ratio = 0.7 if keep_ratio is None else keep_ratio
        depth = len(cast(adapter.Backbone, model).blocks)
        schedule = KeepSchedule.from_keep_ratio(ratio, depth=depth)
    if align is not None:
        schedule = _aligned(schedule, cast(adapter.Backbone, model), align)
    return SparseViT(copy.deepcopy(model), schedule, scorer)


def _aligned(schedule: KeepSchedule, model: adapter.Backbone, align: int) -> KeepSchedule:
    num_tokens = model.patch_embed.num_patches
    if num_tokens is None:
        raise ValueError(f"align needs a model of a fixed input size, got {align}")
    depth = len(model.blocks)
    # Every matrix of a block meets every token once; attention, each pair of tokens twice.
    matrices = [weight.numel() for weight in model.blocks.parameters() if weight.ndim == 2]
    per_token = sum(matrices) / depth

    def block_cost(tokens: int) -> float:
        return tokens * per_token + 2 * tokens**2 * model.embed_dim

    return schedule.aligned(align, num_tokens, model.num_prefix_tokens, depth, block_cost)


def _grid(model: adapter.Backbone, images: Tensor) -> tuple[int, int]:
    """Rows and columns of patches."""
    rows, columns = model.patch_embed.dynamic_feat_size((images.shape[-2], images.shape[-1]))
    return rows, columns


def _check_masked_dtype(x: Tensor) -> None:
    device = x.device.type
    autocast = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device)
    if torch.float16 in (x.dtype, autocast):
        raise TypeError("masked needs float32 or bfloat16, got float16: the bias underflows in it")
