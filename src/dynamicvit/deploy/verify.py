"""Whether an engine computes what PyTorch computes, on real images.

Scores of two tokens can lie so close together that rounding decides which one stays. An engine that
then keeps the other one is right too, but its logits are those of other tokens. So where it kept
other tokens than PyTorch, two things are asked instead: that by PyTorch's scores no token that left
leads one that stayed by more than `TIE`, and that the logits are those which PyTorch gives for the
tokens that the engine kept.
"""

from __future__ import annotations

import pathlib
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import NamedTuple

import torch
from timm.data.readers import get_img_extensions
from torch import Tensor, nn

from dynamicvit.core.model import SparseOutput, SparseViT
from dynamicvit.core.paths import Path
from dynamicvit.core.selectors import Selector, Stage
from dynamicvit.core.tokens import Tokens, keep_mask
from dynamicvit.io.embedded import embedded_images
from dynamicvit.io.predictions import ImageSource, class_names, preprocessing, read_image

# Images [B, C, H, W] → logits [B, num_classes] and, of a sparse model, kept tokens.
Engine = Callable[[Tensor], tuple[Tensor, ...]]

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
    """An engine beside PyTorch in float32, over all images at all batch sizes.

    Attributes:
        images: how many, each at every batch size.
        batch_sizes: images a call.
        max_difference: largest difference of a logit. Where the engine kept other tokens, from what
            PyTorch gives for these.
        largest_logit: PyTorch's largest absolute logit, to judge the difference by.
        top1_agreement: percent of answers with the same likeliest class; where a tie between
            tokens was decided otherwise, with what PyTorch gives for the engine's tokens.
        kept_agreement: percent of the tokens that PyTorch keeps, over all stages, that the engine
            keeps too; None for a dense model.
        other_tokens: images of which the engine kept other tokens, at any batch size.
        score_gap: largest lead, by PyTorch's scores, of a token that left over one that stayed, as
            a share of the largest absolute score.
        accuracy: percent of the images whose class PyTorch and the engine name rightly; None where
            it is not known (`find_labels`).
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
            )


class Found(NamedTuple):
    """An image, and the name of the folder that it lies in."""

    source: ImageSource
    folder: str


def find_images(
    folder: str | None, count: int, argument: str = "images", fewer: bool = False
) -> list[Found]:
    """`count` images from all over a folder and its sub-folders; None means the embedded ones.

    Args:
        folder: where to look.
        count: how many to take.
        argument: what the user calls the folder.
        fewer: where there are fewer, but one at least, take those.

    Raises:
        ValueError: naming the argument, if there is no such folder or it has too few.
    """
    found: list[Found] = []
    if folder is None:
        found.extend(Found(picture, name) for name, _, picture in embedded_images("val"))
    elif not pathlib.Path(folder).is_dir():
        raise ValueError(f"{argument} must be a folder of images, got {folder}")
    else:
        kinds = get_img_extensions(as_set=True)
        files = (path for path in pathlib.Path(folder).rglob("*") if path.suffix.lower() in kinds)
        found.extend(Found(path, path.parent.name) for path in sorted(files))
    if fewer:
        count = max(1, min(count, len(found)))
    if len(found) < count:
        raise ValueError(
            f"{argument} must hold at least {count} (samples), got {len(found)} images in "
            f"{folder or 'the package'}"
        )
    return [found[index * len(found) // count] for index in range(count)]


def find_labels(images: Sequence[Found], class_names: Sequence[str]) -> Tensor | None:
    """The class index of each image, by its folder's name: [images]; or None.

    The folders must have names of classes or, as many as there are classes, of ImageNet's synsets.
    """
    folders = sorted({image.folder for image in images})
    if set(folders) <= set(class_names):
        return torch.tensor([class_names.index(image.folder) for image in images])
    synsets = all(re.fullmatch(r"n\d{8}", name) for name in folders)
    if synsets and len(folders) == len(class_names):
        return torch.tensor([folders.index(image.folder) for image in images])
    return None


def load_images(model: nn.Module, images: Sequence[Found], batch: int) -> Iterator[Tensor]:
    """[B, C, H, W] batches, prepared as the model's `pretrained_cfg` says.

    Raises:
        ValueError: if the model takes no images, or one cannot be read.
    """
    mode, transform = preprocessing(model)
    for start in range(0, len(images), batch):
        group = images[start : start + batch]
        yield torch.stack([transform(read_image(image.source, mode, "image")) for image in group])


@torch.no_grad()
def compare(
    model: nn.Module,
    engine: Engine,
    found: Sequence[Found],
    batch_sizes: Sequence[int] = BATCH_SIZES,
) -> Agreement:
    """Run an engine and the model it was made from on the same images.

    Args:
        model: a SparseViT or dense timm model, float32 on the CPU, in eval mode.
        engine: what to compare with it.
        found: images.
        batch_sizes: images a call; those larger than the number of images shrink to it.

    Raises:
        ValueError: if an image cannot be read, or the engine's outputs are not what they should be.
    """
    sizes = sorted({min(size, len(found)) for size in batch_sizes})
    largest = 0.0
    classes: list[Tensor] = []  # as PyTorch names them
    verdicts: dict[int, list[_Verdict]] = {size: [] for size in sizes}
    for images in load_images(model, found, sizes[-1]):
        expected = model.pruned(images) if isinstance(model, SparseViT) else model(images)
        logits = expected.logits if isinstance(expected, SparseOutput) else expected
        largest = max(largest, float(logits.abs().max()))
        classes.append(logits.argmax(1))
        for size in sizes:
            answers = zip(*(engine(chunk) for chunk in images.split(size)), strict=True)
            outputs = [torch.cat(answer) for answer in answers]
            _expect(outputs[0], logits.shape, "logits")
            if isinstance(model, SparseViT):
                verdict = _judge(model, images, expected, outputs[0], outputs[1])
            else:
                kept, gap = torch.ones(len(images)), torch.zeros(len(images))
                verdict = _compare_logits(outputs[0], logits, logits, kept, gap)
            verdicts[size].append(verdict)
    columns = [map(torch.cat, zip(*rows, strict=True)) for rows in verdicts.values()]
    every = _Verdict(*map(torch.stack, zip(*columns, strict=True)))  # each [batch sizes, images]
    labels = find_labels(found, class_names(model))
    accuracy = None
    if labels is not None:
        right = [
            100.0 * float((named == labels).float().mean())
            for named in (torch.cat(classes), every.named)
        ]
        accuracy = right[0], right[1]
    return Agreement(
        images=len(found),
        batch_sizes=tuple(sizes),
        max_difference=float(every.difference.max()),
        largest_logit=largest,
        top1_agreement=100.0 * int(every.same_class.sum()) / every.same_class.numel(),
        kept_agreement=100.0 * float(every.kept.mean()) if isinstance(model, SparseViT) else None,
        other_tokens=int((every.kept < 1).any(0).sum()),
        score_gap=float(every.gap.max()),
        accuracy=accuracy,
    )


class _Verdict(NamedTuple):
    """For each image of a batch: [B]."""

    difference: Tensor  # largest, of a logit
    named: Tensor  # the engine's likeliest class
    same_class: Tensor
    kept: Tensor  # share of PyTorch's tokens that the engine kept too
    gap: Tensor  # as in Agreement.score_gap


def _judge(
    model: SparseViT, images: Tensor, expected: SparseOutput, logits: Tensor, kept: Tensor
) -> _Verdict:
    num_tokens = expected.keep[0].shape[1]
    counts = [int(keep[0].sum()) for keep in expected.keep]
    _expect(kept, (len(images), sum(counts)), "kept")
    if kept.amin() < 0 or kept.amax() >= num_tokens:
        raise ValueError(f"the export keeps tokens that there are not, got {kept[0].tolist()}")
    pairs = zip(expected.keep, kept.split(counts, dim=1), strict=True)
    common = [(keep * keep_mask(stage, num_tokens)).sum(1) for keep, stage in pairs]
    share = torch.stack(common).sum(0) / sum(counts)
    given, gap = expected.logits.clone(), torch.zeros(len(images))
    other = share < 1
    if other.any():
        stages = kept[other].split(counts, dim=1)
        path = _Given(stages)
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


class _Given(Path):
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
        return tokens.take(at)._replace(positions=keep), score


def _expect(tensor: Tensor, shape: Sequence[int], name: str) -> None:
    if tuple(tensor.shape) != tuple(shape):
        raise ValueError(
            f"the export gives {name} of the wrong shape: expected {list(shape)}, "
            f"got {list(tensor.shape)}"
        )
