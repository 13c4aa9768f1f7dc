"""SparseViT: a dense timm ViT plus selectors, one loop over its blocks, and the ways to call it."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from numbers import Real
from typing import TYPE_CHECKING, Any, NamedTuple, cast, overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from dynamicvit.core.backbones import Backbone, adapter_of
from dynamicvit.core.budget import Budget
from dynamicvit.core.levels import KEEP_RATIOS, Calibration, Levels, check_levels, plan
from dynamicvit.core.macs import in_eval_mode
from dynamicvit.core.paths import Masked, Path, Pruned
from dynamicvit.core.schedule import KeepSchedule
from dynamicvit.core.selectors import Selector, Stage, check_name, create
from dynamicvit.core.timm_model import TimmModel
from dynamicvit.core.tokens import Tokens, keep_mask

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
        scores: for each stage, [B, N]: what tokens are ranked by, from a learned scorer log-odds of
            keeping. From `pruned`, tokens that had left before a stage have score -inf there.
    """

    logits: Tensor
    tokens: Tensor
    keep: tuple[Tensor, ...]
    scores: tuple[Tensor, ...]


class Choice(NamedTuple):
    """What one stage chose.

    Attributes:
        scores: [B, n] of the tokens that reached it. None if they were not scored.
        before: [B, n] int64, where those tokens lie in the grid. None: all, in order.
        kept: [B, K] int64, where those lie that went on. None: all, in order, or merged ones.
        keep: [B, N] float keep mask of the masked path; None in others.
    """

    scores: Tensor | None
    before: Tensor | None
    kept: Tensor | None
    keep: Tensor | None


class SparseViT(TimmModel):
    """A vision transformer whose uninformative patch tokens leave before some blocks.

    Made by `sparsify`; `forward` really removes tokens, `masked` only blocks them (for training).
    `train()` and `eval()` change dropout and sampling noise, never the algorithm.

    Args:
        backbone: a timm VisionTransformer or Eva. It is used as it is, not copied.
        schedule: where tokens leave and how many stay.
        scorers: one selector a stage, or the name of a kind in
            `dynamicvit.core.selectors.SELECTORS`, of which new ones are created.
        squeeze: merge each token that leaves into its host, the most similar one that stays (dTPS,
            arXiv 2304.10716).

    Raises:
        UnsupportedBackbone: if the backbone is not understood.
        TypeError, ValueError: if the schedule does not fit it, or the scorers the schedule.

    Source: DynamicViT, arXiv 2106.02034.
    """

    def __init__(
        self,
        backbone: nn.Module,
        schedule: KeepSchedule,
        scorers: Iterable[nn.Module] | str = "learned",
        squeeze: bool = False,
    ) -> None:
        super().__init__()
        self.adapter = adapter_of(backbone)
        model = cast(Backbone, backbone)
        if not isinstance(schedule, KeepSchedule):
            raise TypeError(f"schedule must be a KeepSchedule, got {schedule!r}")
        schedule.check_depth(self.adapter.depth(model))
        num_patches = self.adapter.num_patches(model)
        if num_patches is not None:
            schedule.counts(num_patches)  # refuses a schedule that keeps no token, here not later
        if isinstance(scorers, str):
            scorers = create(scorers, model, len(schedule.blocks))
        if not isinstance(scorers, Iterable):
            raise TypeError(f"scorers must be one selector a stage, got {scorers!r:.200}")
        scorers = list(scorers)
        _check_scorers(scorers, model, len(schedule.blocks))
        if not isinstance(squeeze, bool):
            raise TypeError(f"squeeze must be true or false, got {squeeze!r:.200}")
        if squeeze and scorers[0].merges:
            raise ValueError(
                f"squeeze needs scorers that choose tokens, got {type(scorers[0]).__name__}"
            )
        self.backbone = model
        self.scorers = nn.ModuleList(scorers).train(model.training)
        self.schedule = schedule
        self.squeeze = squeeze
        self.training = model.training
        self.calibration: Calibration | None = None
        self.levels: Levels | None = None

    # One loop, and the ways to call it.

    def run(self, images: Tensor, path: Path) -> tuple[Tokens, list[Choice]]:
        """All blocks, with a stage before those that the schedule names.

        Args:
            images: as for `forward`.
            path: how decisions are applied.

        Returns:
            The tokens after the final norm, and what each stage chose.
        """
        tokens = self._embed(images)
        counts = self.schedule.counts(tokens.num_patches)
        tokens, choices = self._run_blocks(tokens, path, counts)
        return self._norm(tokens), choices

    def _embed(self, images: Tensor) -> Tokens:
        self.adapter.check_images(self.backbone, images)
        return self.adapter.embed(self.backbone, images)

    def _norm(self, tokens: Tokens) -> Tokens:
        return tokens._replace(x=self.adapter.norm(self.backbone, tokens.x))

    def _run_blocks(
        self,
        tokens: Tokens,
        path: Path,
        counts: Sequence[int],
        start: int = 0,
        end: int | None = None,
    ) -> tuple[Tokens, list[Choice]]:
        """The blocks from `start` on, before `end`, and the stages before them.

        Args:
            tokens: what arrives.
            path: how decisions are carried out.
            counts: patch tokens to keep at each stage from `start` on.
            start, end: indices of blocks. All by default.
        """
        adapter, model = self.adapter, self.backbone
        choices: list[Choice] = []
        for block in range(start, adapter.depth(model) if end is None else end):
            if block in self.schedule.blocks:
                number = len(choices)
                draws = path.noise(number)
                stage = Stage(
                    number, block, counts[number], tokens, model, adapter, draws, self.squeeze
                )
                before = tokens.positions
                tokens, scores = path.apply(stage, cast(Selector, self.scorers[number]))
                choices.append(Choice(scores, before, tokens.positions, tokens.keep))
            tokens = tokens._replace(x=path.run_block(adapter, model, block, tokens))
        return tokens, choices

    def _run_levels(
        self, images: Tensor, levels: Levels, trace: bool = False
    ) -> Iterator[tuple[int, Tensor, Tokens, list[Choice]]]:
        """Images of each level together: the level, their rows in the batch, then as `run`.

        All images run together up to the first stage. Its scores decide the level of each.
        """
        first = self.schedule.blocks[0]
        tokens, _ = self._run_blocks(self._embed(images), Pruned(), (), 0, first)
        scorer = cast(Selector, self.scorers[0])
        stage = Stage(0, first, tokens.num_patches, tokens, self.backbone, self.adapter)
        scores = cast(Tensor, scorer(tokens.patches, None, stage))
        level = levels.of(scorer.difficulty(scores))
        for number, schedule in enumerate(levels.schedules):
            rows = (level == number).nonzero().squeeze(1)
            if len(rows) or not len(images):
                path = Pruned(trace, scores[rows])
                counts = schedule.counts(tokens.num_patches)
                with _without_plans(images.device):
                    some, choices = self._run_blocks(tokens.of_images(rows), path, counts, first)
                yield number, rows, self._norm(some), choices

    def forward(self, images: Tensor) -> Tensor:
        """Classify, with tokens really leaving.

        Args:
            images: [B, in_chans, H, W], normalised as `pretrained_cfg` says, on the model's device
                and in its dtype.

        Returns:
            [B, num_classes] logits.

        Raises:
            TypeError, ValueError: if `images` has the wrong type, rank, channels or size.
        """
        if self.levels is None:
            return self.forward_head(self.forward_features(images))
        return self.forward_levels(images)[0]

    def forward_levels(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """`forward` where each image has its own budget, and which of the levels each image got.

        Args:
            images: as for `forward`.

        Returns:
            [B, num_classes] logits, and [B] int64 indices into `levels.schedules`.

        Raises:
            TypeError, ValueError: as `forward`, or if the model has one budget for all images.
        """
        if self.levels is None:
            raise TypeError("forward_levels needs a model with per_image=True, got one budget")
        parts = [
            (rows, self.forward_head(final.x), torch.full_like(rows, level))
            for level, rows, final, _ in self._run_levels(images, self.levels)
        ]
        return (
            _in_order([(rows, logits) for rows, logits, _ in parts]),
            _in_order([(rows, level) for rows, _, level in parts]),
        )

    def forward_features(self, images: Tensor) -> Tensor:
        """Prefix and kept patch tokens after the final norm: [B, P + K, C].

        Raises:
            TypeError, ValueError: as `forward`; and where each image has its own budget, which one
                tensor cannot hold.
        """
        if self.levels is not None:
            raise TypeError(
                "forward_features needs one budget for all images, got a model with per_image=True"
            )
        return self.run(images, Pruned())[0].x

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Pool and classify the tokens that `forward_features` gave, as timm's models do.

        Raises:
            ValueError: if `x` is not [B, N, C].
        """
        if x.ndim != 3 or x.shape[2] != self.backbone.embed_dim:
            raise ValueError(
                f"x must be tokens [B, N, {self.backbone.embed_dim}], got {list(x.shape)}"
            )
        return self.adapter.head(self.backbone, x, pre_logits=pre_logits)

    def pruned(self, images: Tensor) -> SparseOutput:
        """`forward` that also returns which tokens stayed. Arguments and errors as there.

        Where each image has its own budget, `tokens` are filled up with zeros at the end.

        >>> import timm
        >>> sparse = sparsify(timm.create_model("vit_tiny_patch16_224"), keep_ratio=0.7).eval()
        >>> [int(keep.sum()) for keep in sparse.pruned(torch.randn(1, 3, 224, 224)).keep]
        [137, 96, 67]
        """
        if self.levels is None:
            return self._output(*self.run(images, Pruned(trace=True)))
        found = [
            (rows, self._output(final, choices))
            for _, rows, final, choices in self._run_levels(images, self.levels, trace=True)
        ]
        most = max(output.tokens.shape[1] for _, output in found)

        def fill(tokens: Tensor) -> Tensor:
            return F.pad(tokens, (0, 0, 0, most - tokens.shape[1]))

        stages = range(len(self.schedule.blocks))
        return SparseOutput(
            _in_order([(rows, output.logits) for rows, output in found]),
            _in_order([(rows, fill(output.tokens)) for rows, output in found]),
            tuple(_in_order([(rows, out.keep[stage]) for rows, out in found]) for stage in stages),
            tuple(
                _in_order([(rows, out.scores[stage]) for rows, out in found]) for stage in stages
            ),
        )

    def _output(self, final: Tokens, choices: list[Choice]) -> SparseOutput:
        """What `pruned` returns, from what `run` returned."""
        tokens = self.adapter.masked_head(self.backbone, final.x)[1]
        num_tokens = final.grid[0] * final.grid[1]
        keep, scores = [], []
        for choice in choices:
            if choice.scores is None or choice.kept is None:  # merged
                continue
            keep.append(keep_mask(choice.kept, num_tokens))
            score = choice.scores
            if choice.before is not None:
                left = score.new_full((score.shape[0], num_tokens), float("-inf"))
                score = left.scatter(1, choice.before, score)
            scores.append(score)
        return SparseOutput(self.forward_head(final.x), tokens, tuple(keep), tuple(scores))

    def masked(
        self,
        images: Tensor,
        decisions: Sequence[Tensor] | None = None,
        *,
        noise: Sequence[Tensor] | None = None,
        temperature: float = 1.0,
        threshold: Callable[[int, Tensor, Tensor | None], Tensor] | None = None,
        path: type[Masked] = Masked,
    ) -> SparseOutput:
        """Classify with every token present and dropped ones blocked inside attention.

        This is the differentiable path that training uses. In `train()` decisions are drawn from
        the scorers' log-odds by straight-through Gumbel sampling, so the number of kept tokens
        varies from image to image. In `eval()` the best are kept, the same tokens as in `pruned`,
        up to rounding and ties between scores. Scorers that only rank (class attention, random)
        keep their best in both modes, and gradients go to the backbone alone. Random ones draw
        anew in each call. Where each image has its own budget, the tokens of `pruned` are kept.

        Args:
            images: as for `forward`.
            decisions: raw keep decisions to use instead, one [B, N] tensor a stage, with values in
                [0, 1] (not checked: that would wait for the GPU). Stage s keeps the product of the
                first s + 1.
            noise: uniform draws in [0, 1), one [B, N] tensor a stage, for the sampling and for
                random scorers. By default they are drawn.
            temperature: of the sampling's relaxation, > 0. Low ones have sharper gradients.
            threshold: gives, from a stage's number, its scores and the keep mask before it, what is
                taken off log-odds before decisions are drawn from them. By default nothing.
            path: how blocked tokens are computed; training has a form that saves time.

        Raises:
            TypeError, ValueError: as for `forward`, and for decisions or noise of the wrong number
                or shape; for float16, in which the attention bias loses its gradient; and for a
                model that merges tokens: its only path is the pruned one, which is differentiable.
        """
        if self.merges:
            kind = type(self.scorers[0]).__name__
            raise TypeError(
                f"masked needs scorers that choose tokens, got {kind}, which merges them"
            )
        if not (isinstance(path, type) and issubclass(path, Masked)):
            raise TypeError(f"path must be Masked or a subclass of it, got {path!r}")
        if threshold is not None and not callable(threshold):
            raise TypeError(f"threshold must be a function, got {threshold!r:.200}")
        if not isinstance(temperature, Real) or isinstance(temperature, bool):
            raise TypeError(f"temperature must be a number, got {temperature!r}")
        if not temperature > 0:
            raise ValueError(f"temperature must be above 0, got {temperature}")
        self.adapter.check_images(self.backbone, images)
        _check_masked_dtype(images)
        rows, columns = self.adapter.grid(self.backbone, images.shape)
        for name, values in (("decisions", decisions), ("noise", noise)):
            if values is not None:
                self._check_stages(name, values, images, rows * columns)
        if self.levels is not None and decisions is None:
            decisions = self.pruned(images).keep
        how = path(self.training, decisions, noise, temperature, threshold)
        final, choices = self.run(images, how)
        logits, tokens = self.adapter.masked_head(self.backbone, final.x, final.keep)
        return SparseOutput(
            logits,
            tokens,
            tuple(cast(Tensor, choice.keep) for choice in choices),
            tuple(cast(Tensor, choice.scores) for choice in choices),
        )

    def at(
        self,
        keep_ratio: float | None = None,
        *,
        schedule: KeepSchedule | None = None,
        gmacs: float | None = None,
        per_image: bool = False,
    ) -> SparseViT:
        """The same model at another budget. Backbone and scorers are shared, not copied.

        So `train()` and `eval()` of one switch the shared parts of the other.

        Args:
            keep_ratio: share of tokens that each of the model's stages keeps, in (0, 1].
            schedule: the stages in full, instead of `keep_ratio`. Its blocks are some of the
                model's own, which bring their scorers; or as many others, which take the scorers in
                order.
            gmacs: billions of multiply-adds an image. The result is the model that keeps most
                tokens within them, with one keep ratio for all of its stages.
            per_image: easy images keep fewer tokens and difficult ones more, so that the mean over
                the images of `calibrate` costs what `keep_ratio` or `gmacs` says. An image's answer
                does not depend on the batch that it is in.

        Raises:
            TypeError, ValueError: naming the argument and what was got.

        >>> import timm
        >>> sparse = sparsify(timm.create_model("vit_tiny_patch16_224"), keep_ratio=0.7)
        >>> sparse.at(keep_ratio=0.5).schedule.counts(196)
        (98, 49, 24)
        """
        if not isinstance(per_image, bool):
            raise TypeError(f"per_image must be true or false, got {per_image!r:.200}")
        own = self.schedule.blocks
        given = {"keep_ratio": keep_ratio, "schedule": schedule, "gmacs": gmacs}
        if sum(value is not None for value in given.values()) != 1:
            named = ", ".join(f"{name}={value!r}" for name, value in given.items())
            raise ValueError(f"give one of keep_ratio, schedule and gmacs, got {named}")
        if gmacs is not None:
            schedule = self.budget().within(gmacs, self.schedule)
        elif keep_ratio is not None:
            schedule = self.schedule.with_keep_ratio(keep_ratio)
        elif not isinstance(schedule, KeepSchedule):
            raise TypeError(f"schedule must be a KeepSchedule, got {schedule!r}")
        if set(schedule.blocks) <= set(own):
            scorers = [self.scorers[own.index(block)] for block in schedule.blocks]
        elif len(schedule.blocks) == len(own):
            scorers = list(self.scorers)
        else:
            raise ValueError(
                f"schedule must have blocks among {own}, where the model has scorers, or "
                f"{len(own)} others, got {schedule.blocks}"
            )
        other = SparseViT(self.backbone, schedule, scorers, self.squeeze)
        other.training = self.training  # not train(): the shared parts stay as they are
        other.calibration = self.calibration
        if per_image:
            if given["schedule"] is not None:
                raise ValueError("per_image goes with keep_ratio or gmacs, got schedule")
            if self.calibration is None:
                raise ValueError("per_image needs a call of calibrate(images) before, got none")
            other.levels = plan(self.calibration, schedule, self.budget())
        return other

    def calibrate(
        self, images: Tensor | Iterable[Tensor], keep_ratios: Sequence[float] = KEEP_RATIOS
    ) -> Calibration:
        """Measure how well each level serves easy and difficult images, for `at(per_image=True)`.

        No labels are needed: answers are compared with those of this model when it keeps all
        tokens. The result is saved with the model.

        Args:
            images: [M, C, H, W] as for `forward`, or batches of such. Some hundreds of the images
                that the model will see.
            keep_ratios: of the levels, growing, each in (0, 1]. Few, and far apart: images of one
                level go on as one batch.

        Returns:
            What was measured. The model keeps it.

        Raises:
            TypeError, ValueError: naming the argument and what was got, or if the scorers do not
                tell images apart.
        """
        ratios = check_levels(keep_ratios)
        if self.num_classes == 0:
            raise ValueError("calibrate needs a model with classes, got num_classes 0")
        if not isinstance(images, Iterable):
            raise TypeError(
                f"images must be a tensor or batches of them, got {type(images).__name__}"
            )
        scorer = cast(Selector, self.scorers[0])
        scorer.difficulty(torch.ones(1, 1))  # raises before any work
        models = [self.at(keep_ratio=ratio) for ratio in ratios]
        full = models[-1] if ratios[-1] == 1 else self.at(keep_ratio=1.0)
        difficulty, losses = [], []
        with in_eval_mode(self), torch.no_grad():
            for batch in images.split(64) if isinstance(images, Tensor) else images:
                target = full(batch).float().log_softmax(-1)
                outputs = [model.pruned(batch) for model in models]
                difficulty.append(scorer.difficulty(outputs[0].scores[0]).cpu())
                answers = [output.logits.float().log_softmax(-1) for output in outputs]
                each = [(target.exp() * (target - answer)).sum(-1) for answer in answers]
                losses.append(torch.stack(each, dim=1).cpu())
        count = sum(map(len, difficulty))
        if count < 2:
            raise ValueError(f"images must be 2 or more, got {count}")
        self.calibration = Calibration.of(ratios, torch.cat(difficulty), torch.cat(losses))
        return self.calibration

    def budget(self) -> Budget:
        """What schedules of this model cost. Raises ValueError for images of any size."""
        return Budget(self.adapter, self.backbone, list(cast(Any, self.scorers)), self.squeeze)

    @property
    def merges(self) -> bool:
        """Whether tokens are merged, not chosen."""
        return cast(Selector, self.scorers[0]).merges

    def _check_stages(
        self, name: str, values: Sequence[Tensor], images: Tensor, num_tokens: int
    ) -> None:
        batch = len(images)
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
            if value.is_complex():
                raise TypeError(f"{name}[{stage}] must be real numbers, got {value.dtype}")
            if value.device != images.device:
                raise ValueError(
                    f"{name}[{stage}] must be on the images' {images.device}, got {value.device}"
                )

    # Image files, model folders and the hub.

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

    def fuse(self) -> SparseViT:
        """A copy for inference, in eval mode, whose scorers take fewer operations.

        Its logits and kept tokens are those of this model, up to rounding. Save this model, not
        the copy.
        """
        fused = copy.deepcopy(self).eval()
        for stage, scorer in enumerate(fused.scorers):
            fused.scorers[stage] = cast(Selector, scorer).fused().eval()
        return fused


def sparsify(
    model: nn.Module,
    keep_ratio: float | None = None,
    *,
    schedule: KeepSchedule | None = None,
    align: int | None = None,
    scorer: str = "learned",
    squeeze: bool = False,
) -> SparseViT:
    """Turn a trained dense ViT into a SparseViT: its weights, unchanged, plus untrained scorers.

    Args:
        model: a timm VisionTransformer or Eva; it is copied, not modified.
        keep_ratio: share of tokens each of three evenly spaced stages keeps, in (0, 1]; the paper's
            models use 0.9, 0.8, 0.7 and 0.5. By default 0.7. At 1.0 the result returns the dense
            model's logits.
        schedule: the stages in full, instead of `keep_ratio`.
        align: round the kept counts, prefix tokens included, to multiples of this, where matrix
            engines prefer it (16, for example). The cost changes by at most 2%.
        scorer: what decides, "learned" or another rule to compare with. class_attention,
            class_attention_merging, similarity_merging and pooling are of use without training;
            random and static hardly are. similarity_merging needs a head on the class token.
            Sources: arXiv 2202.07800 (EViT), 2210.09461 (ToMe).
        squeeze: merge each token that leaves into the most similar one that stays (arXiv
            2304.10716), for selectors that choose tokens.

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
    depth = adapter_of(model).depth(cast(Backbone, model))
    check_name(scorer)
    if keep_ratio is not None and schedule is not None:
        raise ValueError(
            f"give keep_ratio or schedule, not both, got keep_ratio={keep_ratio!r} "
            f"and schedule={schedule!r}"
        )
    if schedule is None:
        ratio = 0.7 if keep_ratio is None else keep_ratio
        schedule = KeepSchedule.from_keep_ratio(ratio, depth=depth)
    if not isinstance(schedule, KeepSchedule):
        raise TypeError(f"schedule must be a KeepSchedule, got {schedule!r}")
    sparse = SparseViT(copy.deepcopy(model), schedule, scorer, squeeze)
    return sparse if align is None else sparse.at(schedule=sparse.budget().aligned(schedule, align))


def _check_scorers(scorers: list[Any], model: Backbone, stages: int) -> None:
    if len(scorers) != stages:
        raise ValueError(f"scorers must be one a stage, {stages}, got {len(scorers)}")
    for scorer in scorers:
        if not isinstance(scorer, Selector):
            raise TypeError(f"each of scorers must be a Selector, got {type(scorer).__name__}")
        scorer.check(model)
    if len({scorer.merges for scorer in scorers}) > 1:
        kinds = ", ".join(type(scorer).__name__ for scorer in scorers)
        raise TypeError(f"scorers must all choose tokens or all merge them, got {kinds}")


def _in_order(parts: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """Parts [b, …] in one tensor [B, …]. Each comes with the rows of the batch that it holds."""
    order = torch.cat([rows for rows, _ in parts]).argsort()
    return torch.cat([values for _, values in parts])[order]


def _without_plans(device: torch.device) -> AbstractContextManager[Any]:
    """On a GPU, attention without cuDNN, which plans each new shape for tens of milliseconds.

    The sizes of levels change from batch to batch.
    """
    if device.type != "cuda":
        return nullcontext()
    kernels = (SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH)
    return sdpa_kernel(list(kernels))


def _check_masked_dtype(images: Tensor) -> None:
    device = images.device.type
    autocast = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device)
    if torch.float16 in (images.dtype, autocast):
        raise TypeError("masked needs float32 or bfloat16, got float16: the bias underflows in it")
