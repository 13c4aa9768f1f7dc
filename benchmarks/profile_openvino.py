"""Where OpenVINO's time goes in a dense and a pruned DeiT-S, a kind of operation a row.

    python benchmarks/profile_openvino.py benchmarks/results/profile_openvino.json

OpenVINO counts by itself, at batch 1, where the speed-up is least; dense and pruned in turn.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

import openvino
import timm
import torch

from dynamicvit import sparsify
from dynamicvit.deploy.engines import save
from dynamicvit.deploy.formats import OPENVINO_HINTS
from dynamicvit.deploy.runtime import openvino_core
from dynamicvit.evaluation.environment import environment
from dynamicvit.io.files import write_text

MODEL = "deit_small_patch16_224"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("results", help="JSON file to write")
    parser.add_argument("--rounds", type=int, default=100, help="calls of each model")
    options = parser.parse_args()
    dense = timm.create_model(MODEL).eval()
    models = {"dense": dense, "pruned": sparsify(dense, keep_ratio=0.7).eval()}
    image = torch.randn(1, 3, 224, 224).numpy()
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        graphs = {}
        for name, model in models.items():
            (Path(folder) / name).mkdir()
            graphs[name] = save(model, "openvino", "float32", Path(folder) / name)
        for precision in ("float32", "bfloat16"):
            requests = {name: _request(path, precision) for name, path in graphs.items()}
            spent: dict[str, list[Counter[str]]] = {name: [] for name in models}
            for request in requests.values():
                request.infer({0: image})
            for _ in range(options.rounds):
                for name, request in requests.items():
                    request.infer({0: image})
                    spent[name].append(_spent(request))
            kinds = {kind for counts in spent.values() for count in counts for kind in count}
            for kind in sorted(kinds):
                ms = {
                    name: statistics.median(count[kind] for count in counts)
                    for name, counts in spent.items()
                }
                rows.append({"precision": precision, "operation": kind, **ms})
            whole = {name: statistics.median(c.total() for c in cs) for name, cs in spent.items()}
            rows.append({"precision": precision, "operation": "all", **whole})
    for row in sorted(rows, key=lambda row: (row["precision"], -row["dense"])):
        print("{precision} {operation}: {dense:.2f} → {pruned:.2f} ms".format(**row))
    report = {"model": MODEL, "milliseconds": rows, "environment": environment()}
    write_text(Path(options.results), json.dumps(report, indent=2) + "\n")


def _request(path: Path, precision: str) -> Any:
    compiled = openvino_core().compile_model(
        path,
        "CPU",
        {
            "INFERENCE_PRECISION_HINT": OPENVINO_HINTS[precision],
            "INFERENCE_NUM_THREADS": torch.get_num_threads(),
            "PERF_COUNT": "YES",
        },
    )
    return compiled.create_infer_request()


def _spent(request: Any) -> Counter[str]:
    """Milliseconds of each kind of operation in the last call."""
    spent: Counter[str] = Counter()
    for item in request.profiling_info:
        if item.status == openvino.ProfilingInfo.Status.EXECUTED:
            spent[item.node_type] += item.real_time.total_seconds() * 1e3
    return spent


if __name__ == "__main__":
    main()
