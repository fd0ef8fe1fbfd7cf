"""Files that a drawing names: which bytes they are, so that an image drawn again is drawn from the same ones."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from stable_cascade.disk import local_path
from stable_cascade.wording import quoted

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
