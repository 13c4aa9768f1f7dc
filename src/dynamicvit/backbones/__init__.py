"""Architectures that timm lacks. Importing this package registers them with timm."""

from dynamicvit.backbones import deit, lvvit

__all__ = ["deit", "lvvit"]
