"""Export a DeiT-S at keep ratio 0.7 to every format, and write how each does beside PyTorch.

    python benchmarks/export.py benchmarks/results/export.json

Its weights are random, far from timm's initial ones, which would make all images look alike.
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
from dynamicvit.environment import environment
from dynamicvit.files import write_text

EXPORTS = [
    *((kind, "float32") for kind in FORMATS),
    ("onnx", "float16"),
    ("openvino", "bfloat16"),
    ("torch", "bfloat16"),
    ("aoti", "bfloat16"),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("results", help="JSON file to write")
    parser.add_argument("--images", help="folder of images; by default those in the package")
    parser.add_argument("--samples", type=int, default=256, help="images to compare on")
    parser.add_argument("--only", nargs="*", help="formats, of all")
    options = parser.parse_args()
    model = deit_small()
    exports = []
    with tempfile.TemporaryDirectory() as folder:
        for kind, precision in EXPORTS:
            if options.only and kind not in options.only:
                continue
            start = time.perf_counter()
            name = f"{kind}-{precision}{FORMATS[kind][0]}"
            exported = export_model(
                model,
                Path(folder, name),
                kind,
                precision,
                images=options.images,
                samples=options.samples,
            )
            seconds = round(time.perf_counter() - start, 1)
            print_exported([exported])
            exports.append({**asdict(exported), "path": name, "seconds": seconds})
    settings = {
        "model": "deit_small_patch16_224, random weights (seed 0 + noise 0.05, seed 1)",
        "keep_ratio": 0.7,
        "images": options.images or "embedded",
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
