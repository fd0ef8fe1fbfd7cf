"""Layers of the diffusion networks that decide inside their own `forward` how to multiply and in which type.

Images travel between blocks as (B, H, W, C), in float32 where the weights are float16: the released prior's last
blocks make them larger than float16 can hold. Every layer sees its input normalised, so the layers can be float16.
Convolutions keep torch's arguments and (B, C, H, W), because adapters and hooks wrap them and PEFT builds more of
their class.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

HALF = (torch.float16, torch.bfloat16)
COMPUTABLE = (*HALF, torch.float32, torch.float64)


def to_channels_first(x: Tensor) -> Tensor:
    """A (B, C, H, W) view in channels-last memory. Shapes: (B, H, W, C) -> (B, C, H, W)."""
    return x.permute(0, 3, 1, 2)


def to_channels_last(x: Tensor) -> Tensor:
    """The image with channels on the last axis. Shapes: (B, C, H, W) -> (B, H, W, C)."""
    return x.permute(0, 2, 3, 1)


def full(x: Tensor) -> Tensor:
    """`x` in float32, or as it is where it is at least that."""
    return x.float() if x.dtype in HALF else x


def widen(x: Tensor) -> Tensor:
    """`x` as it travels from block to block: in float32 where the weights are float16."""
    return x.float() if x.dtype is torch.float16 else x


def narrow(x: Tensor, weight: Any) -> Tensor:
    """`x` for a layer with these weights: in float16, within its range, where they are float16; as it is elsewhere."""
    if weight.dtype is not torch.float16 or x.dtype is torch.float16:
        return x
    return x.clamp(-65504.0, 65504.0).half()


def saturate(x: Tensor) -> Tensor:
    """`x`, with float16 infinities replaced by the largest float16, so that the next norm stays finite."""
    if x.dtype is not torch.float16:
        return x
    return x.clamp(-65504.0, 65504.0)


def cast_for(module: Any, x: Tensor) -> Tensor:
    """`x` in the type in which a layer computes: that of its weights, also inside an adapter, unless quantised."""
    dtype = getattr(getattr(module, "weight", None), "dtype", None)
    return x.to(dtype) if dtype in COMPUTABLE else x


def without_autocast(device: torch.device) -> AbstractContextManager:
    """A context in which products keep the type of their factors."""
    if device.type == "meta" or not torch.is_autocast_enabled(device.type):
        return nullcontext()
    return torch.autocast(device.type, enabled=False)


def resize(x: Tensor, size: Sequence[int]) -> Tensor:
    """Bilinear resize with aligned corners, computed in float32 at least. Shapes: (B, H, W, C) -> (B, *size, C)."""
    if tuple(x.shape[1:3]) == tuple(size):
        return x
    resized = F.interpolate(full(to_channels_first(x)), size=tuple(size), mode="bilinear", align_corners=True)
    return to_channels_last(resized).to(x.dtype)


def is_plain(module: Any, kind: type[nn.Module]) -> bool:
    """True when calling `module` does nothing but what `kind` does with weights that are there.

    False for adapters, quantised or sharded weights, parametrisations, offloading and hooks, whose own call must run.
    Only what joins the weights of several layers in one product has to ask.
    """
    if type(module) is not kind or "forward" in module.__dict__ or module._forward_hooks or module._forward_pre_hooks:
        return False
    weight = module.weight
    return type(weight) in (nn.Parameter, Tensor) and weight.dtype in COMPUTABLE


def layer_norm(channels: int) -> nn.LayerNorm:
    """LayerNorm over the last axis without weights, as every level uses it."""
    return nn.LayerNorm(channels, elementwise_affine=False, eps=1e-6)


class TiledConv2d(nn.Conv2d):
    """A convolution whose windows do not overlap, as a matrix product over the pixels of each window.

    For a window of one pixel nothing is copied. torch's convolution of 2x2 windows would first bring the weights,
    which are the larger factor, into the order of the image.

    Shapes: (B, C, H, W) -> (B, C', H / stride, W / stride), rounded down.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Shapes: (B, C, H, W) -> (B, C', H / stride, W / stride)."""
        if self.kernel_size != self.stride or self.padding != (0, 0) or self.groups != 1 or self.dilation != (1, 1):
            return super().forward(x)
        windows = to_channels_last(x) if self.stride == (1, 1) else _windows(x, *self.stride)
        return to_channels_first(F.linear(windows, self.weight.flatten(1), self.bias))


def _windows(x: Tensor, rows: int, columns: int) -> Tensor:
    """The pixels of each window in a row. Shapes: (B, C, H, W) -> (B, H / rows, W / columns, C rows columns)."""
    height, width = x.shape[2] // rows, x.shape[3] // columns
    whole = x[:, :, : rows * height, : columns * width]
    windows = whole.unflatten(3, (width, columns)).unflatten(2, (height, rows))
    return windows.permute(0, 2, 4, 1, 3, 5).flatten(3)


class DoublingConv2d(nn.ConvTranspose2d):
    """A transposed 2x2 convolution of stride 2 as a matrix product that makes the square of each pixel.

    Shapes: (B, C, H, W) -> (B, C', 2 H, 2 W).
    """

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__(in_channels, out_channels, kernel_size=2, stride=2)

    def forward(self, x: Tensor, output_size: list[int] | None = None) -> Tensor:
        """Shapes: (B, C, H, W) -> (B, C', 2 H, 2 W)."""
        bias = None if self.bias is None else self.bias.repeat_interleave(4)
        squares = F.linear(to_channels_last(x), self.weight.flatten(1).t(), bias).unflatten(3, (-1, 2, 2))
        return to_channels_first(squares.permute(0, 1, 4, 2, 5, 3).flatten(3, 4).flatten(1, 2))


class DepthwiseConv2d(nn.Conv2d):
    """A convolution of each channel alone; of float16 weights the result is float32.

    The sum over the kernel leaves float16's range long before its normalised value does.

    Shapes: (B, C, H, W) -> the same.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Shapes: (B, C, H, W) -> the same."""
        if self.weight.dtype is not torch.float16:
            return super().forward(x)
        bias = None if self.bias is None else self.bias.float()
        with without_autocast(x.device):
            return self._conv_forward(x.float(), self.weight.float(), bias)


class WideLinear(nn.Linear):
    """A linear layer whose result is float32 where it is float16, 64 times as large as float16 could hold.

    The factor is a power of two, so that nothing is rounded by it.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Shapes: (..., in_features) -> (..., out_features)."""
        if self.weight.dtype is not torch.float16:
            return super().forward(x)
        product = F.linear(x * 2.0**-6, self.weight).float() * 2.0**6
        return product if self.bias is None else product + self.bias.float()


class PreciseLinear(nn.Linear):
    """A linear layer that computes in its input's type, whatever its weights are, where autocast is off.

    Shapes: (..., in_features) -> (..., out_features).
    """

    def forward(self, x: Tensor) -> Tensor:
        """Shapes: (..., in_features) -> (..., out_features)."""
        return F.linear(x, self.weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype))


class ResponseScale(torch.autograd.Function):
    """x (1 + gamma share) + beta, where share is a channel's norm over the image by the mean norm of all channels.

    Written out because it is the largest elementwise cost of a training step: the backward pass reads the image three
    times and keeps no float32 copy of it. A channel that is zero everywhere gets the gradient zero through its norm.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, gamma: Tensor, beta: Tensor) -> Tensor:
        """Shapes: (B, H, W, C), (1, 1, 1, C) twice -> (B, H, W, C)."""
        norm, image = _channel_norms(x)
        mean = norm.mean(-1, keepdim=True) + 1e-6
        share = norm / mean
        scale = 1 + full(gamma) * share
        ctx.save_for_backward(x, gamma, norm, mean, share, scale)
        # The squares' memory serves again: to ask for as much anew costs a CPU more than to compute in it.
        return torch.addcmul(beta.to(x.dtype), x, scale.to(x.dtype), out=image)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of x, gamma and beta."""
        x, gamma, norm, mean, share, scale = ctx.saved_tensors
        # bfloat16 sums have a float32 accumulator; asking for a float32 result would copy the image first.
        result = None if x.dtype is torch.bfloat16 else norm.dtype
        image = grad * x
        grad_scale = image.sum((1, 2), keepdim=True, dtype=result).to(norm.dtype)
        grad_share = grad_scale * full(gamma)
        # Through share = norm / mean, then through the norm itself.
        grad_norm = (grad_share - (grad_share * share).mean(-1, keepdim=True)) / mean
        pull = torch.where(norm > 0, grad_norm / norm, 0)
        grad_x = torch.mul(grad, scale.to(grad.dtype), out=image).addcmul_(x, pull.to(x.dtype))
        grad_beta = grad.sum((0, 1, 2), keepdim=True, dtype=result)
        return grad_x, (grad_scale * share).sum(0, keepdim=True).to(gamma.dtype), grad_beta.to(gamma.dtype)


def _channel_norms(x: Tensor) -> tuple[Tensor, Tensor | None]:
    """The norm of each channel over the image, in float32 at least, and memory of the image's size and type to reuse.

    Shapes: (B, H, W, C) -> (B, 1, 1, C), (B, H, W, C) or None.
    """
    if x.device.type == "cuda":  # one kernel, which adds up in float32 and writes nothing of the image's size
        wide = torch.promote_types(x.dtype, torch.float32)
        return torch.linalg.vector_norm(x, dim=(1, 2), keepdim=True, dtype=wide), None
    # A sum of squares: torch's norm over these axes takes ten times as long on a CPU.
    squares = x.square() if x.dtype not in HALF else x.float().square_()
    return squares.sum((1, 2), keepdim=True).sqrt(), squares if squares.dtype is x.dtype else None


class GlobalResponseNorm(nn.Module):
    """Scales each channel by its share of the image's response; statistics in float32 at least.

    Shapes: (B, H, W, C) -> (B, H, W, C).

    Source: Woo et al. 2023 (ConvNeXt V2), eq. 1-3.
    """

    def __init__(self, dim: int):
        super().__init__()
        self.gamma = nn.Parameter(torch.zeros(1, 1, 1, dim))
        self.beta = nn.Parameter(torch.zeros(1, 1, 1, dim))

    def forward(self, x: Tensor) -> Tensor:
        """Shapes: (B, H, W, C) -> (B, H, W, C)."""
        return saturate(ResponseScale.apply(x, self.gamma, self.beta))


class Channelwise(nn.Sequential):
    """The two linear layers of a residual or feed-forward block, 4 times as wide between.

    Finite in float16, where the result is float32. Shapes: (..., c_in) -> (..., c).
    """

    def __init__(self, c_in: int, c: int, dropout: float):
        super().__init__(
            nn.Linear(c_in, 4 * c), nn.GELU(), GlobalResponseNorm(4 * c), nn.Dropout(dropout), WideLinear(4 * c, c)
        )

    def forward(self, x: Tensor) -> Tensor:
        """Shapes: (..., c_in) -> (..., c)."""
        widening, activation, response_norm, dropout, last = self
        hidden = saturate(widening(narrow(x, response_norm.gamma)))
        return saturate(last(dropout(response_norm(activation(hidden)))))
