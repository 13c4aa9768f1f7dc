"""The fastest form of a pruned DeiT-S on this machine beside the fastest eager dense one.

    python benchmarks/fastest.py benchmarks/results/fastest.json

Both are what `dynamicvit.optimize` chooses at each batch size: of dense among eager PyTorch's
precisions and kinds of attention, of pruned among all engines. They are then timed in turn, on the
same images. Weights are fresh, which takes as long as trained ones; so nearness to float32 is not
asked for.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import timm
import torch

from dynamicvit import count_gmacs, optimize, sparsify
from dynamicvit.evaluation.environment import environment
from dynamicvit.evaluation.timing import compare_times, interleave, medians
from dynamicvit.io.files import write_text

MODEL = "deit_small_patch16_224"
SIZE = (3, 224, 224)
SCHEDULES: dict[str, dict[str, Any]] = {
    "published counts": {},
    "align 16": {"align": 16},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("results", help="JSON file to write")
    parser.add_argument("--engines", nargs="+", help="for the pruned model; by default all")
    parser.add_argument("--batch_sizes", type=int, nargs="+", default=[1, 16, 32])
    parser.add_argument("--seconds", type=float, default=10.0, help="for each pair, at least")
    options = parser.parse_args()
    dense = timm.create_model(MODEL).eval()
    rows = []
    for batch_size in options.batch_sizes:
        images = torch.randn(batch_size, *SIZE)
        eager = optimize(dense, images, tolerance=float("inf"), engines=["eager"])
        for name, schedule in SCHEDULES.items():
            sparse = sparsify(dense, keep_ratio=0.7, **schedule).eval()
            fast = optimize(sparse, images, tolerance=float("inf"), engines=options.engines)
            print(f"batch {batch_size}, {name}\n  dense: {eager}\n  pruned: {fast}")
            times = interleave([eager, fast], [images], options.seconds)
            speed_up, (low, high) = compare_times(times)
            seconds = medians(times)
            rows.append(
                {
                    "batch_size": batch_size,
                    "schedule": name,
                    "gmacs": count_gmacs(sparse, SIZE),
                    "dense": asdict(eager.chosen),
                    "sparse": asdict(fast.chosen),
                    "dense_images_per_second": batch_size / seconds[0],
                    "sparse_images_per_second": batch_size / seconds[1],
                    "speed_up": speed_up,
                    "spread": (low, high),
                    "candidates": [asdict(item) for item in fast.candidates if item.reason is None],
                }
            )
            print(f"  {speed_up:.2f}× ({low:.2f}–{high:.2f})")
    report = {"model": MODEL, "rows": rows, "environment": environment()}
    write_text(Path(options.results), json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
