"""Image files from anywhere, decoded within bounds; what cannot be read is one line; and PSNR."""

from __future__ import annotations

import io
import logging
import os
import warnings
from typing import IO

import numpy as np
from PIL import Image

from stable_cascade import bounds
from stable_cascade.disk import local_path, open_file
from stable_cascade.pixels import has_alpha, readable_formats, to_srgb, upright, wide_grey
from stable_cascade.wording import brief, quoted

logger = logging.getLogger(__name__)

LARGEST_IMAGE = 64.0
"""Megapixels that are decoded; a photograph has 12 to 60."""


def read_image(
    source: str | os.PathLike[str] | bytes,
    *,
    mode: str | None = "RGB",
    paper: str = "white",
    largest: float = LARGEST_IMAGE,
) -> Image.Image:
    """The image of a file, upright; the first frame of an animation, which the log says.

    Args:
        source: a path, or the file's bytes.
        mode: RGB or L, with `paper` behind what is transparent; None keeps what there is: L, RGB
            or RGBA.
        largest: megapixels that are allowed; the size is read before any pixel is decoded.

    Raises:
        ValueError: no such file, no image, a damaged one, or one that is too large.
    """
    name, opened = _opened(source)
    try:
        with opened, warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(opened, formats=readable_formats()) as image:
                _check_pixels(name, image.size, largest)
                if getattr(image, "is_animated", False):
                    logger.warning("%s is an animation; its first frame is taken", name)
                    image.seek(0)
                image.load()
                return in_mode(image, mode, paper)
    except Image.DecompressionBombError:
        raise ValueError(f"{name} has more than {largest:g} megapixels; shrink it first") from None
    except Image.UnidentifiedImageError:
        known = ", ".join(readable_formats())
        raise ValueError(f"{name} is no image that can be read; give one of {known}") from None
    except ValueError as error:
        raise ValueError(str(error) if str(error).startswith(name) else f"{name}: {brief(error)}") from None
    except Exception as error:  # Pillow's plugins raise anything on damaged files
        raise ValueError(
            f"{name} is damaged: {brief(error) or type(error).__name__}; save it again or take another copy"
        ) from None


def _opened(source: str | os.PathLike[str] | bytes) -> tuple[str, IO[bytes]]:
    """What to call the image in errors, and its bytes as a file."""
    if isinstance(source, bytes):
        return "the image", io.BytesIO(source)
    path = local_path(source)
    name = f"image {quoted(path)}"
    if not path.exists() or path.is_dir():
        raise ValueError(f"{name} {'is a folder' if path.is_dir() else 'does not exist'}; give an image file")
    return name, open_file(path, at_most=bounds.IMAGE_FILE, what="image")


def _check_pixels(name: str, size: tuple[int, int], largest: float) -> None:
    width, height = size
    if width < 1 or height < 1:
        raise ValueError(f"{name} is damaged: its size is {width} x {height}")
    if width * height > largest * 1e6:
        pixels = width * height / 1e6
        raise ValueError(
            f"{name} is {width} x {height}, {pixels:,.0f} megapixels; at most {largest:g} are read, shrink it first"
        )
    try:
        bounds.check_shape(width, height)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def in_mode(image: Image.Image, mode: str | None = "RGB", paper: str = "white") -> Image.Image:
    """The image upright and in `mode`; 16 bits of grey are scaled down, where Pillow itself would clip them.

    Raises:
        ValueError: its values have no defined range.
    """
    image = upright(image)
    if image.mode == "F":
        raise ValueError("32-bit float images have no defined range; save it with 8 or 16 bits")
    if image.mode.startswith("I"):
        image = Image.fromarray(np.rint(255 * wide_grey(image)).astype(np.uint8))
    transparent = has_alpha(image)
    if mode is None:
        mode = "RGBA" if transparent else "L" if image.mode in ("1", "L") else "RGB"
    image = to_srgb(image.convert("RGBA") if transparent else image)
    if transparent and mode != "RGBA":
        image = Image.alpha_composite(Image.new("RGBA", image.size, paper), image)
    image = image.convert(mode)
    image.info.clear()
    return image


def decibels(image: Image.Image, original: Image.Image) -> float:
    """PSNR of an image, with its original resized to it where they differ; 120 for the same."""
    from stable_cascade.objectives.vqgan import psnr
    from stable_cascade.pipelines.outputs import to_pixels

    original = original if original.size == image.size else original.resize(image.size)
    return psnr(to_pixels(image), to_pixels(original)).item()
