"""What this machine's processor can compute."""

from __future__ import annotations

from functools import cache

import torch
from torch.backends import mkldnn as onednn


@cache
def has_bfloat16() -> bool:
    """Whether torch computes bfloat16 on this processor by oneDNN.

    Elsewhere torch has plain loops for it, several times slower than float32.
    """
    return onednn.is_available() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
