"""The fastest form of a model on this machine."""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from dynamicvit.core.model import SparseViT
from dynamicvit.deploy.engines import (
    DEFAULT_PRECISIONS,
    ENGINES,
    TORCH_ENGINES,
    build,
    check_engine,
    check_engines,
    first_line,
    installed,
)
from dynamicvit.evaluation.console import show_steps
from dynamicvit.evaluation.timing import Engine, Round, compare_times, medians, take_turns
from dynamicvit.io.arguments import check_types

_NO_TIME = "there was no time left"


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
        dense_images_per_second: of a SparseViT's dense backbone in the same form, timed in turn
            with it. None for a dense model, and where there was no time to measure it.
        input_size: (C, H, W) of the images that `run` takes.
        device: where they lie.
    """

    run: Callable[[Tensor], Tensor]
    chosen: Candidate
    speed_up: float
    candidates: tuple[Candidate, ...]
    dense_images_per_second: float | None
    input_size: tuple[int, ...]
    device: torch.device

    def __call__(self, images: Tensor) -> Tensor:
        """Logits [B, num_classes] float32.

        Raises:
            TypeError, ValueError: if `images` are not as the example was, but for their number.
        """
        _check_images("images", images)
        if tuple(images.shape[1:]) != self.input_size:
            size = ", ".join(map(str, self.input_size))
            raise ValueError(f"images must have shape [B, {size}], got {list(images.shape)}")
        if images.device != self.device:
            raise ValueError(f"images must be on {self.device}, got {images.device}")
        return self.run(images)

    def __str__(self) -> str:
        attention = f", {self.chosen.attention} attention" if self.chosen.attention else ""
        speed, dense = self.chosen.images_per_second, self.dense_images_per_second
        text = (
            f"{self.chosen.engine}, {self.chosen.precision}{attention}: {speed:.1f} images/s, "
            f"{self.speed_up:.2f}× eager float32; logits within {self.chosen.error:.1g}"
        )
        if dense is not None and dense > speed:
            text += f"\nthe dense model is faster in this form: {dense:.1f} images/s"
        elif dense is not None:
            text += f"\n{speed / dense:.2f}× the dense model in this form, {dense:.1f} images/s"
        if any(candidate.reason == _NO_TIME for candidate in self.candidates):
            text += "\nstopped early: not every form was tried"
        return text


@check_types
@torch.no_grad()
def optimize(
    model: nn.Module,
    example: Tensor,
    tolerance: float = 1e-3,
    engines: Sequence[str] | None = None,
    precisions: Sequence[str] | None = None,
    rounds: int = 7,
    seconds: float | None = None,
    quiet: bool = False,
) -> Optimized:
    """Measure a model in every engine and precision of this machine, and take the fastest.

    Ctrl-C ends the search with the best form so far; a second one ends it without.

    Args:
        model: a SparseViT or a dense timm model, in eval mode; it is copied, not modified.
        example: images [B, C, H, W] float32 of the batch size that will be used, on the model's
            device. Real ones judge the error better than noise.
        tolerance: largest relative norm of the difference from PyTorch's float32 logits. bfloat16
            makes about 1e-2; near-tied tokens that change their order make more.
        engines: keys of `dynamicvit.deploy.engines.ENGINES`; by default all that are installed.
        precisions: which to try, where an engine has them; by default float32 and bfloat16.
        rounds: calls of each candidate that are timed, in turn.
        seconds: time budget. When it is over, no further form is built, and each that was built is
            timed at least once; what has begun is finished. By default there is no limit.
        quiet: show no progress.

    Returns:
        The fastest that stays within the tolerance, with everything that was measured, and why the
        others are out: an engine that fails (torch.compile without a C++ compiler) is one of those.

    Raises:
        TypeError, ValueError: naming the argument and what was got; if an engine or precision that
            was asked for is not there, or nothing that was is within the tolerance.
    """
    _check(model, example, tolerance, rounds, seconds)
    check_engines(engines, precisions, example.device.type)
    # What every candidate is compared with is measured, even if it was not asked for.
    base = Candidate("eager", "float32", "fused")
    asked = _list_forms(engines or tuple(filter(installed, ENGINES)), precisions)
    reference = copy.deepcopy(model).eval()
    with show_steps(quiet) as report:
        trials = _Trials(reference, example, tolerance, seconds, report)
        trials.build(list(dict.fromkeys([base, *asked])))
        possible = [form for form in trials.calls if form in asked]
        if not possible:
            raise trials.failure()
        times = trials.time(list(trials.calls.values()), rounds, "timing all forms in turn")
        took = dict(zip(trials.calls, medians(times), strict=True))
        best = min(possible, key=took.__getitem__)
        dense = trials.dense_speed(best, rounds)
    measured = {
        form: replace(
            form,
            images_per_second=len(example) / took[form],
            error=trials.errors[form],
            reason=None if form in asked else "it was not asked for",
        )
        for form in trials.calls
    }
    fastest = trials.calls[best]
    return Optimized(
        run=lambda images: _logits(fastest(images)),
        chosen=measured[best],
        speed_up=took[base] / took[best],
        candidates=(*measured.values(), *trials.refused),
        # The dense model was timed in turn with the best form only, so only their ratio is used.
        dense_images_per_second=None if dense is None else len(example) / (took[best] * dense),
        input_size=tuple(example.shape[1:]),
        device=example.device,
    )


def _list_forms(engines: Sequence[str], precisions: Sequence[str] | None) -> list[Candidate]:
    """A compiler takes longest, so it comes last: a time budget may end before."""
    return [
        Candidate(engine, precision, attention)
        for engine in sorted(engines, key=lambda name: name == "compile")
        for precision in precisions or DEFAULT_PRECISIONS
        for attention in (("fused", "plain") if engine in TORCH_ENGINES else (None,))
    ]


class _Trials:
    """Forms that were built, until the time is over or the user ends it.

    Attributes:
        calls, errors: of each form that can be called, and is near enough or the base.
        refused: the others, with their reasons.
        stopped: whether Ctrl-C was pressed.
    """

    def __init__(
        self,
        model: nn.Module,
        example: Tensor,
        tolerance: float,
        seconds: float | None,
        report: Callable[..., None],
    ) -> None:
        self.model = model
        self.example = example
        self.tolerance = tolerance
        self.seconds = seconds
        self.end = float("inf") if seconds is None else time.monotonic() + seconds
        self.report = report
        self.calls: dict[Candidate, Engine] = {}
        self.errors: dict[Candidate, float] = {}
        self.refused: list[Candidate] = []
        self.stopped = False

    @property
    def over(self) -> bool:
        return self.stopped or time.monotonic() >= self.end

    def build(self, forms: list[Candidate]) -> None:
        """Build and check each; the first is the base, and it is built in any case."""
        expected = _logits(self.model(self.example))
        if not expected.isfinite().all():
            raise ValueError("model must give finite logits, got NaN or infinity")
        for index, form in enumerate(forms):
            if index and self.over:
                self.refused.append(replace(form, reason=_NO_TIME))
                continue
            name = ", ".join(filter(None, (form.engine, form.precision, form.attention)))
            reason, error = None, float("nan")
            try:
                self.report(f"building {name}", f"({index + 1} of {len(forms)})")
                check_engine(form.engine, form.precision, self.example.device.type)
                call = build(self.model, form.engine, form.precision, form.attention != "plain")
                error = _error(_logits(call(self.example)), expected)
                if index and not error <= self.tolerance:
                    reason = f"its error is above {self.tolerance:g}"
            except (Exception, KeyboardInterrupt) as failure:  # each engine has its own
                if not index:
                    raise
                self.stopped = isinstance(failure, KeyboardInterrupt)
                reason = _NO_TIME if self.stopped else first_line(failure)
            if reason is None:
                self.calls[form], self.errors[form] = call, error
            else:
                self.refused.append(replace(form, error=error, reason=reason))

    def time(self, calls: list[Engine], rounds: int, step: str) -> list[Round]:
        """Rounds in turn; fewer where the time is over, but one at least."""
        times: list[Round] = []
        turns = take_turns(calls, [self.example])
        while len(times) < rounds and not (times and self.over):
            self.report(step, f"({len(times) + 1} of {rounds} rounds)")
            try:
                times.append(next(turns))
            except KeyboardInterrupt:
                if not times:
                    raise
                self.stopped = True
        return times

    def dense_speed(self, form: Candidate, rounds: int) -> float | None:
        """Time of the dense backbone in this form / time of the sparse model; None if unknown."""
        if not isinstance(self.model, SparseViT) or self.over:
            return None
        step = "timing the dense model in the fastest form"
        self.report(step)
        try:
            dense = build(
                self.model.backbone, form.engine, form.precision, form.attention != "plain"
            )
            times = self.time([dense, self.calls[form]], rounds, step)
        except (Exception, KeyboardInterrupt):  # the sparse model runs: that was asked for
            return None
        return compare_times(times)[0]

    def failure(self) -> BaseException:
        """Why there is no form to take, where all that was asked for is refused."""
        errors = [form.error for form in self.refused if form.error == form.error]
        if errors:
            text = f"tolerance must be at least {min(errors):.2g} for a form, got {self.tolerance}"
            return ValueError(text)
        if self.refused[0].reason == _NO_TIME:  # no form was built but the base
            if self.stopped:
                return KeyboardInterrupt()
            return ValueError(f"seconds is too short to build a form, got {self.seconds}")
        return ValueError(f"no engine runs the model here: {self.refused[0].reason}")


def _check(
    model: nn.Module, example: Tensor, tolerance: float, rounds: int, seconds: float | None
) -> None:
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a SparseViT or a timm model, got {model!r}")
    _check_images("example", example)
    device = next((weight.device for weight in model.parameters()), example.device)
    if example.device != device:
        raise ValueError(f"example must be on the model's device {device}, got {example.device}")
    if not example.isfinite().all():
        raise ValueError("example must be finite, got NaN or infinity")
    if not tolerance >= 0:
        raise ValueError(f"tolerance must be 0 or more, got {tolerance!r}")
    if rounds < 1:
        raise ValueError(f"rounds must be 1 or more, got {rounds!r}")
    if seconds is not None and not seconds > 0:
        raise ValueError(f"seconds must be above 0, got {seconds!r}")


def _check_images(name: str, images: Tensor) -> None:
    if not isinstance(images, Tensor):
        raise TypeError(f"{name} must be images [B, C, H, W], got {type(images).__name__}")
    if images.ndim != 4 or len(images) < 1:
        raise ValueError(f"{name} must be images [B, C, H, W], got {tuple(images.shape)}")
    if images.dtype != torch.float32:
        raise TypeError(f"{name} must be float32, got {images.dtype}")


def _logits(outputs: object) -> Tensor:
    """Engines of files give the kept tokens too."""
    logits = outputs[0] if isinstance(outputs, tuple | list) else outputs
    return torch.as_tensor(logits).float()


def _error(logits: Tensor, expected: Tensor) -> float:
    # A new head may give zeros.
    return float((logits - expected).norm() / expected.norm().clamp_min(1e-30))
