"""The four block types of the diffusion networks, on images with channels last."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from .layers import (
    Channelwise,
    DepthwiseConv2d,
    PreciseLinear,
    WideLinear,
    is_plain,
    layer_norm,
    narrow,
    saturate,
    to_channels_first,
    to_channels_last,
    without_autocast,
)

# Joining more elements than these costs more in copying than one product saves over several.
LARGEST_JOINED = 2**16
KeysValues = tuple[Tensor, ...]
"""Keys and values (B, L, heads, C / heads); where not all tokens count, also which do, (B, L) bool."""


def project(layers: Sequence[Any], x: Tensor) -> list[Tensor]:
    """`layer(x)` of several linear layers, as one matrix product where all are plain.

    Shapes: (B, N, C) -> one (B, N, C') per layer.
    """
    if not all(is_plain(layer, nn.Linear) for layer in layers):
        return [layer(x) for layer in layers]
    weight = _joined([layer.weight for layer in layers])
    if weight is None:
        return [layer(x) for layer in layers]
    bias = torch.cat([layer.bias for layer in layers])
    return list(F.linear(x, weight, bias).chunk(len(layers), dim=-1))


def _joined(parts: list[Tensor]) -> Tensor | None:
    """The rows of all parts: a view where they lie in a row and need no gradient, a copy where they are small."""
    trained = torch.is_grad_enabled() and any(part.requires_grad for part in parts)
    if not trained and not torch.compiler.is_compiling() and _in_a_row(parts):
        first = parts[0].detach()
        rows = sum(part.shape[0] for part in parts)
        return first.as_strided((rows, first.shape[1]), first.stride(), first.storage_offset())
    return torch.cat(parts) if sum(part.numel() for part in parts) <= LARGEST_JOINED else None


def _in_a_row(parts: list[Tensor]) -> bool:
    """True when contiguous matrices follow each other in one storage."""
    place = parts[0].data_ptr()
    if place == 0:  # no memory: the meta device
        return False
    for part in parts:
        same = part.untyped_storage().data_ptr() == parts[0].untyped_storage().data_ptr()
        if not same or part.data_ptr() != place or not part.is_contiguous():
            return False
        place += part.numel() * part.element_size()
    return True


BACKENDS: Mapping[str, SDPBackend | None] = {
    "native": None,
    "_native_cudnn": SDPBackend.CUDNN_ATTENTION,
    "_native_efficient": SDPBackend.EFFICIENT_ATTENTION,
    "_native_flash": SDPBackend.FLASH_ATTENTION,
    "_native_math": SDPBackend.MATH,
}
"""torch's kernels of attention under diffusers' names; with `native` torch chooses for every call."""


def attention_kernel(backend: SDPBackend | None) -> AbstractContextManager:
    """The context in which torch computes attention with this kernel; None leaves the choice to torch."""
    return nullcontext() if backend is None else sdpa_kernel(backend)


def attend(
    query: Tensor, key: Tensor, value: Tensor, dropout: float = 0.0, attended: Tensor | None = None,
    backend: SDPBackend | None = None,
) -> Tensor:  # fmt: skip
    """softmax(query key^T / sqrt(d)) value, with dropout on the probabilities.

    Shapes: (B, heads, N, d), (B, heads, L, d) twice, `attended` (B, L) bool -> (B, heads, N, d).
    """
    mask = None if attended is None else attended[:, None, None]
    if backend is not None:
        with attention_kernel(backend):
            return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout)
    if query.device.type == "cpu" and query.requires_grad and (query.dtype is torch.bfloat16 or dropout > 0):
        # The fused kernel's backward takes twice as long on a CPU in bfloat16, and knows no dropout there.
        scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-1, -2)
        scores = scores if mask is None else scores.masked_fill(~mask, -torch.inf)
        return F.dropout(scores.softmax(-1), dropout) @ value
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout)


class SDCascadeAttention(nn.Module):
    """Multi-head attention whose dropout acts on the attention probabilities."""

    def __init__(self, c: int, heads: int, dropout: float = 0.0):
        super().__init__()
        if heads < 1 or c % heads:
            raise ValueError(f"num_attention_heads {heads} does not divide the {c} channels of a level with attention")
        self.heads, self.dropout = heads, dropout
        self.backend: SDPBackend | None = None
        self.to_q = nn.Linear(c, c)
        self.to_k = nn.Linear(c, c)
        self.to_v = nn.Linear(c, c)
        self.to_out = nn.ModuleList([WideLinear(c, c)])

    @torch.no_grad()
    def fuse(self) -> None:
        """Moves the weights of query, key and value next to each other, so that one product needs no copy of them."""
        layers = [self.to_q, self.to_k, self.to_v]
        if not all(is_plain(layer, nn.Linear) for layer in layers) or _in_a_row([layer.weight for layer in layers]):
            return
        rows = torch.cat([layer.weight for layer in layers]).chunk(len(layers))
        for layer, weight in zip(layers, rows, strict=True):
            layer.weight.data = weight

    def keys_values(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values of tokens. Shapes: (B, L, C) -> two of (B, L, heads, C / heads)."""
        key, value = project([self.to_k, self.to_v], tokens)
        return self._split(key), self._split(value)

    def forward(self, tokens: Tensor, condition: Tensor | KeysValues, self_attn: bool = True) -> Tensor:
        """What each token takes from the condition and, with `self_attn`, from all tokens.

        Shapes: tokens (B, N, C), condition (B, L, C) or its keys and values (B, L, heads, C / heads) -> (B, N, C).
        """
        # Queries of the image; keys and values of the image and of the condition, which may come ready.
        attended: Tensor | None = None
        if isinstance(condition, Tensor):
            query = self._split(self.to_q(tokens))
            key, value = self.keys_values(torch.cat([tokens, condition], dim=1) if self_attn else condition)
        else:
            key, value, *rest = condition
            attended = rest[0] if rest else None
            if self_attn:
                query, *own = map(self._split, project([self.to_q, self.to_k, self.to_v], tokens))
                key, value = (torch.cat(pair, dim=1) for pair in zip(own, (key, value), strict=True))
                attended = None if attended is None else F.pad(attended, (tokens.shape[1], 0), value=True)
            else:
                query = self._split(self.to_q(tokens))
        # Attention per head, then the heads side by side again.
        q, k, v = (part.transpose(1, 2) for part in (query, key, value))
        mixed = attend(q, k, v, self.dropout if self.training else 0.0, attended, self.backend)
        return saturate(self.to_out[0](mixed.transpose(1, 2).flatten(2)))

    def _split(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.heads, -1))


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
