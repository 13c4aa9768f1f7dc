"""Vision transformers made fast by letting uninformative tokens leave (arXiv 2106.02034)."""

from dynamicvit import backbones
from dynamicvit.checkpoint import from_released, load
from dynamicvit.core.backbone import UnsupportedBackbone
from dynamicvit.core.macs import count_gmacs
from dynamicvit.core.model import SparseOutput, SparseViT, sparsify
from dynamicvit.core.schedule import KeepSchedule
from dynamicvit.core.scorer import TokenScorer

__version__ = "0.1.0"

__all__ = [
    "KeepSchedule",
    "SparseOutput",
    "SparseViT",
    "TokenScorer",
    "UnsupportedBackbone",
    "backbones",
    "count_gmacs",
    "from_released",
    "load",
    "sparsify",
]
