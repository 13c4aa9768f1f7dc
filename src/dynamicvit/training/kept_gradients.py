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
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.backends import mkldnn as onednn
from torch.overrides import TorchFunctionMode

from dynamicvit.core.backbones import Adapter, Backbone
from dynamicvit.core.paths import Masked
from dynamicvit.core.tokens import Tokens
from dynamicvit.evaluation.processor import has_bfloat16

GROUP = 2**18  # attention weights that are computed together on a CPU


class KeptMasked(Masked):
    """The masked path, with blocks that learn from kept tokens alone.

    For a loss that sees logits, kept tokens and decisions, as the paper's do, gradients stay the
    same up to rounding. (In a model without prefix tokens, an image that keeps nothing teaches
    later blocks nothing.) It takes less time and memory on a CPU. It has no second-order gradients,
    and does not go with torch.compile or gradient checkpointing.
    """

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._keep: Tensor | None = None
        self._mode = KeptGradients()

    def run_block(self, adapter: Adapter, model: Backbone, block: int, tokens: Tokens) -> Tensor:
        if tokens.keep is not self._keep:  # once a stage: finding the kept rows takes time
            self._keep = tokens.keep
            self._mode = KeptGradients(
                F.pad(cast(Tensor, tokens.keep), (tokens.num_prefix, 0), value=1.0)
            )
        with self._mode:
            return super().run_block(adapter, model, block, tokens)


class KeptGradients(TorchFunctionMode):
    """While active, linear layers, GELU and masked attention learn from kept tokens alone.

    The modules that call them, such as timm's blocks, run as they are. Linear, GELU, linear in a
    row, with nothing in between, has one backward pass.

    On a CPU attention goes by few images at a time, so that its weights stay in the cache and out
    of memory: torch's fused kernel there gives no gradient to a mask, and is the slower one in
    bfloat16. Elsewhere it is torch's.

    Args:
        keep_BN: keep mask, of prefix tokens too; tokens of value 0 are the dropped ones. None where
            all are there: then only a CPU computes otherwise than without this.
    """

    def __init__(self, keep_BN: Tensor | None = None) -> None:
        super().__init__()
        self.rows: Tensor | None = None
        self.columns: list[Tensor] | None = None
        self.product: _Product | None = None  # the last ones, for what may follow
        self.activation: _Activation | None = None
        if keep_BN is not None:
            self.shape = tuple(keep_BN.shape)
            kept = keep_BN.detach() > 0
            self.rows = kept.flatten().nonzero().squeeze(1)
            if kept.device.type == "cpu":  # attention elsewhere does not ask, and each would wait
                self.columns = [row.nonzero().squeeze(1) for row in kept]

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        stand_in = _STAND_INS.get(func)
        return (func if stand_in is None else partial(stand_in, self))(*args, **kwargs or {})

    def _linear(self, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        x, weight, bias = _autocast(input, weight, bias)
        if not self._holds_tokens(input):
            if not torch.is_grad_enabled():
                return _linear(x, weight, bias)
            every: Tensor = _Linear.apply(x, weight, bias, x.detach().flatten(0, -2), None)
            return every
        before = self.activation
        if before is not None and _untouched(before, input):
            y: Tensor = _MLP.apply(
                *before.product.arguments,
                before.product.x_kept,
                before.x_kept,
                before.approximate,
                x.detach(),
                weight,
                bias,
                self.rows,
            )
            self.product = self.activation = None
            return y
        x_kept = self._kept(x)
        y = _Linear.apply(x, weight, bias, x_kept, self.rows)
        self.product = _Product(y, y._version, (x, weight, bias), x_kept)
        return y

    def _gelu(self, input: Tensor, approximate: str = "none") -> Tensor:
        if not self._holds_tokens(input):
            return F.gelu(input, approximate=approximate)
        x_kept = self._kept(input)
        y: Tensor = _GELU.apply(input, approximate, x_kept, self.rows)
        if self.product is not None and _untouched(self.product, input):
            self.activation = _Activation(y, y._version, self.product, x_kept, approximate)
        return y

    def _kept(self, x: Tensor) -> Tensor:
        """Rows of kept tokens, [rows, C]."""
        return x.detach().flatten(0, -2)[self.rows]

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


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """torch.nn.functional.linear; on a CPU by oneDNN."""
    if not _by_onednn(x):
        return F.linear(x, weight, bias)
    # Not a view: what a custom function returns could not be written into then.
    shape = [*x.shape[:-1], len(weight)]
    y: Tensor = torch.ops.aten._unsafe_view(_product(x.flatten(0, -2), weight, bias), shape)
    return y


def _by_onednn(x: Tensor) -> bool:
    """Whether `_product` can multiply x: it refuses what the processor lacks."""
    if x.device.type != "cpu" or not onednn.is_available() or x.numel() == 0:
        return False
    return x.dtype == torch.float32 or (x.dtype == torch.bfloat16 and has_bfloat16())


def _product(x_MC: Tensor, weight_OC: Tensor, bias: Tensor | None = None) -> Tensor:
    """x @ weight.t() + bias, as a 1×1 convolution: the same sums, by oneDNN.

    torch leaves float32 products on a CPU to MKL, which takes twice the time on AMD's processors;
    and writes the bias before a bfloat16 product, not with it. Its own choice for convolutions on
    one thread is MKL too, so oneDNN's is called by its name.
    """
    # Channels-last, and a view. (As [1, C, M, 1] a prime M is slow.)
    x_1C1M, weight_OC11 = x_MC[None, None].permute(0, 3, 1, 2), weight_OC[:, :, None, None]
    y_1O1M = torch.ops.aten.mkldnn_convolution(
        x_1C1M, weight_OC11, bias, padding=[0, 0], stride=[1, 1], dilation=[1, 1], groups=1
    )
    y_MO: Tensor = y_1O1M.permute(0, 2, 3, 1).flatten(0, 2)
    return y_MO


def _linear_backward(
    grad_MO: Tensor, x_MC: Tensor, weight_OC: Tensor, needs: tuple[bool, bool, bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of input, weight and bias, those that are needed."""
    grad_x = grad_weight = None
    if x_MC.dtype != torch.float32 or not _by_onednn(x_MC):
        grad_x = grad_MO @ weight_OC if needs[0] else None
        grad_weight = grad_MO.t() @ x_MC if needs[1] else None
    else:
        if needs[0]:
            grad_x = _product(grad_MO, weight_OC.t())
        if needs[1] and grad_MO.shape[1] > x_MC.shape[1]:
            grad_weight = _product(grad_MO.t(), x_MC.t())
        elif needs[1]:  # oneDNN is slow where there are more outputs than rows
            grad_weight = _product(x_MC.t(), grad_MO.t()).t()
    return grad_x, grad_weight, grad_MO.sum(0) if needs[2] else None


class _Product(NamedTuple):
    """A linear layer's output, and what it was made from: input, weight and bias."""

    output: Tensor
    version: int
    arguments: tuple[Tensor, Tensor, Tensor | None]
    x_kept: Tensor


class _Activation(NamedTuple):
    """A GELU's output, the product it was made from, and the kept rows of that."""

    output: Tensor
    version: int
    product: _Product
    x_kept: Tensor
    approximate: str


def _untouched(made: _Product | _Activation, x: Tensor) -> bool:
    """Whether x is what was made, nothing has been written into it since, and nobody asked for its
    gradient."""
    watched = bool(x._backward_hooks) or x.retains_grad
    return x is made.output and x._version == made.version and not watched


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        x_kept: Tensor,
        rows: Tensor | None,
    ) -> Tensor:
        ctx.save_for_backward(x_kept, weight, rows)
        ctx.shape = x.shape
        return _linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        x_kept, weight, rows = ctx.saved_tensors
        grad = grad.flatten(0, -2)
        if rows is not None:
            grad = grad[rows]
        grads = _linear_backward(grad, x_kept, weight, ctx.needs_input_grad[:3])
        return _spread(grads[0], rows, ctx.shape), *grads[1:], None, None


class _GELU(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, approximate: str, x_kept: Tensor, rows: Tensor) -> Tensor:
        ctx.save_for_backward(x_kept, rows)
        ctx.approximate = approximate
        return F.gelu(x, approximate=approximate)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        x_kept, rows = ctx.saved_tensors
        kept = torch.ops.aten.gelu_backward(
            grad.flatten(0, -2)[rows], x_kept, approximate=ctx.approximate
        )
        return _spread(kept, rows, grad.shape), None, None, None


class _MLP(torch.autograd.Function):
    """Linear, GELU, linear: the last product of a chain whose other parts have been computed.

    Its backward pass goes through the whole chain, so that between its parts no gradient of dropped
    tokens is written, not even as zeros; and the activation is made anew, not kept.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight_in: Tensor,
        bias_in: Tensor | None,
        x_kept: Tensor,
        hidden_kept: Tensor,
        approximate: str,
        activated: Tensor,
        weight_out: Tensor,
        bias_out: Tensor | None,
        rows: Tensor,
    ) -> Tensor:
        ctx.save_for_backward(x_kept, hidden_kept, weight_in, weight_out, rows)
        ctx.shape, ctx.approximate = x.shape, approximate
        return _linear(activated, weight_out, bias_out)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        x_kept, hidden_kept, weight_in, weight_out, rows = ctx.saved_tensors
        grad = grad.flatten(0, -2)[rows]
        activated = F.gelu(hidden_kept, approximate=ctx.approximate)
        needs_out = (True, *ctx.needs_input_grad[7:9])
        grad_hidden, *grads_out = _linear_backward(grad, activated, weight_out, needs_out)
        grad_hidden = torch.ops.aten.gelu_backward(
            grad_hidden, hidden_kept, approximate=ctx.approximate
        )
        needs_in = ctx.needs_input_grad[:3]
        grad_x, *grads_in = _linear_backward(grad_hidden, x_kept, weight_in, needs_in)
        return _spread(grad_x, rows, ctx.shape), *grads_in, None, None, None, None, *grads_out, None


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
        for some in _groups(q):
            bias = None if mask is None else mask[some]
            out[some] = _weights(q[some] * scale, k[some], bias) @ v[some]
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        q, k, v, mask = ctx.saved_tensors
        grad_q, grad_k, grad_v = torch.zeros_like(q), torch.empty_like(k), torch.empty_like(v)
        grad_mask = None if mask is None else mask.new_zeros(mask.shape)
        groups = _groups(q)
        for some in groups:
            # The kept rows of one image. Where images are so small that several go together, the
            # gradient of other rows is zero all the same.
            alone = ctx.columns is not None and len(groups) == len(q)
            rows = ctx.columns[some.start] if alone else slice(None)
            bias = None if mask is None else mask[some][..., rows, :]
            q_GHMD, grad_GHMD = q[some][..., rows, :] * ctx.scale, grad[some][..., rows, :]
            weight_GHMN = _weights(q_GHMD, k[some], bias)
            grad_v[some] = weight_GHMN.transpose(-2, -1) @ grad_GHMD
            grad_score = torch._softmax_backward_data(
                grad_GHMD @ v[some].transpose(-2, -1), weight_GHMN, -1, q.dtype
            )
            if grad_mask is not None:
                grad_mask[some][:, 0, rows] = grad_score.sum(1)
            grad_q[some][..., rows, :] = (grad_score @ k[some]) * ctx.scale
            grad_k[some] = grad_score.transpose(-2, -1) @ q_GHMD
        return grad_q, grad_k, grad_v, grad_mask, None, None


def _groups(q: Tensor) -> list[slice]:
    """Images whose attention weights fit into a core's cache together; or one, if none do."""
    batch, heads, tokens, _ = q.shape
    size = max(1, GROUP // (heads * tokens * tokens))
    return [slice(start, min(start + size, batch)) for start in range(0, batch, size)]


def _weights(q_GHMD: Tensor, k_GHND: Tensor, bias: Tensor | None) -> Tensor:
    """Attention weights [G, H, M, N] under a bias [G, 1, M, N]."""
    q, k = q_GHMD.flatten(0, 1), k_GHND.flatten(0, 1).transpose(1, 2)
    if bias is None:
        score = q @ k
    else:
        bias = bias.expand(-1, q_GHMD.shape[1], -1, -1)
        score = torch.baddbmm(bias[0] if len(bias) == 1 else bias.flatten(0, 1), q, k)
    return score.softmax(-1).unflatten(0, q_GHMD.shape[:2])


def _spread(values: Tensor | None, rows: Tensor | None, shape: Any) -> Tensor | None:
    """Put values at these rows of a tensor of zeros, [..., C]; rows None: at all of them."""
    if values is None:
        return None
    if rows is None:
        return values.view(shape)
    whole = values.new_zeros(shape)
    whole.flatten(0, -2)[rows] = values
    return whole
