"""What the backward pass of a masked block need not compute.

A dropped token is blocked: nothing that it becomes later reaches the losses, but for the e⁻²⁸ of
its weight that `attention_bias` leaves it. The gradient of its rows in linear layers and
activations is that small, and is left out here, with the memory that it takes. What the token
would have contributed, which is the gradient of its keep decision, is computed in full.

Axes: B images, H heads, N tokens (prefix tokens included), M kept ones of an image, D channels of a
head.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode


class KeptGradients(TorchFunctionMode):
    """While active, linear layers, GELU and masked attention learn from kept tokens alone.

    The modules that call them, such as timm's blocks, run as they are. On a CPU attention goes
    image by image, so that its weights stay in the cache and out of memory: torch's fused kernel
    there gives no gradient to a mask, and is the slower one in bfloat16. Elsewhere it is torch's.

    Args:
        keep_BN: keep mask, of prefix tokens too; tokens of value 0 are the dropped ones. None where
            all are there: then attention alone is other than torch's.
    """

    def __init__(self, keep_BN: Tensor | None = None) -> None:
        super().__init__()
        self.rows: Tensor | None = None
        self.columns: list[Tensor] | None = None
        if keep_BN is not None:
            self.shape = tuple(keep_BN.shape)
            kept = keep_BN.detach() > 0
            self.rows = kept.flatten().nonzero().squeeze(1)
            self.columns = [row.nonzero().squeeze(1) for row in kept]

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        stand_in = _STAND_INS.get(func)
        return (func if stand_in is None else partial(stand_in, self))(*args, **kwargs or {})

    def _linear(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        if not self._holds_tokens(input):
            return F.linear(input, weight, bias)
        y: Tensor = _Linear.apply(*_autocast(input, weight, bias), self.rows)
        return y

    def _gelu(self, input: Tensor, approximate: str = "none") -> Tensor:
        if not self._holds_tokens(input):
            return F.gelu(input, approximate=approximate)
        y: Tensor = _GELU.apply(input, approximate, self.rows)
        return y

    def _attention(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        **others: Any,
    ) -> Tensor:
        batch, _, tokens, _ = query.shape
        fits = attn_mask is None or attn_mask.shape == (batch, 1, tokens, key.shape[-2])
        if query.device.type != "cpu" or not fits or dropout_p or is_causal or others:
            return F.scaled_dot_product_attention(
                query, key, value, attn_mask, dropout_p, is_causal, scale=scale, **others
            )
        tensors = _autocast(query, key, value, attn_mask)
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        y: Tensor = _Attention.apply(*tensors, scale, self.columns)
        return y

    def _holds_tokens(self, x: Tensor) -> bool:
        learns = self.rows is not None and torch.is_grad_enabled()
        return learns and tuple(x.shape[:-1]) == self.shape


_STAND_INS: dict[Any, Callable[..., Tensor]] = {
    F.linear: KeptGradients._linear,
    F.gelu: KeptGradients._gelu,
    F.scaled_dot_product_attention: KeptGradients._attention,
}


def _autocast(first: Tensor, *others: Tensor | None) -> tuple[Any, ...]:
    """As autocast would hand them to these functions."""
    device, tensors = first.device.type, (first, *others)
    if not torch.is_autocast_enabled(device):
        return tensors
    dtype = torch.get_autocast_dtype(device)
    return tuple(None if tensor is None else tensor.to(dtype) for tensor in tensors)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, rows: Tensor) -> Tensor:
        ctx.save_for_backward(x.flatten(0, -2)[rows], weight, rows)
        ctx.shape, ctx.has_bias = x.shape, bias is not None
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, weight, rows = ctx.saved_tensors
        grad = grad.flatten(0, -2)[rows]
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = _spread(grad @ weight, rows, ctx.shape)
        grad_weight = grad.t() @ x if ctx.needs_input_grad[1] else None
        grad_bias = grad.sum(0) if ctx.has_bias else None
        return grad_x, grad_weight, grad_bias, None


class _GELU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, approximate: str, rows: Tensor) -> Tensor:
        ctx.save_for_backward(x.flatten(0, -2)[rows], rows)
        ctx.approximate = approximate
        return F.gelu(x, approximate=approximate)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        x, rows = ctx.saved_tensors
        kept = torch.ops.aten.gelu_backward(
            grad.flatten(0, -2)[rows], x, approximate=ctx.approximate
        )
        return _spread(kept, rows, grad.shape), None, None


class _Attention(torch.autograd.Function):
    """Attention under a mask [B, 1, N, N], which has a gradient too.

    The weights are made anew in the backward pass; of the kept tokens alone, since no gradient
    comes to what others saw.
    """

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        mask: Tensor | None,
        scale: float,
        columns: list[Tensor] | None,
    ) -> Tensor:
        ctx.save_for_backward(q, k, v, mask)
        ctx.scale, ctx.columns = scale, columns
        batch, heads, tokens, _ = q.shape
        out = v.new_empty(batch, tokens, heads, v.shape[-1]).transpose(1, 2)  # as blocks read it
        for image in range(len(q)):
            bias = None if mask is None else mask[image]
            out[image] = _weights(q[image] * scale, k[image], bias) @ v[image]
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        q, k, v, mask = ctx.saved_tensors
        grad_q, grad_k, grad_v = torch.zeros_like(q), torch.empty_like(k), torch.empty_like(v)
        grad_mask = None if mask is None else mask.new_zeros(mask.shape)
        for image in range(len(q)):
            kept = slice(None) if ctx.columns is None else ctx.columns[image]
            q_HMD, grad_HMD = q[image][:, kept] * ctx.scale, grad[image][:, kept]
            weight_HMN = _weights(q_HMD, k[image], None if mask is None else mask[image][:, kept])
            grad_v[image] = weight_HMN.transpose(1, 2) @ grad_HMD
            grad_score = torch._softmax_backward_data(
                grad_HMD @ v[image].transpose(1, 2), weight_HMN, -1, q.dtype
            )
            if grad_mask is not None:
                grad_mask[image, 0, kept] = grad_score.sum(0)
            grad_q[image][:, kept] = (grad_score @ k[image]) * ctx.scale
            grad_k[image] = grad_score.transpose(1, 2) @ q_HMD
        return grad_q, grad_k, grad_v, grad_mask, None, None


def _weights(q_HMD: Tensor, k_HND: Tensor, bias: Tensor | None) -> Tensor:
    k_HDN = k_HND.transpose(1, 2)
    score = q_HMD @ k_HDN if bias is None else torch.baddbmm(bias, q_HMD, k_HDN)
    return score.softmax(-1)


def _spread(values: Tensor, rows: Tensor, shape: Any) -> Tensor:
    """Rows in their places of a tensor of zeros: [..., C]."""
    whole = values.new_zeros(shape)
    whole.flatten(0, -2)[rows] = values
    return whole
