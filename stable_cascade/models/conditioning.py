"""How samples and conditions enter the diffusion networks, and how predictions leave them."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from diffusers.utils import BaseOutput
from torch import Tensor, nn

from .blocks import SDCascadeTimestepBlock
from .layers import (
    HALF,
    PreciseLinear,
    cast_for,
    is_plain,
    narrow,
    to_channels_first,
    to_channels_last,
    widen,
    without_autocast,
)


@dataclass
class StableCascadeUNetOutput(BaseOutput):
    """The network's prediction, (B, C, H, W)."""

    sample: Tensor


def as_sequence(x: Tensor) -> Tensor:
    """One vector per sample as a sequence of one. Shapes: (B, C) or (B, n, C) -> (B, n, C)."""
    return x[:, None] if x.ndim == 2 else x


def map_tokens(mapper: nn.Module, x: Tensor, width: int | None = None) -> Tensor:
    """Mapped vectors, each cut into as many tokens of `width` as it has. Shapes: (B, n, C) -> (B, n * k, width)."""
    mapped = mapper(cast_for(mapper, x))
    return mapped if width is None else mapped.reshape(mapped.shape[0], -1, width)


def embed_sample(embedding: nn.Sequential, sample: Tensor, patch_size: int) -> Tensor:
    """The sample as the first level's image.

    Shapes: (B, C, H, W) -> (B, H / patch_size, W / patch_size, width).

    Raises:
        ValueError: height or width is no multiple of `patch_size`.
    """
    height, width = sample.shape[-2:]
    if height % patch_size or width % patch_size:
        raise ValueError(
            f"sample is {height} x {width}; both sides must be multiples of patch_size {patch_size}: pad it"
        )
    unshuffle, conv, norm = embedding
    return widen(norm(to_channels_last(conv(unshuffle(cast_for(conv, sample))))))


def read_out(clf: nn.Sequential, x: Tensor) -> Tensor:
    """The prediction from the last level's image. Shapes: (B, h, w, width) -> (B, C, H, W)."""
    norm, conv, shuffle = clf
    return shuffle(conv(to_channels_first(narrow(norm(x), conv.weight))).contiguous())


def map_grid(mapper: nn.Sequential, x: Tensor) -> Tensor:
    """Two pointwise layers and a norm on a conditioning image. Shapes: (B, H, W, C) -> (B, H, W, width)."""
    first, activation, second, norm = mapper
    return norm(to_channels_last(second(activation(first(to_channels_first(cast_for(first, x)))))))


def timestep_embedding(ratio: Tensor, width: int, positions: int = 10000) -> Tensor:
    """[sin | cos] of `ratio * positions` at geometric frequencies, in float32 at least.

    Rounding follows the original's order of operations; a zero column ends an odd width.

    Shapes: (B,) in [0, 1] -> (B, width).

    Source: Vaswani et al. 2017, section 3.5.
    """
    half = width // 2
    step = math.log(positions) / (half - 1)
    frequencies = torch.arange(half, device=ratio.device, dtype=torch.float32).mul(-step).exp()
    ratio = ratio if ratio.dtype is torch.float64 else ratio.float()
    angles = (ratio * positions)[:, None] * frequencies[None, :]
    return F.pad(torch.cat([angles.sin(), angles.cos()], dim=1), (0, width % 2))


def embed_times(config: Any, batch: int, ratio: Tensor, given: dict[str, Tensor | None]) -> Tensor:
    """The embeddings of the noise condition and of each further one (zero where not given), side by side.

    Shapes: (B,), (1,) or () each -> (B, (1 + conditions) * timestep_ratio_embedding_dim).
    """
    values = [given.get(name) for name in config.timestep_conditioning_type]
    times = [ratio, *(torch.zeros_like(ratio) if value is None else value.to(ratio.device) for value in values)]
    rows = torch.stack([time.reshape(-1).expand(batch) for time in times], dim=1)
    return timestep_embedding(rows.flatten(), config.timestep_ratio_embedding_dim).view(batch, -1)


class JoinedMappers(NamedTuple):
    """The mappers of all timestep blocks as one, and how many of its outputs each block has, by key.

    The bias holds the 1 of `x (1 + a) + b`, so that the outputs of a block are its scale and its shift.
    """

    weight: Tensor
    bias: Tensor
    outputs: dict[str, int]


def blocks_of(model: Any, kind: str) -> Iterator[tuple[str, Any]]:
    """(key, block) of every block of one kind, down then up."""
    for side, levels in (("down", model.down_blocks), ("up", model.up_blocks)):
        for level, blocks in enumerate(levels):
            for index, block in enumerate(blocks):
                if block.kind == kind:
                    yield f"{side}.{level}.{index}", block


def joined_mappers(model: Any, dtype: torch.dtype) -> JoinedMappers | None:
    """What modulates all timestep blocks in one matrix product; None where a mapper is not plain.

    Shapes: weight (sum of 2 C over the blocks, conditions * timestep_ratio_embedding_dim), bias (sum of 2 C,).
    """
    keyed = list(blocks_of(model, "timestep"))
    blocks = [block for _, block in keyed]
    columns = list(zip(*(block.mappers() for block in blocks), strict=True))
    whole = all(type(block) is SDCascadeTimestepBlock and "forward" not in block.__dict__ for block in blocks)
    if not blocks or not whole or not all(is_plain(mapper, PreciseLinear) for column in columns for mapper in column):
        return None
    weight = torch.cat([torch.cat([mapper.weight for mapper in column]) for column in columns], dim=1)
    biases = torch.stack([torch.cat([mapper.bias for mapper in column]).to(dtype) for column in columns])
    # A plain sum would give the conditions' biases one piece of memory as their gradients: adding to one or scaling
    # one (accumulation, clipping) would change the others. The gradient of a product is memory of each one's own.
    bias = (biases * torch.ones_like(biases)).sum(0) + _identity(blocks, biases)
    return JoinedMappers(weight.to(dtype), bias, {key: block.mapper.out_features for key, block in keyed})


def _identity(blocks: list[Any], like: Tensor) -> Tensor:
    """Scale 1 and shift 0 for every block. Shapes: -> (sum of 2 C over the blocks,)."""
    widths = [block.mapper.out_features // 2 for block in blocks]
    ones, zeros = like.new_ones(max(widths)), like.new_zeros(max(widths))
    return torch.cat([row[:width] for width in widths for row in (ones, zeros)])


def modulate(model: Any, embedding: Tensor, joined: JoinedMappers | None, dtype: torch.dtype) -> dict[str, Tensor]:
    """Scale and shift, side by side, of every timestep block by key, in the image's type.

    Empty where each block computes its own: joining the weights of one forward alone pays where they have to be
    copied anyway, being half as wide as the embedding, and on a GPU, where a launch takes longer than the copy.
    """
    if joined is None and _pays(model):
        joined = joined_mappers(model, embedding.dtype)
    if joined is None:
        return {}
    with without_autocast(embedding.device):
        both = F.linear(embedding, joined.weight, joined.bias).to(dtype)
    return dict(zip(joined.outputs, both.split(list(joined.outputs.values()), dim=1), strict=True))


def _pays(model: Any) -> bool:
    _, first = next(blocks_of(model, "timestep"), ("", None))
    weight = getattr(getattr(first, "mapper", None), "weight", None)
    return weight is not None and (weight.device.type == "cuda" or weight.dtype in HALF)
