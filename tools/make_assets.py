"""Make what the quickstart carries, from the whole of Fashion-MNIST and a training run.

    python tools/make_assets.py images FASHION_MNIST_DIR   # torchvision's folder
    python tools/make_assets.py model RUN_DIR              # of configs/fashion_mnist_56px.yaml

Images become one contact sheet a class and split, of 28×28 tiles in the order of the source.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torchvision.datasets import FashionMNIST

from dynamicvit.io.embedded import ASSETS, SHEET_COLUMNS
from dynamicvit.io.folder import save_folder
from dynamicvit.io.load import load_model

PER_CLASS = {"train": 600, "val": 200}


def make_images(root: str) -> None:
    for split, count in PER_CLASS.items():
        source = FashionMNIST(root, train=split == "train")
        folder = ASSETS / "images" / split
        folder.mkdir(parents=True, exist_ok=True)
        for index, name in enumerate(source.classes):
            tiles = source.data[source.targets == index][:count].numpy()
            rows = tiles.reshape(-1, SHEET_COLUMNS, 28, 28).transpose(0, 2, 1, 3)
            sheet = Image.fromarray(np.ascontiguousarray(rows).reshape(-1, SHEET_COLUMNS * 28))
            sheet.save(folder / f"{index} {name.replace('/', '-')}.png", optimize=True)


def make_model(run: str) -> None:
    model = load_model(Path(run) / "best")
    for key in ("tag", "license"):  # those of timm's weights of the same architecture
        model.pretrained_cfg.pop(key, None)
    # Half precision halves the package; weights are read back as float32.
    save_folder(model, ASSETS / "model", dtype=torch.float16)


if __name__ == "__main__":
    if len(sys.argv) != 3 or sys.argv[1] not in ("images", "model"):
        sys.exit(__doc__)
    {"images": make_images, "model": make_model}[sys.argv[1]](sys.argv[2])
