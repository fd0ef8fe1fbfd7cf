"""PNG files that carry how they were drawn, in two text chunks: JSON for programs, a few lines for people."""

from __future__ import annotations

import json
import os
import re
import struct
import unicodedata
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

from stable_cascade import bounds
from stable_cascade.disk import local_path, open_file
from stable_cascade.redaction import redacted
from stable_cascade.wording import brief, quoted

from .request import Drawing, field_names

if TYPE_CHECKING:
    from .session import Drawn


KEY = "stable_cascade"
FORMAT = 1
_SIGNATURE = b"\x89PNG\r\n\x1a\n"
_LONGEST = 2**20
_MOST_CHUNKS = 1000


@dataclass(frozen=True)
class Record:
    """What an image says about itself.

    `made_with` names versions, device and threads, on which the last bit of an image may depend. `redacted` lists
    settings that held a credential, which is not written into files; they have to be given again.
    """

    drawing: Drawing
    made_with: Mapping[str, Any]
    redacted: tuple[str, ...] = ()


def save_image(drawn: Drawn, path: str | os.PathLike[str]) -> Path:
    """The new PNG with its settings inside.

    Raises:
        ValueError: the file exists.
    """
    from PIL.PngImagePlugin import PngInfo

    target = local_path(path)
    info = PngInfo()
    info.add_text(KEY, json.dumps(describe(drawn.drawing, drawn.made_with), allow_nan=False))
    readable = parameters(drawn.drawing, drawn.made_with).encode("utf-8", "replace").decode("utf-8")
    info.add_itxt("parameters", readable)
    try:
        with target.open("xb") as file:
            drawn.image.save(file, format="PNG", pnginfo=info)
    except FileExistsError:
        raise ValueError(f"{quoted(target)} exists; images are never overwritten, choose another name") from None
    return target


def slug(text: str, longest: int = 40) -> str:
    """Words of a text as part of a file name: lower case, digits and hyphens, cut at a word where that is possible."""
    plain = unicodedata.normalize("NFKD", text).encode("ascii", "ignore").decode("ascii").lower()
    words = re.sub(r"[^a-z0-9]+", "-", plain).strip("-")
    if len(words) <= longest:
        return words
    return words[: longest + 1].rpartition("-")[0] or words[:longest]


def describe(drawing: Drawing, made_with: Mapping[str, Any]) -> dict[str, Any]:
    """The record as plain JSON, without credentials."""
    plain = drawing.to_json()
    clean = redacted(plain)
    hidden = [name for name in plain if plain[name] != clean[name]]
    return {"format": FORMAT, "drawing": clean, "made_with": redacted(dict(made_with)), "redacted": hidden}


def parameters(drawing: Drawing, made_with: Mapping[str, Any]) -> str:
    """The settings as people and other programs read them: the prompts, then one line of names and values."""
    # Prompts, without credentials.
    clean = redacted(drawing.to_json())
    lines = [clean["prompt"]]
    if clean["negative_prompt"]:
        lines.append(f"Negative prompt: {clean['negative_prompt']}")
    # Names as other programs write them.
    values = {
        "Steps": f"{drawing.prior_num_inference_steps}+{drawing.num_inference_steps}",
        "CFG scale": f"{drawing.prior_guidance_scale:g}",
        "Seed": drawing.seed,
        "Size": f"{drawing.width}x{drawing.height}",
        "Model": clean["model"],
        "Task": drawing.task,
        "Sampler": drawing.sampler,
        "Strength": drawing.strength if drawing.task in ("img2img", "inpaint") else None,
        "LoRA": "; ".join(f"{lora['path']}:{lora['weight']:g}" for lora in clean["loras"]),
        "ControlNet": "; ".join(f"{one['path']}:{one['scale']:g}" for one in clean["controlnets"]),
        "Version": f"stable-cascade {made_with.get('stable_cascade', '')}".strip(),
    }
    lines.append(", ".join(f"{name}: {value}" for name, value in values.items() if value not in (None, "")))
    return "\n".join(lines)


def read_drawing(path: str | os.PathLike[str]) -> Drawing:
    """The settings that an image was drawn with.

    Raises:
        ValueError: it is no PNG, carries none, or they are damaged.
    """
    return read_record(path).drawing


def read_record(path: str | os.PathLike[str]) -> Record:
    """Everything that an image says about itself, read without decoding it.

    Raises:
        ValueError: it is no PNG, carries no record, or the record is damaged.
    """
    name = f"image {quoted(local_path(path))}"
    with open_file(path, at_most=bounds.IMAGE_FILE, what="image") as file:
        text = _record_text(file, name)
    if text is None:
        raise ValueError(f"{name} carries no settings: stable-cascade did not draw it, or another program saved it")
    try:
        values = json.loads(text)
    except (ValueError, RecursionError):
        raise ValueError(f"{name}: its settings are damaged, they are no JSON") from None
    return _record(values, name)


def _record(values: Any, name: str) -> Record:
    if not isinstance(values, dict) or not isinstance(values.get("made_with", {}), dict):
        raise ValueError(f"{name}: its settings are damaged, they are no JSON object")
    if values.get("format") != FORMAT:
        found = brief(values.get("format"), 40)
        raise ValueError(f"{name}: its settings have format {found}, this version reads {FORMAT}; update the package")
    hidden = values.get("redacted", [])
    if not isinstance(hidden, list) or any(one not in field_names() for one in hidden):
        raise ValueError(f"{name}: its settings are damaged, 'redacted' is no list of settings")
    try:
        drawing = Drawing.from_json(values.get("drawing"))
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None
    return Record(drawing, values.get("made_with", {}), tuple(hidden))


def _record_text(file: BinaryIO, name: str) -> bytes | None:
    """Our text chunk; None where there is none before the pixels."""
    if file.read(8) != _SIGNATURE:
        raise ValueError(f"{name} is no PNG; settings are kept in PNG files only")
    for kind, data in _chunks(file, name):
        if kind == b"tEXt" and data.startswith(KEY.encode() + b"\0"):
            return data[len(KEY) + 1 :]
    return None


def _chunks(file: BinaryIO, name: str) -> Iterator[tuple[bytes, bytes]]:
    """Kind and content of the chunks before the pixels; those that are longer than a record are skipped."""
    for _ in range(_MOST_CHUNKS):
        head = file.read(8)
        if len(head) < 8 or head[4:] in (b"IDAT", b"IEND"):
            return
        (length,) = struct.unpack(">I", head[:4])
        if length > _LONGEST:
            file.seek(length + 4, os.SEEK_CUR)
            continue
        data, checksum = file.read(length), file.read(4)
        if len(checksum) < 4 or zlib.crc32(head[4:] + data) != struct.unpack(">I", checksum)[0]:
            raise ValueError(f"{name} is damaged: a checksum before the pixels is wrong; take another copy")
        yield head[4:], data
