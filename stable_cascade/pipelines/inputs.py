"""Checks of what callers pass, and the sizes that follow from it. Every refusal is one line and costs no forward."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Generator

from stable_cascade import bounds

from .knobs import is_number

Generators = Generator | list[Generator]

SMALLEST_SIDE = 64


def check_size(height: int, width: int) -> None:
    """Raises ValueError unless both sides are multiples of 8, at least 64 and not beyond reason."""
    for name, side in (("height", height), ("width", width)):
        if not isinstance(side, int) or side % 8 or side < SMALLEST_SIDE:
            number = isinstance(side, int | float) and math.isfinite(side)
            nearest = max(SMALLEST_SIDE, round(side / 8) * 8) if number else SMALLEST_SIDE
            raise ValueError(f"{name} {side!r} is not a multiple of 8 from {SMALLEST_SIDE} up; nearest: {nearest}")
        if side > bounds.DRAWN_SIDE:
            raise ValueError(
                f"{name} {side!r} is too large; images are drawn up to {bounds.DRAWN_SIDE:,} pixels a side"
            )


def check_steps(steps: Any, name: str = "num_inference_steps") -> None:
    """Raises ValueError unless it is a positive whole number of a sensible size."""
    if not isinstance(steps, int) or isinstance(steps, bool) or not 1 <= steps <= bounds.STEPS:
        raise ValueError(f"{name} {steps!r} is not a positive whole number up to {bounds.STEPS:,}; 10 to 30 are usual")


def check_guidance(scale: Any, name: str = "guidance_scale") -> None:
    """Raises ValueError for a guidance scale that means nothing."""
    if not is_number(scale) or scale < 0:
        raise ValueError(f"{name} {scale} is not a number from 0 up; 1 switches guidance off")


def check_times(timesteps: Any) -> tuple[float, ...]:
    """Given times as a tuple.

    Raises:
        ValueError: fewer than two, outside [0, 1], or not falling.
    """
    times = tuple(timesteps.tolist() if hasattr(timesteps, "tolist") else timesteps)
    numbers = len(times) > 1 and all(map(is_number, times))
    if not numbers or not all(a > b for a, b in pairwise(times)) or times[0] > 1 or times[-1] < 0:
        raise ValueError(f"timesteps {list(times)} are not two or more falling numbers in [0, 1]; 1 is noise, 0 clean")
    return times


def prompt_list(prompt: Any, name: str = "prompt") -> list[str]:
    """The prompts as a list.

    Raises:
        ValueError: not a string or list of strings, or an empty list.
    """
    prompts = [prompt] if isinstance(prompt, str) else prompt
    if not isinstance(prompts, list | tuple) or not all(isinstance(one, str) for one in prompts):
        raise ValueError(f"{name} is {type(prompt).__name__}; give a string or a list of strings")
    if not prompts:
        raise ValueError(f"{name} is an empty list; give at least one, '' for no text")
    return list(prompts)


def check_count(num_images_per_prompt: int) -> None:
    """Raises ValueError unless it is a positive whole number."""
    if not isinstance(num_images_per_prompt, int) or not 1 <= num_images_per_prompt <= bounds.COPIES:
        raise ValueError(
            f"num_images_per_prompt {num_images_per_prompt!r} is not a positive whole number up to {bounds.COPIES:,}"
        )


def resolve_generator(generator: Generator | Sequence[Generator] | None, images: int) -> Generators:
    """One generator for the batch, or one per image; a fresh one where none is given, so that nothing global moves.

    Raises:
        ValueError: a list whose length is not the number of images.
    """
    if generator is None:
        fresh = torch.Generator()
        fresh.seed()
        return fresh
    if isinstance(generator, Generator):
        return generator
    if not isinstance(generator, list | tuple) or not all(isinstance(one, Generator) for one in generator):
        raise ValueError(
            f"generator is {type(generator).__name__} {generator!r}; give torch.Generator().manual_seed(…), or a list"
        )
    if len(generator) != images:
        raise ValueError(f"generator is a list of {len(generator)} for {images} images; give one, or one per image")
    return list(generator)


def default_side(resolution_multiple: float) -> int:
    """The side of a square image that a cascade was trained on: 1024 px, or 64 px for the embedded one."""
    return 1024 if resolution_multiple > 32 else 64


def semantic_size(height: int, width: int, resolution_multiple: float) -> tuple[int, int]:
    """Sides of the semantic latents of an image."""
    return math.ceil(height / resolution_multiple), math.ceil(width / resolution_multiple)


def seen_size(height: int, width: int, multiple: float, stride: int) -> tuple[int, int]:
    """Sides at which an encoder of that stride sees an image, so that each latent is `multiple` pixels of it.

    As released 32 of 42.67: three quarters.
    """
    cells = semantic_size(height, width, multiple)
    sides = (min(max(round(side * stride / multiple), stride * (count - 1) + 1, stride), stride * count)
             for side, count in zip((height, width), cells, strict=True))  # fmt: skip
    return tuple(sides)  # type: ignore[return-value]


def vq_size(height: int, width: int, *, stride: int = 4, patch: int = 2) -> tuple[int, int]:
    """Sides of Stage A's latents of an image, rounded up to whole patches; the image is cropped afterwards."""
    return tuple(math.ceil(math.ceil(side / stride) / patch) * patch for side in (height, width))  # type: ignore[return-value]
