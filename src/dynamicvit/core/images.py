"""Opened pictures, in the form that a model of so many channels takes."""

from __future__ import annotations

from PIL import Image

MODES = {1: "L", 3: "RGB", 4: "RGBA"}  # channels → Pillow's name of what they are


def convert_image(image: Image.Image, mode: str) -> Image.Image:
    """`image.convert(mode)`, with transparent palettes read the way Pillow asks for."""
    if image.mode == "P" and "transparency" in image.info:
        image = image.convert("RGBA")
    return image.convert(mode)
