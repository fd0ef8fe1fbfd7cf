"""Uploaded files: read within bounds, or refused with one line that names the file and not where it lies."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from PIL import Image, ImageChops

from stable_cascade import bounds
from stable_cascade.disk import read_file
from stable_cascade.drawing import Drawing, read_drawing, read_image
from stable_cascade.wording import brief

_OPAQUE = 128


def read_upload(path: str, *, mode: str | None = "RGB", largest: float) -> Image.Image:
    """The uploaded image.

    Raises:
        ValueError: it is no image, or damaged, or has more than `largest` megapixels.
    """
    if not Path(path).is_file():
        raise ValueError(f"image '{_name(path)}' is no longer there; upload it again")
    try:
        return read_image(read_file(path, at_most=bounds.IMAGE_FILE, what="image"), mode=mode, largest=largest)
    except ValueError as error:
        raise ValueError(str(error).replace("the image", f"image '{_name(path)}'", 1)) from None


def read_settings(path: str) -> Drawing:
    """The settings that an uploaded PNG carries.

    Raises:
        ValueError: it carries none.
    """
    try:
        return read_drawing(path)
    except ValueError as error:
        raise ValueError(re.sub(r"^image '.*?'(?=[ :])", lambda _: f"image '{_name(path)}'", str(error))) from None


def check_payload(payload: Any, folder: Path) -> None:
    """Passes what names no file, or files of `folder`.

    Raises:
        ValueError: an address, which the server would fetch, or an image inside the request.
    """
    root = folder.resolve()
    for file in uploaded_files(payload):
        path, url = file.get("path"), file.get("url")
        if isinstance(url, str) and url.lstrip().lower().startswith("data:"):
            raise ValueError("an image inside a request is not taken; upload it")
        if path is None and url is None:
            continue
        if not isinstance(path, str) or "://" in path or not Path(path).resolve().is_relative_to(root):
            raise ValueError("a file that was not uploaded is not taken; upload it")


def uploaded_files(payload: Any) -> Iterator[Mapping[str, Any]]:
    """Everything in a request that could be meant as a file, at any depth."""
    if isinstance(payload, Mapping):
        if "path" in payload or "url" in payload:
            yield payload
        for value in payload.values():
            yield from uploaded_files(value)
    elif isinstance(payload, (list, tuple)):
        for value in payload:
            yield from uploaded_files(value)


def _name(path: str) -> str:
    return brief(Path(path).name, 60)


def drawn_mask(edited: Mapping[str, Any] | None, read: Callable[..., Image.Image]) -> tuple[Image.Image, Image.Image]:
    """The image below, and the mask of what was drawn over it: white where any layer covers it at least by half.

    Args:
        edited: the editor's value, `background` and `layers`, as paths of images with transparency.
        read: (path, mode=None) -> image.

    Raises:
        ValueError: there is no image, or nothing is drawn over it.
    """
    path = (edited or {}).get("background")
    background = read(path, mode=None) if path else None
    if background is None or _blank(background):
        raise ValueError("inpaint needs an image; upload one and draw over what is to be painted anew")
    mask = Image.new("L", background.size, 0)
    for layer in (edited or {}).get("layers") or ():
        covered = read(layer, mode=None).convert("RGBA").getchannel("A").point(lambda alpha: 255 * (alpha >= _OPAQUE))
        mask = ImageChops.lighter(mask, covered if covered.size == mask.size else covered.resize(mask.size))
    if mask.getextrema() == (0, 0):
        raise ValueError("the mask is empty; draw over what is to be painted anew, with the brush in the image")
    return background, mask


def _blank(image: Image.Image) -> bool:
    """Whether it is fully transparent: the editor's canvas without an image."""
    return image.mode == "RGBA" and image.getchannel("A").getextrema() == (0, 0)
