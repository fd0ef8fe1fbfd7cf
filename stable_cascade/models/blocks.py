"""The four block types of the diffusion networks, on images with channels last."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from .attention import KeysValues, SDCascadeAttention
from .layers import (
    Channelwise,
    DepthwiseConv2d,
    PreciseLinear,
    layer_norm,
    narrow,
    to_channels_first,
    to_channels_last,
    without_autocast,
)


class SDCascadeResBlock(nn.Module):
    """Depthwise convolution and channelwise layers, added to the input. Shapes: (B, H, W, C) -> (B, H, W, C)."""

    kind: ClassVar[str] = "residual"

    def __init__(self, c: int, c_skip: int = 0, kernel_size: int = 3, dropout: float = 0.0):
        super().__init__()
        self.depthwise = DepthwiseConv2d(c, c, kernel_size, padding=kernel_size // 2, groups=c)
        self.norm = layer_norm(c)
        self.channelwise = Channelwise(c + c_skip, c, dropout)

    def forward(self, x: Tensor, skip: Tensor | None = None) -> Tensor:
        """Shapes: (B, H, W, C), skip (B, H, W, c_skip) -> (B, H, W, C)."""
        hidden = self.norm(to_channels_last(self.depthwise(to_channels_first(x)))).to(x.dtype)
        if skip is not None:
            hidden = torch.cat([hidden, skip.to(x.dtype)], dim=-1)
        return x + self.channelwise(hidden)


class SDCascadeFeedForwardBlock(nn.Module):
    """Channelwise layers on the normalised input, added to it. Shapes: (B, H, W, C) -> (B, H, W, C)."""

    kind: ClassVar[str] = "feed_forward"

    def __init__(self, c: int, dropout: float = 0.0):
        super().__init__()
        self.norm = layer_norm(c)
        self.channelwise = Channelwise(c, c, dropout)

    def forward(self, x: Tensor) -> Tensor:
        """Shapes: (B, H, W, C) -> (B, H, W, C)."""
        return x + self.channelwise(self.norm(x))


class SDCascadeTimestepBlock(nn.Module):
    """Scale and shift of the channels by the noise condition: x (1 + a) + b. Shapes: (B, H, W, C) -> (B, H, W, C)."""

    kind: ClassVar[str] = "timestep"

    def __init__(self, c: int, c_timestep: int, conditions: tuple[str, ...] = ()):
        super().__init__()
        self.mapper = PreciseLinear(c_timestep, 2 * c)
        self.names = ["mapper", *(f"mapper_{name}" for name in conditions)]
        for name in self.names[1:]:
            setattr(self, name, PreciseLinear(c_timestep, 2 * c))

    def mappers(self) -> list[Any]:
        """One linear layer per condition, the noise level first."""
        return [getattr(self, name) for name in self.names]

    def modulation(self, embedding: Tensor) -> Tensor:
        """[1 + a, b] side by side, in float32 at least. Shapes: (B, n c_timestep) -> (B, 2 C)."""
        parts = embedding.chunk(len(self.names), dim=1)
        with without_autocast(embedding.device):
            mapped = [mapper(part).to(part.dtype) for mapper, part in zip(self.mappers(), parts, strict=True)]
        a, b = torch.stack(mapped).sum(0).chunk(2, dim=-1)
        return torch.cat([1 + a, b], dim=-1)

    def forward(self, x: Tensor, embedding: Tensor, modulation: Tensor | None = None) -> Tensor:
        """Shapes: (B, H, W, C), embedding as `modulation()` takes it, modulation (B, 2 C) -> (B, H, W, C)."""
        if modulation is None:
            modulation = self.modulation(embedding)
        scale, shift = modulation.to(x.dtype)[:, None, None, :].chunk(2, dim=-1)
        return torch.addcmul(shift, x, scale)


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
