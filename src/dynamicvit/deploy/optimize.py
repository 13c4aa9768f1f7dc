"""The fastest form of a model on this machine."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from dynamicvit.deploy.engines import (
    DEFAULT_PRECISIONS,
    ENGINES,
    TORCH_ENGINES,
    Engine,
    build,
    check_engine,
    check_engines,
    first_line,
    installed,
)
from dynamicvit.evaluation.timing import time_call


@dataclass(frozen=True)
class Candidate:
    """One form of a model.

    Attributes:
        engine, precision: as in `dynamicvit.deploy.engines`.
        attention: "fused" or "plain"; None where the engine decides.
        images_per_second: median over rounds, in turn with the other candidates; 0 if not timed.
        error: of its logits beside PyTorch's float32 ones, relative norm; NaN if it gave none.
        reason: why it cannot be taken; None if it can.
    """

    engine: str
    precision: str
    attention: str | None
    images_per_second: float = 0.0
    error: float = float("nan")
    reason: str | None = None


@dataclass(frozen=True)
class Optimized:
    """A model in its fastest form: call it with images as the model.

    Attributes:
        run: images [B, C, H, W] float32, as the model takes them → logits [B, num_classes] float32.
        chosen: what was taken.
        speed_up: over eager PyTorch in float32 with fused attention.
        candidates: all that was measured.
    """

    run: Callable[[Tensor], Tensor]
    chosen: Candidate
    speed_up: float
    candidates: tuple[Candidate, ...]

    def __call__(self, images: Tensor) -> Tensor:
        return self.run(images)

    def __str__(self) -> str:
        attention = f", {self.chosen.attention} attention" if self.chosen.attention else ""
        return (
            f"{self.chosen.engine}, {self.chosen.precision}{attention}: "
            f"{self.chosen.images_per_second:.1f} images/s, {self.speed_up:.2f}× eager float32; "
            f"logits within {self.chosen.error:.1g}"
        )


@torch.no_grad()
def optimize(
    model: nn.Module,
    example: Tensor,
    tolerance: float = 1e-3,
    engines: Sequence[str] | None = None,
    precisions: Sequence[str] | None = None,
    rounds: int = 7,
) -> Optimized:
    """Measure a model in every engine and precision of this machine, and take the fastest.

    Args:
        model: a SparseViT or a dense timm model, in eval mode; it is copied, not modified.
        example: images [B, C, H, W] float32 of the batch size that will be used. Real ones judge
            the error better than noise.
        tolerance: largest relative norm of the difference from PyTorch's float32 logits. bfloat16
            makes about 1e-2; near-tied tokens that change places make more.
        engines: keys of `dynamicvit.deploy.engines.ENGINES`; by default all that are installed.
        precisions: which to try, where an engine has them; by default float32 and bfloat16.
        rounds: calls of each candidate that are timed, in turn.

    Returns:
        The fastest that stays within the tolerance, with everything that was measured, and why the
        others are out: an engine that fails (torch.compile without a C++ compiler) is one of those.

    Raises:
        TypeError, ValueError: naming the argument and what was got; if an engine or precision that
            was asked for is not there, or nothing that was is within the tolerance.
    """
    if not isinstance(example, Tensor) or example.ndim != 4 or len(example) < 1:
        got = tuple(example.shape) if isinstance(example, Tensor) else type(example).__name__
        raise ValueError(f"example must be images [B, C, H, W], got {got}")
    if not tolerance >= 0:
        raise ValueError(f"tolerance must be 0 or more, got {tolerance!r}")
    if rounds < 1:
        raise ValueError(f"rounds must be 1 or more, got {rounds!r}")
    device = example.device.type
    check_engines(engines or (), precisions or DEFAULT_PRECISIONS[:1], device)
    # What every candidate is compared with is measured, even if it was not asked for.
    base = Candidate("eager", "float32", "fused")
    asked = [
        Candidate(engine, precision, attention)
        for engine in engines or filter(installed, ENGINES)
        for precision in precisions or DEFAULT_PRECISIONS
        for attention in (("fused", "plain") if engine in TORCH_ENGINES else (None,))
    ]
    reference = copy.deepcopy(model).eval()
    expected = reference(example).float()
    forms: dict[Candidate, Engine] = {}
    errors: dict[Candidate, float] = {}
    refused: list[Candidate] = []
    for form in dict.fromkeys([*asked, base]):
        try:
            check_engine(form.engine, form.precision, device)
            call = build(reference, form.engine, form.precision, form.attention != "plain")
            error = _error(_logits(call(example)), expected)
        except Exception as failure:  # each engine has its own
            refused.append(replace(form, reason=first_line(failure)))
            continue
        if error <= tolerance or form == base:
            forms[form], errors[form] = call, error
        else:
            reason = f"its error is above {tolerance:g}"
            refused.append(replace(form, error=error, reason=reason))
    times: dict[Candidate, list[float]] = {form: [] for form in forms}
    for _ in range(rounds):
        for form, call in forms.items():
            times[form].append(time_call(call, example))
    seconds = {form: statistics.median(taken) for form, taken in times.items()}
    measured = {
        form: replace(
            form,
            images_per_second=len(example) / seconds[form],
            error=errors[form],
            reason=None if form in asked else "it was not asked for",
        )
        for form in forms
    }
    possible = [form for form in forms if measured[form].reason is None]
    if not possible:
        least = min((item.error for item in refused if item.error == item.error), default=None)
        if least is None:
            raise ValueError(f"no engine runs the model here: {refused[0].reason}")
        raise ValueError(f"tolerance must be at least {least:.2g} for a form, got {tolerance!r}")
    best = min(possible, key=seconds.__getitem__)
    fastest = forms[best]
    return Optimized(
        run=lambda images: _logits(fastest(images)),
        chosen=measured[best],
        speed_up=seconds[base] / seconds[best],
        candidates=(*measured.values(), *refused),
    )


def _logits(outputs: object) -> Tensor:
    """Engines of files give the kept tokens too."""
    logits = outputs[0] if isinstance(outputs, tuple | list) else outputs
    return torch.as_tensor(logits).float()


def _error(logits: Tensor, expected: Tensor) -> float:
    return float((logits - expected).norm() / expected.norm())
