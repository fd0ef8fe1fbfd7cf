"""The four block types of the diffusion networks, on images with channels last."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from .attention import KeysValues, SDCascadeAttention
from .plain import (
    HALF,
    cast_for,
    full,
    is_plain,
    narrow,
    saturate,
    to_channels_first,
    to_channels_last,
    without_autocast,
)
from .products import project_wide


def layer_norm(channels: int) -> nn.LayerNorm:
    """LayerNorm over the last axis without weights, as every level uses it."""
    return nn.LayerNorm(channels, elementwise_affine=False, eps=1e-6)


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


def channelwise(c_in: int, c: int, dropout: float) -> nn.Sequential:
    """The two linear layers of a residual or feed-forward block, 4 times as wide between."""
    return nn.Sequential(
        nn.Linear(c_in, 4 * c), nn.GELU(), GlobalResponseNorm(4 * c), nn.Dropout(dropout), nn.Linear(4 * c, c)
    )


def widened_branch(layers: nn.Sequential, x: Tensor) -> Tensor:
    """`layers(x)`, finite in float16, whose result is float32. Shapes: (..., c_in) -> (..., C)."""
    first, *rest, last = layers
    hidden = saturate(first(x))
    for layer in rest:
        hidden = layer(hidden)
    return project_wide(last, hidden)


class SDCascadeResBlock(nn.Module):
    """Depthwise convolution and channelwise layers, added to the input. Shapes: (B, H, W, C) -> (B, H, W, C)."""

    kind: ClassVar[str] = "residual"

    def __init__(self, c: int, c_skip: int = 0, kernel_size: int = 3, dropout: float = 0.0):
        super().__init__()
        self.depthwise = nn.Conv2d(c, c, kernel_size, padding=kernel_size // 2, groups=c)
        self.norm = layer_norm(c)
        self.channelwise = channelwise(c + c_skip, c, dropout)

    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        """Shapes: (B, H, W, C), skip (B, H, W, c_skip) -> (B, H, W, C)."""
        scale = self.channelwise[2].gamma
        hidden = narrow(self.norm(self._convolve(x)).to(x.dtype), scale)
        if skip is not None:
            hidden = torch.cat([hidden, narrow(skip, scale)], dim=-1)
        return x + widened_branch(self.channelwise, hidden)

    def _convolve(self, x: Tensor) -> Tensor:
        image, conv = to_channels_first(x), self.depthwise
        if conv.weight.dtype is torch.float16 and is_plain(conv, nn.Conv2d):
            # The sum over the kernel leaves float16's range long before its normalised value does.
            weight, bias = conv.weight.float(), None if conv.bias is None else conv.bias.float()
            with without_autocast(x.device):
                image = F.conv2d(image.float(), weight, bias, padding=conv.padding, groups=conv.groups)
        else:
            image = saturate(conv(narrow(image, conv.weight)))
        return to_channels_last(image)


class SDCascadeFeedForwardBlock(nn.Module):
    """Channelwise layers on the normalised input, added to it. Shapes: (B, H, W, C) -> (B, H, W, C)."""

    kind: ClassVar[str] = "feed_forward"

    def __init__(self, c: int, dropout: float = 0.0):
        super().__init__()
        self.norm = layer_norm(c)
        self.channelwise = channelwise(c, c, dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Shapes: (B, H, W, C) -> (B, H, W, C)."""
        return x + widened_branch(self.channelwise, narrow(self.norm(x), self.channelwise[2].gamma))


class SDCascadeTimestepBlock(nn.Module):
    """Scale and shift of the channels by the noise condition: x (1 + a) + b. Shapes: (B, H, W, C) -> (B, H, W, C)."""

    kind: ClassVar[str] = "timestep"

    def __init__(self, c: int, c_timestep: int, conditions: tuple[str, ...] = ()):
        super().__init__()
        self.mapper = nn.Linear(c_timestep, 2 * c)
        self.names = ["mapper", *(f"mapper_{name}" for name in conditions)]
        for name in self.names[1:]:
            setattr(self, name, nn.Linear(c_timestep, 2 * c))

    def mappers(self) -> list[Any]:
        """One linear layer per condition, the noise level first."""
        return [getattr(self, name) for name in self.names]

    def modulation(self, embedding: Tensor, dtype: torch.dtype) -> Tensor:
        """[1 + a, b] side by side, in the image's type `dtype`. Shapes: (B, n c_timestep) -> (B, 2 C)."""
        parts = embedding.chunk(len(self.names), dim=1)
        with without_autocast(embedding.device):
            mapped = [_map(mapper, part, dtype) for mapper, part in zip(self.mappers(), parts, strict=True)]
        a, b = torch.stack(mapped).sum(0).chunk(2, dim=-1)
        return torch.cat([1 + a, b], dim=-1).to(dtype)

    def forward(self, x: Tensor, embedding: Tensor, modulation: Tensor | None = None) -> Tensor:
        """Shapes: (B, H, W, C), embedding as `modulation()` takes it, modulation (B, 2 C) -> (B, H, W, C)."""
        if modulation is None:
            modulation = self.modulation(embedding, x.dtype)
        scale, shift = modulation.to(x.dtype)[:, None, None, :].chunk(2, dim=-1)
        return torch.addcmul(shift, x, scale)


def _map(mapper: Any, part: Tensor, dtype: torch.dtype) -> Tensor:
    if is_plain(mapper, nn.Linear):
        bias = None if mapper.bias is None else mapper.bias.to(part.dtype)
        return F.linear(part, mapper.weight.to(part.dtype), bias)
    return mapper(cast_for(mapper, part, dtype)).to(part.dtype)


class SDCascadeAttnBlock(nn.Module):
    """Attention of the image tokens to themselves and to the conditioning tokens, added to the input.

    Shapes: (B, H, W, C) -> (B, H, W, C); the condition is the activated tokens (B, L, conditioning_dim), or the keys
    and values (B, L, heads, C / heads) that `forward(None, tokens)` made of them.
    """

    kind: ClassVar[str] = "attention"

    def __init__(self, c: int, c_cond: int, heads: int, self_attn: bool = True, dropout: float = 0.0):
        super().__init__()
        self.self_attn = self_attn
        self.norm = layer_norm(c)
        self.attention = SDCascadeAttention(c, heads, dropout)
        self.kv_mapper = nn.Sequential(nn.SiLU(), nn.Linear(c_cond, c))

    def forward(self, x: Tensor | None, condition: Tensor | KeysValues) -> Tensor | KeysValues:
        """The image, or the keys and values of the condition where `x` is None; see the class for shapes."""
        if isinstance(condition, Tensor):
            # The tokens come activated: SiLU is the same for all blocks and runs once per forward.
            condition = self.kv_mapper[1](condition)
        if x is None:
            return condition if isinstance(condition, tuple) else self.attention.keys_values(condition)
        tokens = narrow(self.norm(x), condition[0]).flatten(1, 2)
        return x + self.attention(tokens, condition, self.self_attn).view_as(x)
