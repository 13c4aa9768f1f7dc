"""Training tasks: modules that take a batch and return a dict with `loss` and `output`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any, Self

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from dynamicvit.core.backbones import Backbone, UnsupportedBackbone, adapter_of
from dynamicvit.core.model import SparseOutput, SparseViT
from dynamicvit.core.paths import Masked
from dynamicvit.core.tokens import best_keep
from dynamicvit.training.kept_gradients import KeptGradients, KeptMasked
from dynamicvit.training.losses import (
    SCORE_WEIGHT,
    LossWeights,
    batch_threshold,
    cross_entropy,
    distillation_loss,
    kept_count,
    score_loss,
    token_kl,
    token_mse,
)


class DenseTask(nn.Module):
    """Plain supervised training of a dense model.

    Args:
        student: the model trained.
        label_smoothing: for class-index targets.
    """

    def __init__(self, student: nn.Module, label_smoothing: float = 0.0) -> None:
        super().__init__()
        self.student = student
        self.label_smoothing = label_smoothing

    def forward(self, images: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """images [B, C, H, W], targets [B] or [B, K] → loss, output, cross_entropy."""
        logits = self.student(images)
        loss = cross_entropy(logits, targets, self.label_smoothing)
        return {"loss": loss, "output": logits.detach(), "cross_entropy": loss.detach()}


class _WithTeacher(nn.Module):
    """A student and a frozen teacher, which stays in eval mode whatever the task's mode."""

    def __init__(self, student: SparseViT, teacher: Backbone, kept_gradients: bool) -> None:
        super().__init__()
        self.adapter = adapter_of(teacher)
        if student.adapter.token_logits != self.adapter.token_logits:
            kinds = type(student.backbone).__name__, type(teacher).__name__
            raise TypeError(f"teacher must be of the student's kind, {kinds[0]}, got {kinds[1]}")
        if student.num_classes != teacher.num_classes:
            raise ValueError(
                f"teacher must have the student's {student.num_classes} classes, "
                f"got {teacher.num_classes}"
            )
        self.student = student
        self.teacher = teacher.requires_grad_(False).eval()
        self.kept_gradients = kept_gradients

    @property
    def _saves(self) -> bool:
        """Whether this forward pass leaves dropped tokens out of its backward pass."""
        checkpointing = self.student.backbone.grad_checkpointing
        return self.kept_gradients and not (checkpointing or torch.compiler.is_compiling())

    def train(self, mode: bool = True) -> Self:
        super().train(mode)
        self.teacher.eval()
        # Statistics stay those of the trained model (an LV-ViT's stem has some): a frozen backbone
        # would not be frozen else, and fine-tuning sees few images.
        for module in self.student.modules():
            if isinstance(module, _BatchNorm):
                module.eval()
        return self


class SparseTask(_WithTeacher):
    """The paper's training: masked student, frozen dense teacher, four losses.

    Args:
        student: the SparseViT trained.
        teacher: the dense model it came from, or another with tokens of the same shape. Frozen.
        weights: of the four losses.
        label_smoothing: for class-index targets.
        mean_over_processes: gives a scalar's mean over the processes that share a batch, so that
            the token loss is the mean over the tokens that all of them keep.
        kept_gradients: leave out of the backward pass what dropped tokens receive (`KeptMasked`).
            It has no effect with torch.compile or gradient checkpointing.
        gather: gives a tensor's rows of all the processes that share a batch.
    """

    def __init__(
        self,
        student: SparseViT,
        teacher: Backbone,
        weights: LossWeights = LossWeights(),
        label_smoothing: float = 0.0,
        mean_over_processes: Callable[[Tensor], Tensor] | None = None,
        kept_gradients: bool = False,
        gather: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__(student, teacher, kept_gradients)
        self.weights = weights
        self.token_loss = token_kl if self.adapter.token_logits else token_mse
        self.label_smoothing = label_smoothing
        self.mean_over_processes = mean_over_processes
        self.gather = gather

    def forward(
        self,
        images: Tensor,
        targets: Tensor,
        noise: Sequence[Tensor] | None = None,
        temperature: float = 1.0,
        ratios: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """images [B, C, H, W], targets [B] or [B, K] → loss, output, the four unweighted loss
        parts, and kept: [S] share of tokens kept at each stage. The rest as for
        `SparseViT.masked`.

        Where `ratios` [S] are given, they are the budget of this step, instead of the student's
        schedule: the batch as a whole keeps so many tokens (`batch_threshold`).

        A student that merges tokens runs as it will be used. It has the two losses on logits."""
        # Not inference_mode: torch.compile fails on a step that has it inside.
        with torch.no_grad(), KeptGradients() if self._saves else nullcontext():
            features = self.teacher.forward_features(images)
            teacher_logits, teacher_tokens = self.adapter.masked_head(self.teacher, features)
        if self.student.merges:
            final = self.student.forward_features(images)
            head = self.student.adapter.masked_head(self.student.backbone, final)
            student = SparseOutput(*head, (), ())
        else:
            path = KeptMasked if self._saves else Masked
            threshold = None
            if ratios is not None:
                gather = self.gather or _own
                threshold = batch_threshold(ratios, gather, self.mean_over_processes)
            student = self.student.masked(
                images,
                noise=noise,
                temperature=temperature,
                threshold=threshold,
                path=path,
            )
        count = None
        if student.keep and self.mean_over_processes is not None:
            count = self.mean_over_processes(kept_count(student.keep[-1]))
        losses = distillation_loss(
            student,
            teacher_logits,
            teacher_tokens,
            targets,
            self.student.schedule.ratios if ratios is None else ratios,
            # The threshold keeps what a budget allows, whatever scores are: no loss has to.
            self.weights if ratios is None else replace(self.weights, ratio=0.0),
            self.label_smoothing,
            self.token_loss,
            count,
        )
        if ratios is not None:
            losses["scores"] = score_loss(student.scores)
            losses["loss"] = losses["loss"] + SCORE_WEIGHT * losses["scores"]
        result = {name: value.detach() for name, value in losses.items()}
        result |= {"loss": losses["loss"], "output": student.logits.detach()}
        if student.keep:
            result["kept"] = torch.stack([keep.detach().mean() for keep in student.keep])
        if ratios is not None:
            result["ratios"] = ratios
        return result


class WarmStartTask(_WithTeacher):
    """Teach the scorers to keep what the teacher attends to; the backbone does not learn.

    Not in the paper; helps when training is short. A stage's target is the set of its `count`
    patch tokens that draw most attention in the teacher's blocks from that stage on: attention
    from the class token or, in a model without one, from all tokens.

    Args:
        student: the SparseViT whose scorers learn.
        teacher: the dense model whose attention they learn to foresee. Frozen.

    Raises:
        UnsupportedBackbone: if the teacher's blocks hold several attentions each.
    """

    def __init__(self, student: SparseViT, teacher: Backbone) -> None:
        super().__init__(student, teacher, kept_gradients=False)
        for block in teacher.blocks:
            _attention(block)

    def forward(self, images: Tensor, targets: Tensor) -> dict[str, Tensor]:
        """images [B, C, H, W]; targets are not used → loss, output and kept."""
        schedule = self.student.schedule
        with torch.no_grad():
            received = self._teacher_attention(images)  # [depth, B, N]
            present = torch.ones_like(received[0])
            decisions = []
            for block, count in zip(
                schedule.blocks, schedule.counts(received.shape[-1]), strict=True
            ):
                # A token that has left must not be wanted again by a later stage.
                present = best_keep(received[block:].mean(dim=0), count, present)
                decisions.append(present)
        student = self.student.masked(images, decisions)
        losses = []
        before = torch.ones_like(present)
        for score, decision in zip(student.scores, decisions, strict=True):
            error = F.binary_cross_entropy_with_logits(score.float(), decision, reduction="none")
            losses.append((error * before).sum() / before.sum())
            before = decision
        kept = torch.stack([(score.detach() > 0).float().mean() for score in student.scores])
        return {
            "loss": torch.stack(losses).mean(),
            "output": student.logits.detach(),
            "kept": kept,
        }

    def _teacher_attention(self, images: Tensor) -> Tensor:
        """Attention that each patch token draws in each block of the teacher: [depth, B, N]."""
        drawn: list[Tensor] = []
        prefix = self.teacher.num_prefix_tokens

        def keep_drawn(_: nn.Module, args: tuple[Tensor]) -> None:
            weights = args[0][:, :, :1] if prefix else args[0]  # [B, heads, 1 or N, P + N]
            drawn.append(weights.float().mean(dim=(1, 2))[:, prefix:])

        layers = [_attention(block) for block in self.teacher.blocks]
        handles = [layer.attn_drop.register_forward_pre_hook(keep_drawn) for layer in layers]
        fused = [layer.fused_attn for layer in layers]
        try:
            for layer in layers:
                layer.fused_attn = False  # the fused kernel does not tell its weights
            self.teacher.forward_features(images)
        finally:
            for layer, handle, value in zip(layers, handles, fused, strict=True):
                layer.fused_attn = value
                handle.remove()
        return torch.stack(drawn)


def _own(value: Tensor) -> Tensor:
    """What processes together have, where there is one."""
    return value


def _attention(block: nn.Module) -> Any:
    """The one module of a timm block that computes attention weights."""
    found = [module for module in block.modules() if hasattr(module, "fused_attn")]
    if len(found) != 1 or not isinstance(getattr(found[0], "attn_drop", None), nn.Module):
        raise UnsupportedBackbone(
            f"warm_start needs one attention a block, {type(block).__name__} has {len(found)}"
        )
    return found[0]
