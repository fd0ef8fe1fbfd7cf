"""A folder of images and captions made into shards: the same folder gives the same bytes."""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO

from stable_cascade import bounds
from stable_cascade.disk import local_path, read_file
from stable_cascade.wording import brief

from .image_folder import MASK, Image, images_in
from .images import IMAGE_EXTENSIONS, decode_mask, decode_stored

_TRIED_AT = (1024, 1024)
"""The (height, width) at which an image is tried; a large JPEG is shrunk while it is decoded, as in a training."""
_SHARD = re.compile(r"\d{5,}\.tar")


@dataclass(frozen=True)
class PrepareReport:
    """What was written, and what was left out."""

    shards: tuple[str, ...]
    samples: int
    broken: tuple[str, ...]
    uncaptioned: int
    masks: int = 0
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        lines = [f"wrote {self.samples:,} samples in {len(self.shards):,} shards"]
        if self.masks:
            lines.append(f"{self.masks:,} of them have a mask")
        if self.uncaptioned:
            lines.append(f"{self.uncaptioned:,} of them have no caption and got ''")
        if self.broken:
            lines.append(f"left out {len(self.broken):,} broken images:")
            lines += [f"  {reason}" for reason in self.broken]
        lines += self.notes
        return "\n".join(lines)


def prepare_shards(
    folder: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    shard_size: int = 1000,
    max_broken_share: float = 0.1,
    allow_missing_captions: bool = False,
    overwrite: bool = False,
) -> PrepareReport:
    """Shards `out/00000.tar`, … of the images under `folder`, for `webdataset_path: out`.

    A caption is the .txt file of the same name, else the row of metadata.jsonl, metadata.csv or captions.csv with
    this file_name (columns text or caption), else a key text or caption of the .json file of the same name. The JSON
    and the row's other columns become the sample's JSON, which filters see. `NAME.mask.png` (or another kind of
    image) is the mask of `NAME.jpg`.

    Args:
        folder: searched with its subfolders.
        out: created when missing; complete shards appear in it at the end, all or none.
        shard_size: samples in one shard.
        max_broken_share: how large a share of images may be undecodable; those are left out and reported.
        allow_missing_captions: write '' for an image without a caption instead of stopping.
        overwrite: replace the shards that are in `out`.

    Raises:
        ValueError: there is nothing to write, captions are missing, too much is broken, or `out` has shards already.
    """
    # Check both places.
    root, target = local_path(folder), local_path(out)
    if shard_size < 1:
        raise ValueError(f"shard_size {shard_size} must be at least 1")
    if not root.is_dir():
        raise ValueError(f"{str(root)!r} is no folder")
    if target.exists() and not target.is_dir():
        raise ValueError(f"{str(target)!r} is no folder; give the folder that the shards go to")
    if not overwrite and any(target.glob("*.tar")):
        raise ValueError(f"{str(target)!r} holds shards already; give another folder, or --overwrite")
    # Find the images, and write them.
    images, notes = images_in(root, target)
    missing = [image for image in images if image.caption is None]
    if missing and not allow_missing_captions:
        raise ValueError(
            f"{len(missing):,} of {len(images):,} images have no caption, for example {missing[0].path}; add a "
            ".txt of the same name or a row in metadata.csv, or give --allow-missing-captions"
        )
    return replace(_write(images, target, shard_size, max_broken_share), notes=notes)


def _suffix_of(data: bytes) -> str:
    """A suffix for an image that is called otherwise."""
    return {b"\xff\xd8\xff": ".jpg", b"\x89PN": ".png", b"GIF": ".gif"}.get(data[:3], ".webp")


def _write(images: Sequence[Image], target: Path, shard_size: int, max_broken_share: float) -> PrepareReport:
    """Writes to hidden files first; they get their names when all are complete."""
    target.mkdir(parents=True, exist_ok=True)
    writer = _ShardWriter(target, shard_size)
    broken: list[str] = []
    uncaptioned = masks = 0
    try:
        # Every image that can be decoded goes into a shard.
        for image in images:
            try:
                data, mask = _checked(image)
            except ValueError as error:
                broken.append(f"{brief(image.path)}: {error}")
                continue
            writer.add(image, data, mask)
            uncaptioned += image.caption is None
            masks += mask is not None
        # Too many broken ones: no shard appears.
        if broken and (len(broken) > max_broken_share * len(images) or len(broken) == len(images)):
            raise ValueError(
                f"{len(broken):,} of {len(images):,} images are broken, more than max_broken_share "
                f"{max_broken_share}, for example {'; '.join(broken[:3])}; repair or remove them"
            )
        shards = writer.publish()
    finally:
        writer.discard()
    return PrepareReport(shards, len(images) - len(broken), tuple(broken), uncaptioned, masks)


def _checked(image: Image) -> tuple[bytes, bytes | None]:
    """The bytes of an image and its mask, decoded once as a training decodes them.

    Raises:
        ValueError: something of the sample cannot be read.
    """
    if image.fault:
        raise ValueError(image.fault)
    data = read_file(image.path, at_most=bounds.IMAGE_FILE, what="image")
    decode_stored(data, at_least=_TRIED_AT)
    if image.mask is None:
        return data, None
    mask = read_file(image.mask, at_most=bounds.IMAGE_FILE, what="mask")
    decode_mask(mask)
    return data, mask


class _ShardWriter:
    """Tars of `shard_size` samples, written by webdataset; nothing in them depends on time, user or machine."""

    def __init__(self, target: Path, shard_size: int):
        self.target, self.shard_size = target, shard_size
        self.parts: list[Path] = []
        self.file: BinaryIO | None = None
        self.writer: Any = None

    def add(self, image: Image, data: bytes, mask: bytes | None) -> None:
        # The members of a sample by their endings.
        suffix = image.path.suffix.lower()
        known = suffix.lstrip(".") in IMAGE_EXTENSIONS
        members = {suffix if known else _suffix_of(data): data, ".txt": (image.caption or "").encode()}
        if image.mask is not None and mask is not None:
            members[f"{MASK}{image.mask.suffix.lower()}"] = mask
        if image.extra:
            content = json.dumps(image.extra, sort_keys=True, ensure_ascii=False)
            members[".json"] = content.encode("utf-8", errors="replace")
        if self.writer is None:
            from webdataset import ShardWriter

            self.writer = ShardWriter(
                "%05d.tar", maxcount=self.shard_size, maxsize=math.inf, verbose=0, opener=self._open, encoder=False,
                user="", group="", mode=0o644, mtime=0,
            )  # fmt: skip
        self.writer.write({"__key__": image.key, **{ending.lstrip("."): part for ending, part in members.items()}})

    def _open(self, name: str) -> BinaryIO:
        self._close_file()
        self.parts.append(self.target / f".{name}.part{os.getpid()}")
        self.file = open(self.parts[-1], "wb")
        return self.file

    def _close_file(self) -> None:
        if self.file is not None:
            self.file.close()
            self.file = None

    def _close(self) -> None:
        if self.writer is not None:
            self.writer.close()
            self.writer = None
        self._close_file()

    def publish(self) -> tuple[str, ...]:
        """Gives the complete shards their names and removes older ones; tars with other names stay."""
        self._close()
        names = [self.target / f"{number:05}.tar" for number in range(len(self.parts))]
        for old in {path for path in self.target.glob("*.tar") if _SHARD.fullmatch(path.name)} - set(names):
            old.unlink()
        for part, name in zip(self.parts, names, strict=True):
            os.replace(part, name)
        return tuple(str(name) for name in names)

    def discard(self) -> None:
        """Removes what was not published."""
        self._close()
        for part in self.parts:
            part.unlink(missing_ok=True)
