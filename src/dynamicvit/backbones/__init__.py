"""Architectures that timm lacks, and sparse models by name.

Importing this package registers them with timm.
"""

from dynamicvit.backbones import deit, lvvit, sparse

__all__ = ["deit", "lvvit", "sparse"]
