"""From the bytes of an image to (3, H, W) pixels, whatever the file's mode.

Pixels are float32 in [0, 1], or the bytes of an ordinary RGB file while they are still to be resized: torch resizes
bytes several times faster than floats, and as Pillow does.
"""

from __future__ import annotations

import io
import math
import struct
import warnings
import zlib
from fractions import Fraction

import torch
import torch.nn.functional as F
from PIL import ExifTags, Image, UnidentifiedImageError
from torch import Tensor

from stable_cascade import bounds
from stable_cascade.pixels import readable_formats, rgb_pixels
from stable_cascade.wording import brief

IMAGE_EXTENSIONS = ("jpg", "jpeg", "png", "webp", "avif", "bmp", "gif", "tif", "tiff", "ppm", "pgm", "jp2")
"""Members with these extensions are images, in order of preference."""

LARGEST_IMAGE = bounds.IMAGE_PIXELS

_SIGNATURES = (
    b"\xff\xd8\xff", b"\x89PNG", b"GIF8", b"BM", b"II*\0", b"MM\0*", b"P5", b"P6", b"\0\0\0\x0cjP",
)  # fmt: skip
_UNREAD = {"heic": "HEIC", "heix": "HEIC", "hevc": "HEIC", "mif1": "HEIF", "msf1": "HEIF", "jxl ": "JPEG XL"}

_TURNED = (5, 6, 7, 8)


def looks_like_image(head: bytes) -> bool:
    """Whether a file's first 32 bytes are those of an image, whatever its name; also of kinds that are not read."""
    if head.startswith(_SIGNATURES) or (head[:4] == b"RIFF" and head[8:12] == b"WEBP"):
        return True
    return head[4:8] == b"ftyp" and head[8:12].decode("latin-1") in {*_UNREAD, "avif", "avis"}


def _unread_kind(head: bytes) -> str:
    """The remedy for a kind of image that is not read."""
    kind = _UNREAD.get(head[8:12].decode("latin-1")) if head[4:8] == b"ftyp" else None
    return f"{kind} images are not read; convert it to JPEG or PNG" if kind else ""


def image_size(data: bytes, *, whole: bool = True) -> tuple[int, int] | None:
    """(width, height) after EXIF rotation from a file's first bytes; None when more bytes are needed.

    Raises:
        ValueError: the bytes are no image (`whole` says that there are no more of them).
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(data), formats=readable_formats()) as image:
                width, height = _stored_size(image)
                turned = _orientation(image) in _TURNED
    except Exception as error:  # Pillow's plugins raise anything on damaged files
        if not whole:
            return None
        unknown = isinstance(error, UnidentifiedImageError)  # its text shows an object's address
        reason = "its bytes are of no kind that is read" if unknown else brief(error)
        raise ValueError(_unread_kind(data) or f"no readable image: {reason}") from None
    if width < 1 or height < 1:
        raise ValueError(f"no readable image: its size is {width} x {height}")
    bounds.check_shape(width, height)
    return (height, width) if turned else (width, height)


def _stored_size(image: Image.Image) -> tuple[int, int]:
    """(width, height) before rotation; recent Pillow gives a TIFF's size after it."""
    tags = getattr(image, "tag_v2", None)
    if tags is None:
        return image.size
    return int(tags[ExifTags.Base.ImageWidth]), int(tags[ExifTags.Base.ImageLength])


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation, without decoding: a PNG's late EXIF block counts as absent."""
    exif = Image.Exif()
    block = image.info.get("exif")
    if block:
        exif.load(block)
    elif image.format in ("TIFF", "MPO"):
        exif = image.getexif()
    value = exif.get(ExifTags.Base.Orientation, 1)
    return value if isinstance(value, int) else 1


def decode_image(data: bytes) -> Tensor:
    """The image, upright, on white, as RGB.

    Shapes: -> (3, H, W) float32 in [0, 1].

    Raises:
        ValueError: the file is damaged, of no supported kind, or has more than `LARGEST_IMAGE` pixels.
    """
    return in_unit_range(decode_stored(data)).contiguous()


def in_unit_range(pixels: Tensor) -> Tensor:
    """Stored pixels as float32 in [0, 1]. Shapes: any -> the same."""
    if pixels.is_floating_point():
        return pixels
    # A tensor, because CUDA multiplies by the reciprocal of a number, which rounds otherwise than a division; and one
    # that is filled on the device, because copying a number there would wait for it.
    return pixels.to(torch.float32).div_(torch.full((), 255.0, device=pixels.device))


def decode_stored(data: bytes, *, at_least: tuple[int, int] | None = None) -> Tensor:
    """The image, upright, on white, as RGB: the file's bytes, or floats where it has transparency or more bits.

    Args:
        data: the whole file.
        at_least: (height, width) that will be needed; a larger JPEG is then decoded at a half, quarter or eighth,
            never below this size.

    Shapes: -> (3, H, W) uint8 with channels last in memory, or float32 in [0, 1].

    Raises:
        ValueError: the file is damaged, of no supported kind, or has more than `LARGEST_IMAGE` pixels.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(io.BytesIO(data), formats=readable_formats()) as image:
                if at_least is not None and image.format == "JPEG":
                    height, width = at_least[::-1] if _orientation(image) in _TURNED else at_least
                    image.draft(None, (width, height))  # type: ignore[arg-type]
                _check_pixels(image.size)
                image.load()
                array = rgb_pixels(image)
    except Exception as error:
        raise ValueError(_unread_kind(data) or f"cannot decode: {type(error).__name__}: {brief(error)}") from None
    return torch.from_numpy(array).permute(2, 0, 1)


def _check_pixels(size: tuple[int, int]) -> None:
    if size[0] * size[1] > LARGEST_IMAGE:
        raise ValueError(f"{size[0]} x {size[1]} pixels are more than {LARGEST_IMAGE:,}; shrink the image")
    bounds.check_shape(*size)


def decode_mask(data: bytes) -> Tensor:
    """A mask file as grey, upright, transparency on white.

    Shapes: -> (1, H, W) float32 in [0, 1].

    Raises:
        ValueError: the file is damaged or of no supported kind.
    """
    try:
        return decode_image(data).mean(0, keepdim=True)
    except ValueError as error:
        raise ValueError(f"its mask: {error}") from None


def resize_to_cover(pixels: Tensor, size: tuple[int, int]) -> Tensor:
    """The smallest version of the image, with its own shape, that covers `size` (bilinear, antialiased).

    Shapes: (3, H, W) -> (3, H', W') with H' >= size[0], W' >= size[1].
    """
    return resize_to(pixels, covering_size(pixels.shape[1], pixels.shape[2], size))


def resize_to(pixels: Tensor, target: tuple[int, int]) -> Tensor:
    """The image at exactly this size (bilinear, antialiased), as bytes where it was bytes.

    Shapes: (C, H, W) uint8 or float32 in [0, 1] -> (C, *target).
    """
    if target == tuple(pixels.shape[1:]):
        return pixels
    resized = F.interpolate(pixels[None], size=target, mode="bilinear", antialias=True, align_corners=False)[0]
    return resized.clamp_(0, 1) if resized.is_floating_point() else resized


def covering_size(height: int, width: int, bucket: tuple[int, int]) -> tuple[int, int]:
    """The smallest (height, width) of the image's own shape that covers the bucket (exact integer arithmetic)."""
    short, long = min(height, width), max(height, width)
    edge = max(-(-bucket[0] * short // height), -(-bucket[1] * short // width))
    other = math.floor(Fraction(edge * long, short))
    resized = (edge, other) if height <= width else (other, edge)
    return max(resized[0], bucket[0]), max(resized[1], bucket[1])


_PNG = b"\x89PNG\r\n\x1a\n"
_NO_FRAME = (0xC4, 0xC8, 0xCC)


def plain_size(head: bytes) -> tuple[int, int] | None:
    """(width, height) of an ordinary PNG or JPEG without EXIF data; None where only a full reader can tell."""
    if head.startswith(_PNG):
        return _png_size(head)
    if head.startswith(b"\xff\xd8\xff"):
        return _jpeg_size(head)
    return None


def _png_size(head: bytes) -> tuple[int, int] | None:
    pixels = head.find(b"IDAT")
    if head[8:16] != b"\0\0\0\rIHDR" or pixels < 33 or head.find(b"eXIf", 0, pixels) >= 0:
        return None
    if struct.unpack(">I", head[29:33])[0] != zlib.crc32(head[12:29]):
        return None
    width, height = struct.unpack(">II", head[16:24])
    return (width, height) if width and height else None


def _jpeg_size(head: bytes) -> tuple[int, int] | None:
    place, size = 2, None
    while place + 4 <= len(head):
        if head[place] != 0xFF:
            return None
        marker = head[place + 1]
        if marker == 0xDA:  # the pixels begin: no header follows
            return size
        if marker < 0xC0 or 0xD0 <= marker <= 0xD9 or marker == 0xFF:
            return None
        (length,) = struct.unpack_from(">H", head, place + 2)
        if marker in (0xE1, 0xE2) and head[place + 4 : place + 8] in (b"Exif", b"MPF\0"):
            return None
        if 0xC0 <= marker <= 0xCF and marker not in _NO_FRAME:
            if place + 9 > len(head):
                return None
            height, width = struct.unpack_from(">HH", head, place + 5)
            if not (width and height):
                return None
            size = width, height
        place += 2 + length
    return None
