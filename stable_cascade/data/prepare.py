"""A folder of pictures and captions made into shards: the same folder gives the same bytes."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stable_cascade import bounds
from stable_cascade.disk import local_path, open_file, read_file, read_text
from stable_cascade.wording import brief, quoted

from .captions import check_caption, json_object, text_of
from .images import IMAGE_EXTENSIONS, decode_mask, decode_stored, looks_like_picture

METADATA_FILES = ("metadata.jsonl", "metadata.csv", "captions.csv")
CAPTION_KEYS = ("text", "caption")
"""Where a caption is looked for in JSON and metadata when there is no .txt file."""

_TRIED_AT = (1024, 1024)
"""The (height, width) at which a picture is tried; a large JPEG is shrunk while it is decoded, as in a training."""
_SHARD = re.compile(r"\d{5,}\.tar")
_NO_PICTURES = (".txt", ".json", ".jsonl", ".csv", ".tar", ".md", ".yaml", ".safetensors")
_MASK = ".mask"
_FILE_KEYS = ("file_name", "filename", "file")


@dataclass(frozen=True)
class PrepareReport:
    """What was written, and what was left out."""

    shards: tuple[str, ...]
    samples: int
    broken: tuple[str, ...]
    uncaptioned: int
    masks: int = 0

    def __str__(self) -> str:
        lines = [f"wrote {self.samples:,} samples in {len(self.shards):,} shards"]
        if self.masks:
            lines.append(f"{self.masks:,} of them have a mask")
        if self.uncaptioned:
            lines.append(f"{self.uncaptioned:,} of them have no caption and got ''")
        if self.broken:
            lines.append(f"left out {len(self.broken):,} broken pictures:")
            lines += [f"  {reason}" for reason in self.broken]
        return "\n".join(lines)


@dataclass(frozen=True)
class _Picture:
    """A picture file and the texts that belong to it."""

    key: str
    path: Path
    caption: str | None
    extra: Mapping[str, Any]
    mask: Path | None = None
    fault: str = ""


def prepare_shards(
    folder: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    shard_size: int = 1000,
    max_broken_share: float = 0.1,
    allow_missing_captions: bool = False,
    overwrite: bool = False,
) -> PrepareReport:
    """Shards `out/00000.tar`, … of the pictures under `folder`, for `webdataset_path: out`.

    A caption is the .txt file of the same name, else the row of metadata.jsonl, metadata.csv or captions.csv with
    this file_name (columns text or caption), else a key text or caption of the .json file of the same name. The JSON
    and the row's other columns become the sample's JSON, which filters see. `NAME.mask.png` (or another kind of
    picture) is the mask of `NAME.jpg`.

    Args:
        folder: searched with its subfolders.
        out: created when missing; complete shards appear in it at the end, all or none.
        shard_size: samples in one shard.
        max_broken_share: how large a share of pictures may be undecodable; those are left out and reported.
        allow_missing_captions: write '' for a picture without a caption instead of stopping.
        overwrite: replace the shards that are in `out`.

    Raises:
        ValueError: there is nothing to write, captions are missing, too much is broken, or `out` has shards already.
    """
    root, target = local_path(folder), local_path(out)
    if shard_size < 1:
        raise ValueError(f"shard_size {shard_size} must be at least 1")
    if not root.is_dir():
        raise ValueError(f"{str(root)!r} is no folder")
    if target.exists() and not target.is_dir():
        raise ValueError(f"{str(target)!r} is no folder; give the folder that the shards go to")
    if not overwrite and any(target.glob("*.tar")):
        raise ValueError(f"{str(target)!r} holds shards already; give another folder, or --overwrite")
    pictures = _find(root, target)
    missing = [picture for picture in pictures if picture.caption is None]
    if missing and not allow_missing_captions:
        raise ValueError(
            f"{len(missing):,} of {len(pictures):,} pictures have no caption, for example {missing[0].path}; add a "
            ".txt of the same name or a row in metadata.csv, or give --allow-missing-captions"
        )
    return _write(pictures, target, shard_size, max_broken_share)


def _find(root: Path, target: Path) -> list[_Picture]:
    """Every picture under `root`, in the order of its path, with a key of its own."""
    rows = _metadata(root)
    pictures: list[_Picture] = []
    keys: set[str] = set()
    files = list(_files(root, target))
    beside = {(path.parent, path.name.lower()): path for path in files}
    found = [path for path in files if _is_picture(path, beside, path.relative_to(root).as_posix() in rows)]
    masks = {path.with_suffix(""): path for path in found if path.stem.lower().endswith(_MASK)}
    used: set[Path] = set()
    for path in found:
        if path.with_suffix("") in masks:
            continue
        mask = masks.get(path.with_name(path.stem + _MASK))
        if mask is not None:
            used.add(mask)
        relative = path.relative_to(root).as_posix()
        key = _key(relative, keys)
        keys.add(key)
        try:
            pictures.append(_Picture(key, path, *_texts(path, beside, rows.pop(relative, {})), mask))
        except ValueError as error:
            pictures.append(_Picture(key, path, "", {}, mask, str(error)))
    alone = [path for path in masks.values() if path not in used]
    if alone:
        raise ValueError(
            f"{len(alone):,} masks have no picture beside them, for example {alone[0]}; the mask of cat.jpg is "
            "cat.mask.png"
        )
    if not pictures:
        raise ValueError(f"{str(root)!r} holds no pictures (.{', .'.join(IMAGE_EXTENSIONS[:4])}, …)")
    if rows:
        raise ValueError(
            f"the metadata in {str(root)!r} names {len(rows):,} pictures that do not exist, for example "
            f"{next(iter(rows))!r}; file_name is relative to the metadata file"
        )
    return pictures


def _files(root: Path, target: Path) -> Iterator[Path]:
    """All files below, those in linked folders too, each folder once; hidden ones and those of `target` are left."""
    seen = {root.resolve()}
    for folder, subfolders, names in os.walk(root, followlinks=True):
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        for name in list(subfolders):
            place = Path(folder, name).resolve()
            if place == target.resolve() or place in seen:
                subfolders.remove(name)
            seen.add(place)
        yield from (Path(folder, name) for name in sorted(names) if not name.startswith("."))


def _is_picture(path: Path, beside: Mapping[tuple[Path, str], Path], named: bool) -> bool:
    """Whether a file is a picture by its name or its bytes, or meant to be one: a caption lies beside it or names it.

    What is meant to be one and cannot be read is told later, with the reason.
    """
    if path.suffix.lower().lstrip(".") in IMAGE_EXTENSIONS:
        return True
    if path.suffix.lower() in _NO_PICTURES or path.name.lower() in METADATA_FILES:
        return False
    if named or (path.parent, f"{path.stem.lower()}.txt") in beside:
        return True
    if not path.is_file():
        return False
    with open_file(path, at_most=bounds.MEMBER_END) as file:
        return looks_like_picture(file.read(32))


def _suffix_of(data: bytes) -> str:
    """A suffix for a picture that is called otherwise."""
    return {b"\xff\xd8\xff": ".jpg", b"\x89PN": ".png", b"GIF": ".gif"}.get(data[:3], ".webp")


def _key(relative: str, taken: set[str]) -> str:
    """The path without its extension; dots would end a key early, and two pictures may share a name."""
    stem = relative.rsplit(".", 1)[0].replace(".", "_")
    key, number = stem, 2
    while key in taken:
        key, number = f"{stem}-{number}", number + 1
    return key


def _texts(
    path: Path, beside: Mapping[tuple[Path, str], Path], row: Mapping[str, Any]
) -> tuple[str | None, dict[str, Any]]:
    """(caption or None, the JSON's and the row's other values).

    Raises:
        ValueError: a text or JSON beside the picture cannot be read.
    """
    text, description = (beside.get((path.parent, f"{path.stem.lower()}{kind}")) for kind in (".txt", ".json"))
    extra: dict[str, Any] = {}
    if description is not None:
        extra = json_object(read_file(description, at_most=bounds.JSON_FILE, what="JSON"))
    values = {**extra, **{key: value for key, value in row.items() if key not in _FILE_KEYS}}
    if text is not None:
        return text_of(read_file(text, at_most=bounds.IMAGE_FILE, what="caption")), values
    for source in (row, extra):
        for key in CAPTION_KEYS:
            if isinstance(source.get(key), str):
                check_caption(source[key])
                return source[key].strip(), {name: value for name, value in values.items() if name != key}
    return None, values


def _metadata(root: Path) -> dict[str, dict[str, Any]]:
    """The rows of all metadata files under `root`, by the picture's path relative to `root`."""
    rows: dict[str, dict[str, Any]] = {}
    for name in METADATA_FILES:
        for path in sorted(root.rglob(name)):
            for number, row in enumerate(_rows(path), 1):
                file = next((row[key] for key in _FILE_KEYS if row.get(key)), None)
                if not isinstance(file, str):
                    raise ValueError(f"{str(path)!r} row {number} has no file_name ({', '.join(map(str, row))})")
                place = os.path.normpath(os.path.join(path.parent.relative_to(root).as_posix(), file))
                rows.setdefault(place.replace(os.sep, "/"), {}).update(row)
    return rows


def _rows(path: Path) -> Iterator[dict[str, Any]]:
    """The rows of a metadata file.

    Raises:
        ValueError: it cannot be read; the message names it and the line.
    """
    text = read_text(path, at_most=bounds.METADATA_FILE, what="metadata")
    if path.suffix == ".csv":
        try:
            for row in csv.DictReader(io.StringIO(text, newline="")):
                yield {key: _number(value) if key not in CAPTION_KEYS else value for key, value in row.items() if key}
        except csv.Error as error:
            raise ValueError(f"{quoted(path)} is no CSV that can be read: {error}") from None
        return
    for number, line in enumerate(text.splitlines(), 1):
        if line.strip():
            try:
                yield json_object(line.encode("utf-8", "surrogatepass"))
            except ValueError as error:
                raise ValueError(f"{quoted(path)} line {number} is no JSON object: {error}") from None


def _number(text: Any) -> Any:
    """The number that a CSV field holds, so that filters can compare it; the field itself otherwise."""
    for kind in (int, float):
        try:
            return kind(text)
        except (TypeError, ValueError):
            continue
    return text


def _write(pictures: Sequence[_Picture], target: Path, shard_size: int, max_broken_share: float) -> PrepareReport:
    """Writes to hidden files first; they get their names when all are complete."""
    target.mkdir(parents=True, exist_ok=True)
    writer = _ShardWriter(target, shard_size)
    broken: list[str] = []
    uncaptioned = masks = 0
    try:
        for picture in pictures:
            try:
                data, mask = _checked(picture)
            except ValueError as error:
                broken.append(f"{brief(picture.path)}: {error}")
                continue
            writer.add(picture, data, mask)
            uncaptioned += picture.caption is None
            masks += mask is not None
        if broken and (len(broken) > max_broken_share * len(pictures) or len(broken) == len(pictures)):
            raise ValueError(
                f"{len(broken):,} of {len(pictures):,} pictures are broken, more than max_broken_share "
                f"{max_broken_share}, for example {'; '.join(broken[:3])}; repair or remove them"
            )
        shards = writer.publish()
    finally:
        writer.discard()
    return PrepareReport(shards, len(pictures) - len(broken), tuple(broken), uncaptioned, masks)


def _checked(picture: _Picture) -> tuple[bytes, bytes | None]:
    """The bytes of a picture and its mask, decoded once as a training decodes them.

    Raises:
        ValueError: something of the sample cannot be read.
    """
    if picture.fault:
        raise ValueError(picture.fault)
    data = read_file(picture.path, at_most=bounds.IMAGE_FILE, what="picture")
    decode_stored(data, at_least=_TRIED_AT)
    if picture.mask is None:
        return data, None
    mask = read_file(picture.mask, at_most=bounds.IMAGE_FILE, what="mask")
    decode_mask(mask)
    return data, mask


class _ShardWriter:
    """Tars of `shard_size` samples; nothing in them depends on time, user or machine."""

    def __init__(self, target: Path, shard_size: int):
        self.target, self.shard_size = target, shard_size
        self.parts: list[Path] = []
        self.tar: tarfile.TarFile | None = None
        self.count = 0

    def add(self, picture: _Picture, data: bytes, mask: bytes | None) -> None:
        if self.tar is None or self.count == self.shard_size:
            self._next()
        self.count += 1
        suffix = picture.path.suffix.lower()
        known = suffix.lstrip(".") in IMAGE_EXTENSIONS
        self._member(f"{picture.key}{suffix if known else _suffix_of(data)}", data)
        if picture.mask is not None and mask is not None:
            self._member(f"{picture.key}{_MASK}{picture.mask.suffix.lower()}", mask)
        self._member(f"{picture.key}.txt", (picture.caption or "").encode())
        if picture.extra:
            content = json.dumps(picture.extra, sort_keys=True, ensure_ascii=False)
            self._member(f"{picture.key}.json", content.encode("utf-8", errors="replace"))

    def _next(self) -> None:
        self._close()
        path = self.target / f".{len(self.parts):05}.tar.part{os.getpid()}"
        self.parts.append(path)
        self.tar, self.count = tarfile.open(path, "w", format=tarfile.GNU_FORMAT), 0

    def _member(self, name: str, data: bytes) -> None:
        assert self.tar is not None
        info = tarfile.TarInfo(name)
        info.size = len(data)
        self.tar.addfile(info, io.BytesIO(data))

    def _close(self) -> None:
        if self.tar is not None:
            self.tar.close()
            self.tar = None

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
