"""Whether an engine computes what PyTorch computes, on real images.

Scores of two tokens can lie so close together that rounding decides which one stays. An engine that
then keeps the other one is right too, but its logits are those of other tokens. So where it kept
other tokens than PyTorch, two things are asked instead: that by PyTorch's scores no token that left
leads one that stayed by more than `TIE`, and that the logits are those which PyTorch gives for the
tokens that the engine kept.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import cycle
from math import isfinite
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dynamicvit.core.model import SparseOutput, SparseViT
from dynamicvit.core.paths import Path, keep_tokens
from dynamicvit.core.selectors import Selector, Stage
from dynamicvit.core.tokens import Tokens, keep_mask
from dynamicvit.deploy.samples import Sample, find_labels, load_samples
from dynamicvit.evaluation.setup import token_counts
from dynamicvit.evaluation.timing import Engine
from dynamicvit.io.predictions import class_names

BATCH_SIZES = (1, 4, 16)
TOLERANCE = 1e-3  # largest difference of a float32 logit
# Scores closer than this, as a share of the largest absolute score of the image at that stage, may
# be ordered either way: ten times the error of float32 in a DeiT-S.
TIE = 2e-5
# Largest difference of a logit in half precision, as a share of PyTorch's largest absolute logit.
HALF_TOLERANCE = {"float16": 0.01, "bfloat16": 0.05}
# As TIE, in half precision: twice what rounding does to the scores of a DeiT-S of random weights,
# which are nearer to each other than trained ones.
HALF_TIE = {"float16": 0.01, "bfloat16": 0.1}


@dataclass(frozen=True)
class Agreement:
    """An engine beside PyTorch in float32.

    Attributes:
        images: how many, each run once.
        batch_sizes: images a call; the last may be what was left.
        max_difference: largest difference of a logit. Where the engine kept other tokens, from what
            PyTorch gives for these.
        largest_logit: PyTorch's largest absolute logit, to judge the difference by.
        top1_agreement: percent of answers with the same likeliest class; where a tie between
            tokens was decided otherwise, with what PyTorch gives for the engine's tokens.
        kept_agreement: percent of the tokens that PyTorch keeps, over all stages, that the engine
            keeps too; None for a dense model.
        other_tokens: images of which the engine kept other tokens.
        score_gap: largest lead, by PyTorch's scores, of a token that left over one that stayed, as
            a share of the largest absolute score.
        accuracy: percent of the images whose class PyTorch and the engine name rightly; None where
            it is not known (`find_labels`).
        kept_counts: patch tokens that each stage kept; none for a dense model.
    """

    images: int
    batch_sizes: tuple[int, ...]
    max_difference: float
    largest_logit: float
    top1_agreement: float
    kept_agreement: float | None
    other_tokens: int
    score_gap: float
    accuracy: tuple[float, float] | None
    kept_counts: tuple[int, ...] = ()

    def check(self, precision: str) -> None:
        """Raise ValueError with the figures, unless they are those of a faithful engine.

        In float32: differences within `TOLERANCE`, top-1 agreement 100%, and the same tokens but
        for ties. In float16 and bfloat16: differences within `HALF_TOLERANCE`, and no token left
        that leads by more than `HALF_TIE`. int8 changes the model, so its figures are only
        reported, if they are finite.
        """
        allowed = float("inf")
        wrong = []
        if precision == "float32":
            allowed = TOLERANCE
            if self.top1_agreement < 100.0:
                wrong.append(f"top-1 agreement is {self.top1_agreement:.2f}% (must be 100%)")
        elif precision in HALF_TOLERANCE:
            allowed = HALF_TOLERANCE[precision] * self.largest_logit
        tie = TIE if precision == "float32" else HALF_TIE.get(precision, float("inf"))
        if not self.score_gap <= tie:
            wrong.append(
                f"kept tokens agree to {self.kept_agreement:.2f}%, with score gaps of up to "
                f"{self.score_gap:.2g} (ties: at most {tie:g})"
            )
        if not (self.max_difference <= allowed and isfinite(self.max_difference)):
            wrong.append(
                f"logits differ by up to {self.max_difference:.3g} (at most {allowed:.3g})"
            )
        if wrong:
            sizes = ", ".join(map(str, self.batch_sizes))
            raise ValueError(
                f"the export does not do what the model does: {'; '.join(wrong)}; on {self.images} "
                f"images, batch sizes {sizes}"
                + (
                    f", {', '.join(map(str, self.kept_counts))} tokens kept"
                    * bool(self.kept_counts)
                )
            )


@torch.no_grad()
def measure_agreement(
    model: nn.Module,
    engine: Engine,
    samples: Sequence[Sample],
    batch_sizes: Sequence[int] = BATCH_SIZES,
    report: Callable[..., None] = lambda step, detail="": None,
) -> Agreement:
    """Run an engine and the model it was made from on the same images, each once.

    Args:
        model: a SparseViT or dense timm model, float32 on the CPU, in eval mode.
        engine: what to compare with it: images → logits and, of a sparse model, what each stage
            keeps, [B, K] positions.
        samples: images.
        batch_sizes: images a call, one size after the other, again and again.
        report: called with the progress.

    Raises:
        ValueError: if an image cannot be read, or the engine's outputs are not what they should be.
    """
    largest, done = 0.0, 0
    sizes: set[int] = set()
    classes: list[Tensor] = []  # as PyTorch names them
    verdicts: list[_Verdict] = []
    for size in cycle(batch_sizes):
        group = samples[done : done + size]
        if not group:
            break
        report(f"comparing with PyTorch on {len(samples)} images", f"({done} done)")
        done += len(group)
        sizes.add(len(group))
        [images] = load_samples(model, group, len(group))
        expected = model.pruned(images) if isinstance(model, SparseViT) else model(images)
        logits = expected.logits if isinstance(expected, SparseOutput) else expected
        largest = max(largest, float(logits.abs().max()))
        classes.append(logits.argmax(1))
        given, *kept = engine(images)
        _expect(given, logits.shape, "logits")
        if isinstance(model, SparseViT):
            verdicts.append(_judge(model, images, expected, given, kept))
        else:
            all_kept, gap = torch.ones(len(images)), torch.zeros(len(images))
            verdicts.append(_compare_logits(given, logits, logits, all_kept, gap))
    every = _Verdict(*map(torch.cat, zip(*verdicts, strict=True)))  # each [images]
    labels = find_labels(samples, class_names(model))
    accuracy = None
    if labels is not None:
        right = [
            100.0 * float((named == labels).float().mean())
            for named in (torch.cat(classes), every.named)
        ]
        accuracy = right[0], right[1]
    return Agreement(
        images=len(samples),
        batch_sizes=tuple(sorted(sizes)),
        max_difference=float(every.difference.max()),
        largest_logit=largest,
        top1_agreement=100.0 * int(every.same_class.sum()) / len(samples),
        kept_agreement=100.0 * float(every.kept.mean()) if isinstance(model, SparseViT) else None,
        other_tokens=int((every.kept < 1).sum()),
        score_gap=float(every.gap.max()),
        accuracy=accuracy,
        kept_counts=token_counts(model)[1:],
    )


class _Verdict(NamedTuple):
    """For each image of a batch: [B]."""

    difference: Tensor  # largest, of a logit
    named: Tensor  # the engine's likeliest class
    same_class: Tensor
    kept: Tensor  # share of PyTorch's tokens that the engine kept too
    gap: Tensor  # as in Agreement.score_gap


def _judge(
    model: SparseViT,
    images: Tensor,
    expected: SparseOutput,
    logits: Tensor,
    stages: Sequence[Tensor],
) -> _Verdict:
    if len(stages) != len(expected.keep):
        raise ValueError(
            f"the export gives what {len(stages)} stages keep, expected {len(expected.keep)}"
        )
    num_tokens = expected.keep[0].shape[1]
    common, total = torch.zeros(len(images)), 0
    for number, (keep, stage) in enumerate(zip(expected.keep, stages, strict=True), 1):
        count = int(keep[0].sum())
        _expect(stage, (len(images), count), f"kept_{number}")
        if stage.amin() < 0 or stage.amax() >= num_tokens:
            raise ValueError(f"the export keeps tokens that there are not, got {stage[0].tolist()}")
        common += (keep * keep_mask(stage, num_tokens)).sum(1)
        total += count
    share = common / total
    given, gap = expected.logits.clone(), torch.zeros(len(images))
    other = share < 1
    if other.any():
        path = GivenTokens([stage[other] for stage in stages])
        given[other] = model.forward_head(model.run(images[other], path)[0].x)
        gap[other] = path.gap
    right = torch.where((gap <= TIE)[:, None], given, expected.logits)
    return _compare_logits(logits, given, right, share, gap)


def _compare_logits(
    logits: Tensor, given: Tensor, right: Tensor, kept: Tensor, gap: Tensor
) -> _Verdict:
    difference = (logits - given).abs().amax(1)
    named = logits.argmax(1)
    return _Verdict(difference, named, named == right.argmax(1), kept, gap)


class GivenTokens(Path):
    """The pruned path with given tokens.

    Args:
        stages: [B, K] original positions, in any order, one tensor a stage.

    Attributes:
        gap: [B], the largest lead, at any stage, of a token that leaves over one that stays, by the
            scores and as a share of the largest. Infinite where a token stays that was not there.
    """

    def __init__(self, stages: Sequence[Tensor]) -> None:
        self.stages = stages
        self.gap = torch.zeros(len(stages[0]))

    def apply(self, stage: Stage, selector: Selector) -> tuple[Tokens, Tensor | None]:
        tokens = stage.tokens
        score = selector(tokens.patches, None, stage)
        keep = self.stages[stage.number].sort(dim=1).values
        present = tokens.positions  # sorted, as the stage before took them in order
        if present is None:
            present = torch.arange(tokens.num_patches).expand(len(keep), -1)
        at = torch.searchsorted(present.contiguous(), keep).clamp(max=present.shape[1] - 1)
        there = (present.gather(1, at) == keep).all(1) & (keep.diff(dim=1) > 0).all(1)
        left = score.scatter(1, at, float("-inf")).amax(1)
        lead = left - score.gather(1, at).amin(1)
        self.gap = torch.maximum(self.gap, lead / score.abs().amax(1).clamp(min=1e-12))
        self.gap[~there] = float("inf")
        return keep_tokens(stage, at)._replace(positions=keep), score


def _expect(tensor: Tensor, shape: Sequence[int], name: str) -> None:
    if tuple(tensor.shape) != tuple(shape):
        raise ValueError(
            f"the export gives {name} of the wrong shape: expected {list(shape)}, "
            f"got {list(tensor.shape)}"
        )
