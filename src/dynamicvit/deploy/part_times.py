"""Where the time of a pruned model goes: embedding, scorers, blocks, head."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from dynamicvit.core.model import SparseViT
from dynamicvit.evaluation.timing import medians, time_call


@torch.inference_mode()
def part_times(model: SparseViT, images: Tensor, rounds: int = 5) -> dict[str, float]:
    """Where time goes, eager and in float32: milliseconds of the embedding, of each stage's scorer
    and blocks, and of norm and head; medians over rounds. "other" is selection and gathering."""
    fused = model.fuse()  # a copy
    backbone = fused.backbone
    parts: dict[str, list[Any]] = {"embed": [backbone.patch_embed]}
    edges = (0, *fused.schedule.blocks, len(backbone.blocks))
    for stage, (start, end) in enumerate(pairwise(edges)):
        if stage:
            parts[f"scorer {stage}"] = [fused.scorers[stage - 1]]
        if end > start:
            name = f"block {start}" if end == start + 1 else f"blocks {start}–{end - 1}"
            parts[name] = list(backbone.blocks[start:end])
    parts["norm and head"] = [backbone.norm, backbone.head]
    spent: dict[str, float] = {}

    def timed(name: str, forward: Callable[..., Any]) -> Callable[..., Any]:
        def run(x: Tensor, *args: Any, **kwargs: Any) -> Any:
            seconds, result = time_call(lambda x: forward(x, *args, **kwargs), x)
            spent[name] = spent.get(name, 0.0) + seconds
            return result

        return run

    for name, modules in parts.items():
        for module in modules:
            module.forward = timed(name, module.forward)
    fused(images)
    times = []
    for _ in range(rounds):
        spent.clear()
        whole, _ = time_call(fused, images)
        times.append((*(spent.get(name, 0.0) for name in parts), whole - sum(spent.values())))
    return {
        name: 1e3 * seconds for name, seconds in zip((*parts, "other"), medians(times), strict=True)
    }
