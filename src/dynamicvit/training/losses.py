"""The paper's four losses as pure functions (arXiv 2106.02034), and their weighted sum.

Axes: B images, N patch tokens, C channels, S stages.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from dynamicvit.core.model import SparseOutput

SCORE_WEIGHT = 0.01  # of `score_loss`


@dataclass(frozen=True)
class LossWeights:
    """Weights of the four terms; the defaults are the paper's (which uses ratio 5 for DeiT-B).

    The ratio term, a sum over stages, is also divided by their number.
    """

    cross_entropy: float = 1.0
    ratio: float = 2.0
    logit_kl: float = 0.5
    token: float = 0.5


def cross_entropy(logits: Tensor, targets: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Mean cross-entropy; targets are class indices [B] or, after Mixup, probabilities [B, K]."""
    smoothing = 0.0 if targets.is_floating_point() else label_smoothing  # Mixup smoothes already
    return F.cross_entropy(logits.float(), targets, label_smoothing=smoothing)


def weigh_targets(targets: Tensor, class_weights: Tensor, label_smoothing: float = 0.0) -> Tensor:
    """Targets whose cross-entropy is the one that weighs each class.

    The weighted loss is then a mean over images, whatever their classes are: so the mean of the
    losses of micro-batches is the loss of the whole batch.

    Args:
        targets: class indices [B], or probabilities [B, K].
        class_weights: [K].
        label_smoothing: for class indices.

    Returns:
        [B, K], not summing to 1.
    """
    if not targets.is_floating_point():
        classes = len(class_weights)
        targets = F.one_hot(targets, classes) * (1 - label_smoothing) + label_smoothing / classes
    return targets * class_weights


def ratio_loss(keep: Sequence[Tensor], ratios: Sequence[float] | Tensor) -> Tensor:
    """Squared distance between kept share and target ratio, mean over images, sum over stages.

    Args:
        keep: for each stage, [B, N] keep mask.
        ratios: for each stage, the share of tokens that should be kept.
    """
    terms = [
        (ratio - mask.float().mean(dim=1)).square().mean()
        for mask, ratio in zip(keep, ratios, strict=True)
    ]
    return torch.stack(terms).sum()


def score_loss(scores: Sequence[Tensor]) -> Tensor:
    """The mean squared score, sum over stages.

    With `batch_threshold` only the differences of scores decide, and training makes them larger
    without end. Far from the threshold a sigmoid has no slope, so scorers would stop learning. This
    loss holds scores near 0, where the sigmoid tells tokens apart best.

    Args:
        scores: for each stage, [B, N] log-odds of keeping.
    """
    return torch.stack([score.float().square().mean() for score in scores]).sum()


def batch_threshold(
    ratios: Tensor,
    gather: Callable[[Tensor], Tensor],
    mean_over_processes: Callable[[Tensor], Tensor] | None = None,
) -> Callable[[int, Tensor, Tensor | None], Tensor]:
    """A threshold for `SparseViT.masked`: as many scores of the batch reach it as a budget allows.

    It is subtracted from the scores, so the same scores serve every budget. Tokens of all images
    compete, so an image may keep more than another. The mean of all scores then decides nothing. It
    gets no gradient from here, because it would grow without end. `score_loss` holds it.

    Args:
        ratios: [S], for each stage the share of all tokens that should be kept.
        gather: from scores [B, N], those of all processes that share the batch.
        mean_over_processes: gives a scalar's mean over these.
    """

    def threshold(stage: int, scores_BN: Tensor, keep_BN: Tensor | None) -> Tensor:
        scores = scores_BN.float()
        there = torch.ones_like(scores) if keep_BN is None else (keep_BN.detach() >= 0.5).float()
        known = scores.detach().masked_fill(there == 0, float("-inf"))
        ordered = gather(known).flatten().sort(descending=True).values
        last = (ratios[stage] * len(ordered)).round().long().clamp(1, len(ordered)) - 1
        least = ordered.masked_fill(~ordered.isfinite(), float("inf")).min()
        # At ratio 1 noise must not drop any token. This makes the probability e⁻²⁰.
        bound = torch.maximum(ordered.gather(0, last[None])[0], least) - 20.0 * (
            ratios[stage] >= 1.0
        )
        total, count = (scores * there).sum(), there.sum()
        if mean_over_processes is not None:
            count = mean_over_processes(count)
            if total.requires_grad:  # what all processes take off is shared by all
                total.register_hook(mean_over_processes)
        mean = total / count.clamp(min=1.0)
        return bound + (mean - mean.detach())

    return threshold


def logit_kl(student_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """KL(teacher ‖ student) of the class distributions, mean over images; logits [B, K]."""
    return F.kl_div(
        student_logits.float().log_softmax(dim=-1),
        teacher_logits.float().log_softmax(dim=-1),
        reduction="batchmean",
        log_target=True,
    )


def token_mse(
    student_BNC: Tensor, teacher_BNC: Tensor, keep_BN: Tensor, count: Tensor | None = None
) -> Tensor:
    """Squared error between tokens after the final norm, mean over kept tokens and channels.

    The keep mask only selects: no gradient flows to it. With nothing kept the loss is 0.

    Args:
        student_BNC, teacher_BNC: the tokens.
        keep_BN: 1 where a token is kept.
        count: what to divide the sum over kept tokens by, a scalar; by default their number.
    """
    error = (student_BNC.float() - teacher_BNC.float()).square().mean(dim=-1)
    return _mean_over_kept(error, keep_BN, count)


def token_kl(
    student_BNK: Tensor, teacher_BNK: Tensor, keep_BN: Tensor, count: Tensor | None = None
) -> Tensor:
    """KL(teacher ‖ student) of LV-ViT's auxiliary class distributions, mean over kept tokens.

    The rest is as for `token_mse`.
    """
    divergence = F.kl_div(
        student_BNK.float().log_softmax(dim=-1),
        teacher_BNK.float().log_softmax(dim=-1),
        reduction="none",
        log_target=True,
    ).sum(dim=-1)
    return _mean_over_kept(divergence, keep_BN, count)


def kept_count(keep_BN: Tensor) -> Tensor:
    """How many tokens a keep mask keeps, as a float32 scalar without gradient."""
    return (keep_BN.detach() > 0.5).float().sum()


def _mean_over_kept(values_BN: Tensor, keep_BN: Tensor, count: Tensor | None) -> Tensor:
    chosen = (keep_BN.detach() > 0.5).to(values_BN.dtype)
    count = kept_count(keep_BN) if count is None else count
    return (values_BN * chosen).sum() / torch.where(count > 0, count, 1.0)


def distillation_loss(
    student: SparseOutput,
    teacher_logits: Tensor,
    teacher_tokens: Tensor,
    targets: Tensor,
    ratios: Sequence[float] | Tensor,
    weights: LossWeights = LossWeights(),
    label_smoothing: float = 0.0,
    token_loss: Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor] = token_mse,
    count: Tensor | None = None,
) -> dict[str, Tensor]:
    """The training objective with its breakdown.

    Args:
        student: from `SparseViT.masked`; or with logits as `masked_head` gives them and an empty
            `keep`, where tokens are merged: none of the student's then is one of the teacher's, and
            `ratio` and `token` are left out.
        teacher_logits, teacher_tokens: [B, K] and [B, N, C] of the dense teacher, from
            `Adapter.masked_head`.
        targets: class indices [B], or probabilities [B, K].
        ratios: the schedule's ratios.
        weights: of the terms. A term of weight 0 is still computed, to be looked at.
        label_smoothing: for class-index targets.
        token_loss: `token_mse`, or for an LV-ViT `token_kl`.
        count: what the token loss divides its sum by; by default the number of kept tokens. Where
            several processes share a batch, the mean over them of that number: then the mean of
            their losses is the loss of the whole batch.

    Returns:
        Scalars `loss` (the weighted sum), and `cross_entropy`, `ratio`, `logit_kl`, `token`
        (each unweighted).
    """
    parts = {
        "cross_entropy": cross_entropy(student.logits, targets, label_smoothing),
        "logit_kl": logit_kl(student.logits, teacher_logits),
    }
    loss = weights.cross_entropy * parts["cross_entropy"] + weights.logit_kl * parts["logit_kl"]
    if student.keep:
        parts["ratio"] = ratio_loss(student.keep, ratios)
        parts["token"] = token_loss(student.tokens, teacher_tokens, student.keep[-1], count)
        loss = loss + weights.ratio / len(ratios) * parts["ratio"] + weights.token * parts["token"]
    return {"loss": loss, **parts}
