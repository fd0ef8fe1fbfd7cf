"""Reference pictures: what CLIP sees in pictures that a drawing should resemble."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from .knobs import is_number
from .prompts import embed_images
from .stages import Call


def image_conditions(
    image_encoder: Any, images: Any, image_embeds: Tensor | None, weights: Sequence[float] | None, call: Call
) -> Tensor | None:
    """Embedded reference pictures, one row per image to draw; None without any. The weights are only checked.

    Shapes: n pictures, or embeddings (n, D), (1, n, D) or (count, n, D) -> (count, n, D).

    Raises:
        ValueError: pictures and embeddings are both given, a wrong number of rows, or of weights.
    """
    check_references(images, image_embeds, weights, count=call.count)
    if images is not None:
        return embed_images(images, image_encoder, call.device, count=call.count)
    if image_embeds is None:
        return None
    image_embeds = image_embeds[None] if image_embeds.ndim == 2 else image_embeds
    return image_embeds.to(call.device).expand(call.count, -1, -1)


def check_references(images: Any, image_embeds: Tensor | None, weights: Sequence[float] | None, *, count: int) -> None:
    """Raises ValueError for what `image_conditions` refuses, before anything is embedded."""
    if images is not None and image_embeds is not None:
        raise ValueError("images and image_embeds are both given; give one of them")
    pictures = 0
    if images is not None:
        batch = isinstance(images, list | tuple) or getattr(images, "ndim", 0) == 4
        pictures = len(images) if batch else 1
        if not pictures:
            raise ValueError("images is empty; give at least one picture, or leave it out")
    if image_embeds is not None:
        if image_embeds.ndim not in (2, 3):
            raise ValueError(f"image_embeds have shape {tuple(image_embeds.shape)}; give (n, D) or (images, n, D)")
        if image_embeds.ndim == 3 and len(image_embeds) not in (1, count):
            raise ValueError(f"image_embeds has {len(image_embeds)} rows for {count} images; give 1, or one per image")
        pictures = image_embeds.shape[-2]
    if weights is None:
        return
    if len(weights) != pictures:
        raise ValueError(f"image_weights has {len(weights)} entries for {pictures} pictures; give one for each")
    for weight in weights:
        if not is_number(weight):
            raise ValueError(f"image_weights holds {weight!r}; give finite numbers, 1 for a picture as it is")
