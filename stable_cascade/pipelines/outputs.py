"""What pipelines return, and images in the form that the caller asked for."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers.utils import BaseOutput
from PIL import Image
from torch import Tensor

from stable_cascade.bounds import check_shape
from stable_cascade.pixels import rgb_pixels

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
    if isinstance(images, Tensor | np.ndarray) and images.ndim == 4:
        images = list(images)
    if not isinstance(images, list | tuple):
        images = [images]
    if not images:
        raise ValueError(f"{name} is empty; give at least one image")
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
