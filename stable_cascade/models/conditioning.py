"""First and last layers of the diffusion networks: samples in and out, conditioning tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch.nn.functional as F
from diffusers.utils import BaseOutput
from torch import Tensor, nn

from .plain import cast_for, narrow, to_channels_first, to_channels_last, widen
from .products import pointwise


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
    patches = unshuffle(cast_for(conv, sample))
    return widen(norm(pointwise(conv, to_channels_last(patches))))


def read_out(clf: nn.Sequential, x: Tensor) -> Tensor:
    """The prediction from the last level's image. Shapes: (B, h, w, width) -> (B, C, H, W)."""
    norm, conv, shuffle = clf
    return shuffle(to_channels_first(pointwise(conv, narrow(norm(x), conv.weight))).contiguous())


def map_grid(mapper: nn.Sequential, x: Tensor) -> Tensor:
    """Two pointwise layers and a norm on a conditioning image. Shapes: (B, H, W, C) -> (B, H, W, width)."""
    first, _, second, norm = mapper
    return norm(pointwise(second, F.gelu(pointwise(first, cast_for(first, x)))))
