"""Architectures that timm lacks, and sparse models by name.

Importing this package registers them with timm.
"""

from dynamicvit.models import deit, lvvit, names

__all__ = ["deit", "lvvit", "names"]
