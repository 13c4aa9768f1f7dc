"""Vision transformers made fast by letting uninformative tokens leave (arXiv 2106.02034)."""

from typing import TYPE_CHECKING, Any

from dynamicvit import backbones
from dynamicvit.checkpoint import from_released, load
from dynamicvit.core.backbone import UnsupportedBackbone
from dynamicvit.core.macs import count_gmacs
from dynamicvit.core.model import SparseOutput, SparseViT, sparsify
from dynamicvit.core.schedule import KeepSchedule
from dynamicvit.core.scorer import TokenScorer

if TYPE_CHECKING:
    from dynamicvit.deploy.optimize import optimize

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
    "optimize",
    "sparsify",
]


def __getattr__(name: str) -> Any:
    # What takes more than timm does is imported when it is asked for.
    if name == "optimize":
        from dynamicvit.deploy.optimize import optimize  # noqa: PLC0415

        return optimize
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
