"""Vision transformers made fast by letting uninformative tokens leave (arXiv 2106.02034)."""

import importlib
from typing import TYPE_CHECKING, Any

from dynamicvit import models
from dynamicvit.core.backbones import UnsupportedBackbone
from dynamicvit.core.macs import count_gmacs
from dynamicvit.core.model import SparseOutput, SparseViT, sparsify
from dynamicvit.core.schedule import KeepSchedule
from dynamicvit.core.selectors.learned import TokenScorer
from dynamicvit.io.load import load
from dynamicvit.io.released import from_released

if TYPE_CHECKING:
    from dynamicvit.deploy.optimize import optimize
    from dynamicvit.deploy.search import search
    from dynamicvit.views.explain import explain

__version__ = "0.1.0"

__all__ = [
    "KeepSchedule",
    "SparseOutput",
    "SparseViT",
    "TokenScorer",
    "UnsupportedBackbone",
    "count_gmacs",
    "explain",
    "from_released",
    "load",
    "models",
    "optimize",
    "search",
    "sparsify",
]


# What takes more than timm does is imported when it is asked for.
_LAZY = {
    "explain": "dynamicvit.views.explain",
    "optimize": "dynamicvit.deploy.optimize",
    "search": "dynamicvit.deploy.search",
}


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
