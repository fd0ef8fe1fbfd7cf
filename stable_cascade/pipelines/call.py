"""What a pipeline's call takes and returns: the table of sampling knobs, checks of arguments, images in and out."""

from __future__ import annotations

import difflib
import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from numbers import Real
from typing import Annotated, Any, TypedDict, get_type_hints

import numpy as np
import torch
from diffusers.utils import BaseOutput
from PIL import Image
from torch import Generator, Tensor

from stable_cascade import bounds
from stable_cascade.bounds import check_shape
from stable_cascade.diffusion.guidance import GUIDANCES
from stable_cascade.pixels import rgb_pixels


@dataclass(frozen=True)
class Knob:
    """The default of a setting, the check that every value passes, and how it is offered on the command line."""

    default: Any
    check: Callable[[str, Any], Any]
    """(name, value) -> the value as it is kept; ValueError where it means nothing."""
    flag: str
    help: str
    option: Mapping[str, Any] = field(default_factory=dict)
    """Keywords for `argparse` about its values."""


def is_number(value: Any) -> bool:
    """Whether it is a finite number, and no truth value."""
    return isinstance(value, Real) and not isinstance(value, bool) and math.isfinite(value)


def whole(value: Any) -> Any:
    """A whole number of numpy or torch as Python's; anything else is what it was."""
    if isinstance(value, bool | int | float | str) or value is None:
        return value
    try:
        return operator.index(value)
    except (TypeError, RuntimeError, ValueError):
        return value


def _method(name: str, value: Any) -> str:
    if not isinstance(value, str) or value not in GUIDANCES:
        raise ValueError(f"{name} {value!r} is not one of {', '.join(GUIDANCES)}")
    return value


def _share(name: str, value: Any) -> float:
    if not is_number(value) or not 0 <= value <= 1:
        raise ValueError(f"{name} {value} is not a number from 0 to 1; 0.7 is usual")
    return value


def interval(name: str, value: Any) -> tuple[float, float]:
    """Two numbers from 0 to 1, the second not below the first.

    Raises:
        ValueError: something else.
    """
    pair: Any = tuple(value) if isinstance(value, list | tuple) else ()
    if len(pair) != 2:
        raise ValueError(f"{name} {value} is not two numbers from 0 to 1; (0, 1) is always")
    for end in pair:
        if not is_number(end) or not 0 <= end <= 1:
            raise ValueError(f"{name} {end} is not a number from 0 to 1")
    if pair[0] > pair[1]:
        raise ValueError(f"{name} {value}: the first must not be above the second")
    return pair


def _every(name: str, value: Any) -> int:
    value = whole(value)
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= bounds.STEPS:
        raise ValueError(f"{name} {value!r} is not a positive whole number; 1 runs all of every step")
    return value


class Sampling(TypedDict, total=False):
    """Keyword arguments that every pipeline's call takes and hands to both of its stages."""

    guidance_method: Annotated[
        str,
        Knob(
            "cfg", _method, "guidance-method",
            "; ".join(f"{name}: {method.about}" for name, method in GUIDANCES.items()) + " (default cfg)",
            {"choices": tuple(GUIDANCES)},
        ),
    ]  # fmt: skip
    guidance_rescale: Annotated[
        float, Knob(0.7, _share, "rescale", "of predictions guided by cfg (default 0.7)", {"type": float})
    ]
    guidance_interval: Annotated[
        tuple[float, float],
        Knob(
            (0.0, 1.0), interval, "guidance-interval", "times in which guidance acts, 1 is noise (default 0 1)",
            {"type": float, "nargs": 2, "metavar": ("LOW", "HIGH")},
        ),
    ]  # fmt: skip
    cache_interval: Annotated[
        int,
        Knob(
            1, _every, "cache-interval",
            "run the networks' deeper half every N-th step only: faster, rougher (default 1)",
            {"type": int, "metavar": "N"},
        ),
    ]  # fmt: skip


KNOBS: dict[str, Knob] = {
    name: hint.__metadata__[0] for name, hint in get_type_hints(Sampling, include_extras=True).items()
}


def checked(given: Mapping[str, Any]) -> Sampling:
    """Every knob, with its default where it is not given.

    Raises:
        TypeError: a name that is no knob, as of any unknown argument.
        ValueError: a value that means nothing.
    """
    for name in given:
        if name not in KNOBS:
            nearest = difflib.get_close_matches(name, KNOBS, n=1)
            hint = f"; did you mean '{nearest[0]}'?" if nearest else ""
            raise TypeError(f"unexpected keyword argument '{name}'{hint}")
    return Sampling(**{name: knob.check(name, given.get(name, knob.default)) for name, knob in KNOBS.items()})  # type: ignore[typeddict-item]


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


OUTPUT_TYPES = ("pil", "np", "pt", "latent")


@dataclass
class StableCascadePriorPipelineOutput(BaseOutput):
    """Semantic latents, under diffusers' name, and the text embeddings they were made from.

    Shapes: image_embeddings (B, 16, h, w), prompt_embeds (B, L, D), prompt_embeds_pooled (B, 1, P); the negative ones
    are the same, or None without guidance.
    """

    image_embeddings: Any
    prompt_embeds: Any
    prompt_embeds_pooled: Any
    negative_prompt_embeds: Any = None
    negative_prompt_embeds_pooled: Any = None


def check_output_type(output_type: str, allowed: tuple[str, ...] = OUTPUT_TYPES) -> None:
    """Raises ValueError for an output type that does not exist."""
    if output_type not in allowed:
        raise ValueError(f"output_type '{output_type}' is not one of {', '.join(allowed)}")


def to_images(pixels: Tensor, output_type: str) -> Any:
    """Pixels in [0, 1] as PIL images, a numpy array (B, H, W, 3) or the tensor itself."""
    pixels = pixels.float().clamp(0, 1)
    if output_type == "pt":
        return pixels
    array = pixels.permute(0, 2, 3, 1).cpu().numpy()
    if output_type == "np":
        return array
    return [Image.fromarray(image) for image in (array * 255).round().astype(np.uint8)]


def to_pixels(images: Any, name: str = "images") -> Tensor:
    """One batch of float32 pixels in [0, 1] from an image or several: PIL, arrays (H, W, 3), tensors (3, H, W).

    Shapes: -> (B, 3, H, W).

    Raises:
        ValueError: something else, no image at all, or images of different sizes.
    """
    # One image, several, or a batch.
    if isinstance(images, Tensor | np.ndarray) and images.ndim == 4:
        images = list(images)
    if not isinstance(images, list | tuple):
        images = [images]
    if not images:
        raise ValueError(f"{name} is empty; give at least one image")
    # All as float32 in [0, 1], of one size that can be drawn.
    batch = [_pixels(image, name) for image in images]
    sizes = {tuple(pixels.shape[1:]) for pixels in batch}
    for height, width in sizes:
        try:
            check_shape(width, height)
        except ValueError as error:
            raise ValueError(f"{name}: {error}") from None
    if len(sizes) > 1:
        raise ValueError(f"{name} have different sizes {sorted(sizes)}; resize them or pass them one by one")
    return torch.stack(batch)


def _pixels(image: Any, name: str) -> Tensor:
    if isinstance(image, Image.Image):
        return from_array(rgb_pixels(image))
    if isinstance(image, np.ndarray) and image.ndim == 3 and image.shape[-1] == 3:
        return in_range(from_array(image), name)
    if isinstance(image, Tensor) and image.ndim == 3 and image.shape[0] == 3 and image.is_floating_point():
        return in_range(image.float(), name)
    what = f"{type(image).__name__} {tuple(image.shape)}" if hasattr(image, "shape") else type(image).__name__
    raise ValueError(f"{name} holds {what}; give PIL images, arrays (H, W, 3) or float tensors (3, H, W) in [0, 1]")


def from_array(array: np.ndarray) -> Tensor:
    """An array as float32, whole bytes as parts of 255. Shapes: (..., H, W, C) -> (..., C, H, W)."""
    pixels = torch.from_numpy(array.astype(np.float32) / (255 if array.dtype == np.uint8 else 1))
    return pixels.movedim(-1, -3)


def in_range(pixels: Tensor, name: str) -> Tensor:
    """The pixels.

    Raises:
        ValueError: no pixels, or values far outside [0, 1], as of images normalised for a network.
    """
    low, high = (pixels.min().item(), pixels.max().item()) if pixels.numel() else (math.nan, math.nan)
    if not (low >= -0.1 and high <= 1.1):
        raise ValueError(f"{name} has values from {low:g} to {high:g}, size {tuple(pixels.shape)}; give [0, 1]")
    return pixels
