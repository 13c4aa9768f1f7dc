"""Opened pictures, in the form that a model of so many channels takes."""

from __future__ import annotations

import numpy as np
from PIL import Image

# Files of a folder that count as images; timm by itself leaves all but PNG and JPEG out unsaid.
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
MODES = {1: "L", 3: "RGB", 4: "RGBA"}  # channels → Pillow's name of what they are


def convert_image(image: Image.Image, mode: str) -> Image.Image:
    """`image.convert(mode)`, with transparent palettes read the way Pillow asks for, and 16 bits a
    pixel brought to 8.

    Raises:
        ValueError: if pixels are not of 8 or 16 bits, so that white is not known.
    """
    if image.mode.startswith("I"):  # Pillow's own conversion would cut off, not scale
        pixels = np.asarray(image)
        if pixels.min() < 0 or pixels.max() > 0xFFFF:
            raise ValueError(f"its pixels are of 32 bits (mode {image.mode})")
        image = Image.fromarray((pixels // 257).astype(np.uint8))
    elif image.mode == "F":
        raise ValueError("its pixels are floating point (mode F)")
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert(mode)
