"""Noise, each sample's from its own generators: a draw depends on the sample's seed and on nothing around it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence

import torch
from torch import Generator, Tensor
from torch.nn import functional

Shape = Sequence[int]
Device = torch.device | str | None


def sample_generators(seeds: Tensor | Iterable[int], stream: str) -> list[Generator]:
    """One CPU generator per sample, a function of the sample's seed and of the stream's name alone.

    Each use of randomness takes a stream of its own ("noise", "time", "caption"), so that a new use never moves the
    others.
    """
    numbers = seeds.tolist() if isinstance(seeds, Tensor) else seeds
    return [Generator().manual_seed(_mixed(int(seed), stream)) for seed in numbers]


def training_times(generators: Sequence[Generator], *, lowest: float = 0.001, device: Device = None) -> Tensor:
    """Times uniform in [lowest, 1], one per sample: 1 - u + lowest, clamped.

    Shapes: B generators -> (B,) float32.

    Source: the training of the original.
    """
    u = torch.stack([torch.rand((), generator=generator) for generator in generators])
    return (1 - u + lowest).clamp(lowest, 1.0).to(device)


def gaussian_noise(
    shape_per_sample: Shape, generators: Sequence[Generator], *, offset: float = 0.0, device: Device = None
) -> Tensor:
    """Standard normal noise, plus `offset` times a normal number per channel that shifts the whole channel.

    Shapes: (C, ...) and B generators -> (B, C, ...) float32.

    Source: Guttenberg 2023 (diffusion with offset noise).
    """
    noise = _normal(shape_per_sample, generators)
    if offset:
        per_channel = (shape_per_sample[0], *(1 for _ in shape_per_sample[1:]))
        noise = noise + offset * _normal(per_channel, generators)
    return noise.to(device)


def pyramid_noise(
    shape_per_sample: Shape,
    generators: Sequence[Generator],
    *,
    size_range: tuple[int, int] | None = (1, 16),
    levels: int = 10,
    gamma: float = 0.75,
    square: bool = False,
    device: Device = None,
) -> Tensor:
    """Unit-variance noise with coarse structure: Stage B's training noise.

    `square` reproduces the original, whose coarse levels are square, built from the height alone, and therefore
    stretched in images that are not.

    Shapes: (C, H, W) and B generators -> (B, C, H, W) float32.

    Source: Whitaker 2023 (multi-resolution noise).
    """
    channels, height, width = shape_per_sample
    noise = _normal(shape_per_sample, generators)
    sizes = pyramid_sizes(height, width, size_range=size_range, levels=levels, square=square)
    coarse = {level: _normal((channels, *size), generators) for level, size in sizes.items()}
    return combine_pyramid(noise, coarse, gamma=gamma).to(device)


def pyramid_sizes(
    height: int, width: int, *, size_range: tuple[int, int] | None = (1, 16), levels: int = 10, square: bool = False
) -> dict[int, tuple[int, int]]:
    """Size (h, w) of each coarse level i: 1 / 2^i of the image, where its shorter side is in `size_range`.

    `square` takes the height for both sides, as the original does.
    """
    lowest, highest = size_range if size_range is not None else (1, max(height, width))
    sizes = {}
    for level in range(1, levels):
        h, w = height >> level, (height if square else width) >> level
        if max(lowest, 1) <= min(h, w) <= highest:
            sizes[level] = (h, w)
    return sizes


def combine_pyramid(noise: Tensor, coarse: dict[int, Tensor], *, gamma: float = 0.75) -> Tensor:
    """`noise` plus gamma^i times each coarse level i (upsampled, nearest), divided so that the variance stays one.

    Shapes: (B, C, H, W), {level: (B, C, h, w)} -> (B, C, H, W).
    """
    total, power = noise, 1.0
    for level, values in coarse.items():
        total = total + gamma**level * functional.interpolate(values, size=noise.shape[-2:], mode="nearest")
        power += gamma ** (2 * level)
    return total / power**0.5


def _mixed(seed: int, stream: str) -> int:
    digest = hashlib.blake2b(f"{stream}/{seed}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def _normal(shape: Shape, generators: Sequence[Generator]) -> Tensor:
    """One draw per sample, in order. Shapes: (...) and B generators -> (B, ...) float32."""
    return torch.stack([torch.randn(tuple(shape), generator=generator) for generator in generators])
