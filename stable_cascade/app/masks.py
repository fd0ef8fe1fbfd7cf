"""The mask that was drawn over a picture."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from PIL import Image, ImageChops

_OPAQUE = 128


def drawn_mask(edited: Mapping[str, Any] | None, read: Callable[..., Image.Image]) -> tuple[Image.Image, Image.Image]:
    """The picture below, and the mask of what was drawn over it: white where any layer covers it at least by half.

    Args:
        edited: the editor's value, `background` and `layers`, as paths of pictures with transparency.
        read: (path, mode=None) -> picture.

    Raises:
        ValueError: there is no picture, or nothing is drawn over it.
    """
    path = (edited or {}).get("background")
    background = read(path, mode=None) if path else None
    if background is None or _blank(background):
        raise ValueError("inpaint needs a picture; upload one and draw over what is to be painted anew")
    mask = Image.new("L", background.size, 0)
    for layer in (edited or {}).get("layers") or ():
        covered = read(layer, mode=None).convert("RGBA").getchannel("A").point(lambda alpha: 255 * (alpha >= _OPAQUE))
        mask = ImageChops.lighter(mask, covered if covered.size == mask.size else covered.resize(mask.size))
    if mask.getextrema() == (0, 0):
        raise ValueError("the mask is empty; draw over what is to be painted anew, with the brush in the picture")
    return background, mask


def _blank(picture: Image.Image) -> bool:
    """Whether it is fully transparent: the editor's canvas without a picture."""
    return picture.mode == "RGBA" and picture.getchannel("A").getextrema() == (0, 0)
