"""Export a model to every format, and write how each does beside PyTorch.

    python benchmarks/export.py benchmarks/results/export.json
    python benchmarks/export.py benchmarks/results/export_quickstart.json --samples 2000
        --model quickstart/sparse --images quickstart/fashion_mnist/val
        --calibration quickstart/fashion_mnist/train

By default it is a DeiT-S at keep ratio 0.7, whose weights are random, far from timm's initial ones,
which would make all images look alike. int8 needs a trained model and calibration images.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

import timm
import torch

from dynamicvit import SparseViT, sparsify
from dynamicvit.deploy.export import FORMATS, export_model, print_exported
from dynamicvit.evaluation.environment import environment
from dynamicvit.io.files import write_text
from dynamicvit.io.load import load_model

EXPORTS = [
    *((kind, "float32") for kind in FORMATS),
    ("onnx", "float16"),
    ("openvino", "bfloat16"),
    ("torch", "bfloat16"),
    ("aoti", "bfloat16"),
    ("onnx", "int8"),
    ("openvino", "int8"),
]


DEIT_SMALL = (
    "deit_small_patch16_224 at keep ratio 0.7, random weights (seed 0 + noise 0.05, seed 1)"
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("results", help="JSON file to write")
    parser.add_argument("--model", help="model folder; by default a DeiT-S of random weights")
    parser.add_argument(
        "--calibration", help="folder of images for int8, which is left out without"
    )
    parser.add_argument("--images", help="folder of images; by default those in the package")
    parser.add_argument("--samples", type=int, default=256, help="images to compare on, at most")
    parser.add_argument("--only", nargs="*", help="formats, of all")
    options = parser.parse_args()
    model = load_model(options.model) if options.model else deit_small()
    exports = []
    with tempfile.TemporaryDirectory() as folder:
        for kind, precision in EXPORTS:
            if options.only and kind not in options.only:
                continue
            if precision == "int8" and options.calibration is None:
                continue
            start = time.perf_counter()
            name = f"{kind}-{precision}{FORMATS[kind][0]}"
            exported = export_model(
                model,
                Path(folder, name),
                kind,
                precision,
                images=options.images,
                calibration=options.calibration if precision == "int8" else None,
                samples=options.samples,
            )
            seconds = round(time.perf_counter() - start, 1)
            print_exported(exported)
            exports.append({**asdict(exported), "path": name, "seconds": seconds})
    settings = {
        "model": options.model or DEIT_SMALL,
        "images": options.images or "embedded",
        "calibration": options.calibration,
    }
    report = {"settings": settings, "exports": exports, "environment": environment()}
    write_text(Path(options.results), json.dumps(report, indent=2) + "\n")


def deit_small() -> SparseViT:
    torch.manual_seed(0)
    model = sparsify(timm.create_model("deit_small_patch16_224"), keep_ratio=0.7)
    noise = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=noise))
    return model.eval()


if __name__ == "__main__":
    main()
