"""A larger canvas around a picture, and the mask of what is new on it."""

from __future__ import annotations

from typing import Any

import numpy as np
from PIL import Image

from .inputs import SMALLEST_SIDE
from .outputs import to_pictures, to_pixels


def outpaint(
    image: Any, left: int = 0, top: int = 0, right: int = 0, bottom: int = 0
) -> tuple[Image.Image, Image.Image]:
    """The picture on a larger canvas, and the mask, white where the canvas is new: `image` and `mask_image` of a call.

    The picture's border colours go on into the new area, so that what lies beside them is encoded without an edge.

    Args:
        left, top, right, bottom: pixels to add on each side.

    Raises:
        ValueError: no pixels to add, or sides that do not end at a multiple of 8 from 64 up.
    """
    margins = {"left": left, "top": top, "right": right, "bottom": bottom}
    for name, margin in margins.items():
        if not isinstance(margin, int) or isinstance(margin, bool) or margin < 0:
            raise ValueError(f"{name} {margin!r} is no number of pixels from 0 up")
    if not any(margins.values()):
        raise ValueError("left, top, right and bottom are all 0; say by how many pixels the picture grows")
    picture = np.asarray(to_pictures(to_pixels(image, "image")[:1], "pil")[0])
    for side, names, length in (("width", "left + right", left + right), ("height", "top + bottom", top + bottom)):
        _check_side(side, picture.shape[1 if side == "width" else 0], names, length)
    pads = ((top, bottom), (left, right))
    canvas = np.pad(picture, (*pads, (0, 0)), mode="edge")
    mask = np.pad(np.zeros(picture.shape[:2], np.uint8), pads, constant_values=255)
    return Image.fromarray(canvas), Image.fromarray(mask)


def _check_side(side: str, length: int, names: str, margin: int) -> None:
    total = length + margin
    if total % 8 or total < SMALLEST_SIDE:
        nearest = max(SMALLEST_SIDE, round(total / 8) * 8, -(-length // 8) * 8)
        raise ValueError(
            f"{side} {total} ({length} of the picture, {names} {margin}) is no multiple of 8 from {SMALLEST_SIDE} up; "
            f"nearest: {names} = {nearest - length}"
        )
