"""The matrix product of every linear layer, by the library that is fastest at it.

torch multiplies float32 on x86 by MKL, though it has oneDNN too, which took a tenth to a third less time for the
products of a step on the CPUs measured (docs/performance.md). Elsewhere, and in other types, torch's choice stands.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .plain import is_plain, saturate, to_channels_first, to_channels_last

LEAST = 2**24
"""Multiplications from which a product goes to oneDNN; below, each call costs more than the product saves."""
ONEDNN: Any = getattr(torch.ops.mkldnn, "_linear_pointwise", None) if torch.backends.mkl.is_available() else None
"""oneDNN's product in torch, which torch itself calls in compiled graphs; None where MKL is not what it replaces."""


def apply_linear(layer: Any, x: Tensor) -> Tensor:
    """`layer(x)` of a linear layer, or of what an adapter or a quantiser put in its place.

    Shapes: (..., in_features) -> (..., out_features).
    """
    return linear(x, layer.weight, layer.bias) if is_plain(layer, nn.Linear) else layer(x)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """X weight^T + bias, with gradients. Shapes: (..., K), (M, K), (M,) -> (..., M)."""
    if not _is_for_onednn(x, weight):
        return F.linear(x, weight, bias)
    if torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad):
        return _Linear.apply(x, weight, bias)
    return _product(x, weight, bias)


def pointwise(conv: Any, x: Tensor) -> Tensor:
    """A 1x1 convolution as a matrix product over the last axis.

    Shapes: (B, H, W, C) -> (B, H, W, C').
    """
    if is_plain(conv, nn.Conv2d):
        return linear(x, conv.weight.flatten(1), conv.bias)
    return to_channels_last(conv(to_channels_first(x)))


def project_wide(layer: Any, x: Tensor) -> Tensor:
    """`layer(x)`; of a float16 layer the float32 result, 64 times as large as float16 could hold.

    The factor is a power of two, so that nothing is rounded by it.
    """
    if not is_plain(layer, nn.Linear) or layer.weight.dtype is not torch.float16:
        return saturate(apply_linear(layer, x))
    product = F.linear(x * 2.0**-6, layer.weight).float() * 2.0**6
    return product if layer.bias is None else product + layer.bias.float()


def _is_for_onednn(x: Tensor, weight: Tensor) -> bool:
    return (
        ONEDNN is not None
        and x.device.type == "cpu"
        and x.dtype is torch.float32
        and weight.dtype is torch.float32
        and x.numel() * weight.shape[0] >= LEAST
        and not torch.is_autocast_enabled("cpu")
    )


def _product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return _opaque(x, weight, bias) if torch.compiler.is_compiling() else ONEDNN(x, weight, bias, "none", [], "")


@torch.library.custom_op("stable_cascade::linear", mutates_args=())
def _opaque(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """The same for graphs: inductor has plans of its own for oneDNN's product, which hold for packed weights only."""
    return ONEDNN(x, weight, bias, "none", [], "")


@_opaque.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty((*x.shape[:-1], weight.shape[0]))


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        wanted = ctx.needs_input_grad
        ctx.save_for_backward(x if wanted[1] else None, weight if wanted[0] else None)
        return _product(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        rows = grad.flatten(0, -2)
        grad_x = None if weight is None else _product(grad, weight.t(), None)
        # MKL is as fast here, where both factors are read by columns.
        grad_weight = None if x is None else rows.t() @ x.flatten(0, -2)
        return grad_x, grad_weight, rows.sum(0) if ctx.needs_input_grad[2] else None
