"""The files that a drawing names: found, checked by their SHA-256, and images decoded within bounds."""

from __future__ import annotations

import functools
import hashlib
import io
import logging
import os
import warnings
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import IO

import numpy as np
from PIL import Image

from stable_cascade import bounds
from stable_cascade.disk import local_path, open_file
from stable_cascade.pixels import has_alpha, readable_formats, to_srgb, upright, wide_grey
from stable_cascade.wording import brief, quoted

from .request import ControlChoice, Drawing, InputFile, LoraChoice

WEIGHTS, TOKENS = "pytorch_lora_weights.safetensors", "learned_embeds.safetensors"
KEPT_FROM = 64 * 2**20  # bytes; the sum of a smaller file is not worth keeping
_BLOCK = 2**20


def with_sums(drawing: Drawing, *, skip: Sequence[str] = (), allow_changed: bool = False) -> Drawing:
    """The drawing with the SHA-256 of every file that it names.

    Args:
        skip: input images that are in memory, by the names `input_images` gives them.
        allow_changed: takes the new sums where the drawing has others.

    Raises:
        ValueError: a file is missing, or is not the one that the drawing was made with.
    """

    # Each kind of file is hashed anew and compared with the sum that is noted.
    def image(name: str, file: InputFile | None) -> InputFile | None:
        if file is None or name in skip:
            return file
        return replace(file, sha256=_sum(name, [local_path(file.path)], file.sha256, allow_changed))

    def lora(choice: LoraChoice) -> LoraChoice:
        files = lora_files(choice.path)
        return replace(choice, sha256=_sum("lora", files, choice.sha256, allow_changed)) if files else choice

    def control(place: int, choice: ControlChoice) -> ControlChoice:
        checked = replace(choice, image=image(f"control_images[{place}]", choice.image))
        files = controlnet_files(choice.path)
        return replace(checked, sha256=_sum("controlnet", files, choice.sha256, allow_changed)) if files else checked

    return replace(
        drawing,
        image=image("image", drawing.image),
        mask_image=image("mask_image", drawing.mask_image),
        images=tuple(file for file in (image("images", one) for one in drawing.images) if file is not None),
        loras=tuple(lora(choice) for choice in drawing.loras),
        controlnets=tuple(control(place, choice) for place, choice in enumerate(drawing.controlnets)),
    )


def lora_files(path: str) -> list[Path]:
    """The files that make a LoRA: itself and learned tokens beside it; none for a name on the Hub.

    Raises:
        ValueError: there is no such file or folder, and the name is none of the Hub.
    """
    place = local_path(path)
    if place.is_dir() and not (place / WEIGHTS).is_file():
        found = sorted(place.glob("*.safetensors"))
        if not found:
            raise ValueError(f"lora {quoted(path)} is a folder without a .safetensors file; name the LoRA's file")
        return found
    place = place / WEIGHTS if place.is_dir() else place
    if place.is_file():
        beside = place.parent / TOKENS
        return [place, beside] if place.name == WEIGHTS and beside.is_file() else [place]
    if is_hub_name(path):
        return []
    raise ValueError(f"lora {quoted(path)} does not exist; give a file, a folder or a Hub name")


def controlnet_files(path: str) -> list[Path]:
    """The files that make a ControlNet; none for a name on the Hub.

    Raises:
        ValueError: there is no such file or folder, and the name is none of the Hub.
    """
    place = local_path(path)
    if place.is_file():
        return [place]
    if place.is_dir():
        folder = controlnet_folder(place)
        return sorted(file for file in folder.iterdir() if file.suffix in (".safetensors", ".json"))
    if is_hub_name(path):
        return []
    raise ValueError(f"controlnet {quoted(path)} does not exist; give a folder, a .safetensors file or a Hub name")


def controlnet_folder(place: Path) -> Path:
    """The folder with a ControlNet's config: the one named, or `controlnet` in it.

    Raises:
        ValueError: there is none.
    """
    for folder in (place, place / "controlnet"):
        if (folder / "config.json").is_file():
            return folder
    raise ValueError(f"controlnet {quoted(place)} has no config.json; give the folder that a training exported")


def is_hub_name(path: str) -> bool:
    """Whether a name that is no path here may be `owner/name` on the Hub."""
    owner, slash, name = path.partition("/")
    named = bool(owner and slash and name) and "/" not in name and not path.startswith((".", "~"))
    return named and not Path(path).exists() and not Path(path).suffix


def _sum(what: str, files: Sequence[Path], expected: str | None, allow_changed: bool) -> str:
    found = sha256_of(files, what)
    if expected not in (None, found) and not allow_changed:
        raise ValueError(
            f"{what} {quoted(files[0])} is not the file that the image was drawn with, its SHA-256 is {found[:12]}… "
            f"instead of {str(expected)[:12]}…; find the old one, or draw with --allow-changed-files"
        )
    return found


def sha256_of(files: Sequence[Path], what: str = "file") -> str:
    """The SHA-256 of a file; of several, that of the lines `sum  name`, as sha256sum prints them.

    Raises:
        ValueError: one cannot be read.
    """
    sums = []
    for file in files:
        try:
            stat = file.stat()
            known = _kept_sum if stat.st_size > KEPT_FROM else _file_sum
            sums.append(known(str(file.resolve()), stat.st_size, stat.st_mtime_ns, stat.st_ino))
        except FileNotFoundError:
            raise ValueError(f"{what} {quoted(file)} does not exist; give the place where it is now") from None
        except OSError as error:
            raise ValueError(f"{what} {quoted(file)} cannot be read: {error.strerror or error}") from None
    if len(files) == 1:
        return sums[0]
    lines = "".join(f"{one}  {file.name}\n" for one, file in zip(sums, files, strict=True))
    return hashlib.sha256(lines.encode("utf-8", "surrogateescape")).hexdigest()


@functools.lru_cache(maxsize=256)
def _kept_sum(path: str, *state: int) -> str:
    """The sum of a large file's bytes, read once as long as its size and time stay."""
    return _file_sum(path)


def _file_sum(path: str, *_: int) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


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
    from stable_cascade.pipelines.call import to_pixels

    original = original if original.size == image.size else original.resize(image.size)
    return psnr(to_pixels(image), to_pixels(original)).item()
