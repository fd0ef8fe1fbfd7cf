"""From an opened image of any kind to upright RGB pixels in sRGB: the reader of data, pipelines, commands and page.

EXIF says which way is up, an ICC profile what the numbers mean, alpha what is to lie on white; grey may have 16 bits.
"""

from __future__ import annotations

import functools
import io
import logging
from typing import Any

import numpy as np
from PIL import ExifTags, Image, ImageOps

logger = logging.getLogger(__name__)

# Only what Pillow decodes by itself: EPS, for one, would start another program.
FORMATS = ("PNG", "JPEG", "MPO", "WEBP", "AVIF", "BMP", "GIF", "TIFF", "PPM", "JPEG2000")
WITH_ALPHA = ("RGBA", "LA", "PA", "RGBa", "La")
LARGEST_PROFILE = 2**22
_SPACES = {"RGB": "RGB", "RGBA": "RGB", "L": "GRAY", "CMYK": "CMYK"}
"""Mode of an image -> the colour space that its profile must be about."""


def readable_formats() -> list[str]:
    """Those of the allowed kinds that this Pillow can read."""
    Image.init()
    return [name for name in FORMATS if name in Image.OPEN]


def has_alpha(image: Image.Image) -> bool:
    """Whether parts of it may be transparent."""
    return "transparency" in image.info or image.mode in WITH_ALPHA


def rgb_pixels(image: Image.Image) -> np.ndarray:
    """The image upright, in sRGB, on white.

    Shapes: -> (H, W, 3) uint8, or float32 in [0, 1] where it has transparency or 16 bits.

    Raises:
        ValueError: its values have no defined range.
    """
    image = upright(image)
    if image.mode.startswith("I"):
        return np.repeat(wide_grey(image)[..., None], 3, axis=2)
    if image.mode == "F":
        raise ValueError("32-bit float images have no defined range; save it with 8 or 16 bits")
    if has_alpha(image):
        pixels = np.asarray(to_srgb(image.convert("RGBA")), np.float32) / 255
        alpha = pixels[..., 3:]
        return pixels[..., :3] * alpha + (1 - alpha)
    image = to_srgb(image)
    return np.array(image if image.mode == "RGB" else image.convert("RGB"))


def upright(image: Image.Image) -> Image.Image:
    """The image turned as its EXIF block says; the same object where there is nothing to turn."""
    turned = image.getexif().get(ExifTags.Base.Orientation, 1) not in (0, 1)
    return ImageOps.exif_transpose(image) if turned else image


def wide_grey(image: Image.Image) -> np.ndarray:
    """16-bit grey scaled to [0, 1]; Pillow's own conversion to 8 bits clips everything above 255 to white.

    Shapes: -> (H, W) float32.

    Raises:
        ValueError: it has more than 16 bits.
    """
    values = np.asarray(image).astype(np.float32)
    if values.size and (values.min() < 0 or values.max() > 65535):
        raise ValueError("integer images must have at most 16 bits")
    return values / 65535


def to_srgb(image: Image.Image) -> Image.Image:
    """The image in sRGB, by its ICC profile; as it is where it has none, or one that is sRGB already.

    A profile that cannot be read, or is about other colours than the image has, is left out with a warning.
    """
    profile = image.info.get("icc_profile")
    if not profile:
        return image
    # What has no profile of its own kind is turned into what has: palettes into RGB, black and white into grey.
    mode = {"P": "RGB", "1": "L", "YCbCr": "RGB", "LAB": "RGB"}.get(image.mode, image.mode)
    image = image if image.mode == mode else image.convert(mode)
    try:
        transform = _transform(profile, mode)
    except Exception as error:  # LittleCMS and Pillow raise several kinds
        _warn(str(error) or type(error).__name__)
        return image
    return image if transform is None else transform.apply(image)


@functools.lru_cache(maxsize=64)
def _warn(reason: str) -> None:
    """Once per reason: a data set may have the same profile in every image."""
    logger.warning("an ICC profile is left out: %s; the image is read as sRGB", reason)


@functools.lru_cache(maxsize=16)
def _transform(profile: bytes, mode: str) -> Any:
    """What turns pixels of this mode into sRGB; None where they are in it.

    Raises:
        ValueError: the profile is too large, or about other colours; Pillow's errors for one that is damaged.
    """
    from PIL import ImageCms

    if len(profile) > LARGEST_PROFILE:
        raise ValueError(f"it has {len(profile):,} bytes, more than {LARGEST_PROFILE:,}")
    source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
    space = source.profile.xcolor_space.strip()
    if space != _SPACES.get(mode):
        raise ValueError(f"it is about {space}, the image is {mode}")
    # A way there and back would round: what is sRGB stays as it is.
    if "srgb" in ImageCms.getProfileDescription(source).lower():
        return None
    return ImageCms.buildTransform(
        source, ImageCms.createProfile("sRGB"), mode, "RGBA" if mode == "RGBA" else "RGB",
        renderingIntent=ImageCms.Intent.RELATIVE_COLORIMETRIC,
        flags=ImageCms.Flags.BLACKPOINTCOMPENSATION | ImageCms.Flags.NOCACHE,
    )  # fmt: skip
