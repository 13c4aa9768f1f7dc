"""How far this project is from the published models' own outputs, computed in double precision.

Axes: B images, N patch tokens, S stages.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from safetensors.torch import load_file
from torch import Tensor

from dynamicvit import SparseViT, from_released
from dynamicvit.core.backbones import adapter_of
from dynamicvit.core.model import SparseOutput
from dynamicvit.core.paths import Masked
from dynamicvit.models.lvvit import RESIDUAL_SCALE, from_official
from dynamicvit.training.losses import LossWeights, distillation_loss, token_kl, token_mse

NAMES = ("deit", "lvvit")
STAGES = range(3)
# Of relative norms under autocast: bfloat16 has 8 significant bits.
BFLOAT16 = 0.03
BFLOAT16_GRADIENT = 0.06


class Error(NamedTuple):
    """How far a quantity is from the published one, and how far it may be."""

    value: float
    limit: float

    @property
    def fits(self) -> bool:
        return self.value <= self.limit  # NaN does not


@dataclass(frozen=True)
class Golden:
    """One published model: `config`, `expected` (tensors by name), and the models themselves."""

    name: str
    config: dict[str, Any]
    expected: dict[str, Tensor]
    student: SparseViT
    teacher: Any


def load_golden(name: str, device: str | torch.device = "cpu") -> Golden:
    """The golden data of "deit" or "lvvit", and both models in float32, on a device."""
    folder = Path(__file__).parent / "golden" / name
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    student = from_released(folder / "student.safetensors", num_heads=config["num_heads"])
    architecture = {"deit": "deit_small_patch16_224", "lvvit": "lvvit_small"}[name]
    teacher: Any = timm.create_model(
        architecture, **{key: config[key] for key in ("embed_dim", "num_heads", "num_classes")}
    ).eval()
    teacher.load_state_dict(from_official(load_file(folder / "teacher.safetensors")))
    expected = load_file(folder / "expected.safetensors", device=str(device))
    return Golden(name, config, expected, student.to(device), teacher.to(device))


@torch.no_grad()
def inference_errors(golden: Golden) -> dict[str, Error]:
    """Dense and pruned, in float32."""
    images = golden.expected["images"].float()
    return {
        "dense logits": _largest(golden.student.backbone(images), golden.expected["dense.logits"]),
        "pruned logits": _largest(golden.student(images), golden.expected["eval.logits"]),
    }


def training_errors(golden: Golden, path: type[Masked] = Masked) -> dict[str, Error]:
    """Masked outputs with given decisions, losses and gradients, in float32."""
    expected = golden.expected
    decisions = _decisions(golden)
    output, losses = _train(golden, decisions, path)
    errors = {
        "masked logits": _largest(output.logits, expected["train.logits"]),
        "masked tokens": _largest(output.tokens, expected["train.tokens"]),
        "keep mask": _largest(output.keep[-1], expected["train.mask"], 0.0),
        "ratio loss": _largest(losses["ratio"], expected["loss.ratio"], 1e-6),
        "total loss": _largest(losses["loss"], expected["loss.total"]),
    }
    for stage in STAGES:
        policy = expected[f"train.policy.{stage}"]
        errors[f"keep mask {stage}"] = _largest(output.keep[stage], policy, 0.0)
    for name in ("cross_entropy", "logit_kl", "token"):
        errors[f"{name} loss"] = _largest(losses[name], expected[f"loss.{name}"])
    return errors | _gradient_errors(golden, decisions, losses["loss"], 1e-4)


def bfloat16_errors(golden: Golden) -> dict[str, Error]:
    """Under autocast: dense, pruned, masked and gradients, as relative norms.

    Rounded scores may pick other tokens near the cut, so the pruned logits are held to those that
    float32 gives for the tokens that were kept, and masked outputs have given decisions.
    """
    expected = golden.expected
    images = expected["images"].float()
    decisions = _decisions(golden)
    with torch.autocast(images.device.type, torch.bfloat16):
        output, losses = _train(golden, decisions)
        with torch.no_grad():
            dense = golden.student.backbone(images)
            pruned = golden.student.pruned(images)
    with torch.no_grad():
        same_tokens = golden.student.masked(images, decisions=pruned.keep)
    errors = {
        "dense logits": _relative(dense, expected["dense.logits"], BFLOAT16),
        "pruned logits": _relative(pruned.logits, _prediction(golden, same_tokens), BFLOAT16),
        "masked logits": _relative(output.logits, expected["train.logits"], BFLOAT16),
        "masked tokens": _relative(output.tokens, expected["train.tokens"], BFLOAT16),
        "total loss": _relative(losses["loss"], expected["loss.total"], BFLOAT16),
    }
    return errors | _gradient_errors(golden, decisions, losses["loss"], BFLOAT16_GRADIENT)


def _decisions(golden: Golden) -> list[Tensor]:
    return [golden.expected[f"train.decision.{s}"].clone().requires_grad_() for s in STAGES]


def _train(
    golden: Golden, decisions: list[Tensor], path: type[Masked] = Masked
) -> tuple[SparseOutput, dict[str, Tensor]]:
    images = golden.expected["images"].float()
    output = golden.student.masked(images, decisions=decisions, path=path)
    with torch.no_grad():
        adapter = adapter_of(golden.teacher)
        features = golden.teacher.forward_features(images)
        teacher_logits, teacher_tokens = adapter.masked_head(golden.teacher, features)
    losses = distillation_loss(
        output,
        teacher_logits,
        teacher_tokens,
        golden.expected["labels"],
        golden.student.schedule.ratios,
        LossWeights(**golden.config["loss_weights"]),
        token_loss={"mse": token_mse, "kl": token_kl}[golden.config["token_loss"]],
    )
    return output, losses


def _gradient_errors(
    golden: Golden, decisions: list[Tensor], loss: Tensor, limit: float
) -> dict[str, Error]:
    """Of the decisions and of the parameters that were published."""
    student, expected = golden.student, golden.expected
    student.zero_grad()
    loss.backward()
    errors = {}
    for stage in STAGES:
        published = expected[f"train.grad.decision.{stage}"]
        errors[f"gradient of decision {stage}"] = _relative(decisions[stage].grad, published, limit)
    prefix = "train.grad.param."
    for name in [key.removeprefix(prefix) for key in expected if key.startswith(prefix)]:
        gradient = student.backbone.get_parameter(name).grad
        if gradient is not None and golden.name == "lvvit" and name.endswith("mlp.fc2.weight"):
            # The golden gradient is that of the weight before the residual scale was folded in.
            gradient = gradient / RESIDUAL_SCALE[golden.config["depth"]]
        errors[f"gradient of {name}"] = _relative(gradient, expected[prefix + name], limit)
    student.zero_grad(set_to_none=True)
    return errors


def _prediction(golden: Golden, output: SparseOutput) -> Tensor:
    """What an image is taken for: of an LV-ViT both heads together, as in its pruned path."""
    if golden.name != "lvvit":
        return output.logits
    dropped = output.keep[-1].unsqueeze(-1) < 0.5
    return output.logits + 0.5 * output.tokens.masked_fill(dropped, float("-inf")).amax(dim=1)


def _largest(actual: Tensor, expected: Tensor, limit: float = 1e-4) -> Error:
    return Error(float((actual.detach().float() - expected).abs().max()), limit)


def _relative(actual: Tensor | None, expected: Tensor, limit: float) -> Error:
    if actual is None:  # no gradient came there
        return Error(float("nan"), limit)
    return Error(float((actual.detach().float() - expected).norm() / expected.norm()), limit)
