"""Eager PyTorch whose linear layers have their weights packed once, not in every call.

A matrix product first copies its weights into the order that the kernel reads. That takes as long
for few tokens as for many, so a pruned model pays for it as much as a dense one. These are the
operators that torch.compile calls in a frozen program; here nothing is compiled.
"""

from __future__ import annotations

from typing import Any, cast

import torch
from torch import Tensor, nn


def can_pack() -> bool:
    """Whether this build of torch has the libraries: MKL for float32, oneDNN for bfloat16."""
    return torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()


def pack(model: nn.Module) -> nn.Module:
    """Replace the linear layers of a model, float32 or bfloat16 on the CPU; for inference."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child) is nn.Linear:
                setattr(module, name, _PackedLinear(child))
    return model


class _PackedLinear(nn.Module):
    """`nn.Linear` for inference; outputs may differ by rounding."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        # Some models read these instead of calling the layer.
        self.weight = nn.Parameter(linear.weight.detach(), requires_grad=False)
        self.bias = linear.bias
        self.packed: dict[int, Any] = {}  # MKL packs for a number of rows; oneDNN for any, as 0

    def forward(self, x: Tensor) -> Tensor:
        if x.dtype == torch.float32:
            rows = x.numel() // x.shape[-1]
            if rows not in self.packed:
                self.packed[rows] = torch.ops.mkl._mkl_reorder_linear_weight(self.weight, rows)
            found = torch.ops.mkl._mkl_linear(x, self.packed[rows], self.weight, self.bias, rows)
        else:
            if 0 not in self.packed:
                self.packed[0] = torch.ops.mkldnn._reorder_linear_weight(self.weight)
            found = torch.ops.mkldnn._linear_pointwise(x, self.packed[0], self.bias, "none", [], "")
        return cast(Tensor, found)
