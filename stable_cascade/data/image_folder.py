"""A folder of images and captions: which file is an image, and which texts belong to it."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from stable_cascade import bounds
from stable_cascade.disk import open_file, read_file, read_text
from stable_cascade.wording import brief, quoted

from .captions import check_caption, json_object, text_of
from .images import IMAGE_EXTENSIONS, looks_like_image

METADATA_FILES = ("metadata.jsonl", "metadata.csv", "captions.csv")
CAPTION_KEYS = ("text", "caption")
"""Where a caption is looked for in JSON and metadata when there is no .txt file."""
MASK = ".mask"
"""What the name of a mask ends with, before its extension."""

_NO_IMAGES = (".txt", ".json", ".jsonl", ".csv", ".tar", ".md", ".yaml", ".safetensors")
_FILE_KEYS = ("file_name", "filename", "file")


@dataclass(frozen=True)
class Image:
    """An image file and the texts that belong to it."""

    key: str
    path: Path
    caption: str | None
    extra: Mapping[str, Any]
    mask: Path | None = None
    fault: str = ""


def images_in(root: Path, target: Path) -> tuple[list[Image], tuple[str, ...]]:
    """Every image under `root`, in the order of its path, with a key of its own; lines about what is left out."""
    # Find images, masks and texts.
    hidden: list[Path] = []
    files = list(_files(root, target, hidden))
    rows = _metadata(root, files)
    images: list[Image] = []
    keys: set[str] = set()
    texts = _Texts(files)
    found = [path for path in files if _is_image(path, texts, path.relative_to(root).as_posix() in rows)]
    texts.images = {path.with_suffix("") for path in found}
    masks = {path.with_suffix(""): path for path in found if path.stem.lower().endswith(MASK)}
    # Give every image its key, its texts and its mask.
    used: set[Path] = set()
    for path in found:
        if path.with_suffix("") in masks:
            continue
        mask = masks.get(path.with_name(path.stem + MASK))
        if mask is not None:
            used.add(mask)
        relative = path.relative_to(root).as_posix()
        key = _key(relative, keys)
        keys.add(key)
        try:
            images.append(Image(key, path, *_texts(path, texts, rows.pop(relative, {})), mask))
        except ValueError as error:
            images.append(Image(key, path, "", {}, mask, str(error)))
    # What was meant to belong to an image, and to which none belongs.
    alone = [path for path in masks.values() if path not in used]
    if alone:
        raise ValueError(
            f"{len(alone):,} masks have no image beside them, for example {alone[0]}; the mask of cat.jpg is "
            "cat.mask.png"
        )
    if not images:
        raise ValueError(f"{str(root)!r} holds no images (.{', .'.join(IMAGE_EXTENSIONS[:4])}, …)")
    if rows:
        raise ValueError(
            f"the metadata in {str(root)!r} names {len(rows):,} images that do not exist, for example "
            f"{next(iter(rows))!r}; file_name is relative to the metadata file"
        )
    return images, _notes(root, [path for path in files if path not in texts.used], hidden)


def _notes(root: Path, unused: Sequence[Path], hidden: Sequence[Path]) -> tuple[str, ...]:
    """What is left out beside the images, one line for each kind."""
    kinds = {
        "texts have no image beside them": [path for path in unused if path.suffix.lower() in (".txt", ".json")],
        "files and folders are hidden, their names begin with a dot": hidden,
    }
    return tuple(
        f"left out: {len(paths):,} {what}, for example {brief(paths[0].relative_to(root))}"
        for what, paths in kinds.items()
        if paths
    )


class _Texts:
    """The files that lie beside images, found by the image's name, in whatever case their own are written."""

    def __init__(self, files: Sequence[Path]):
        self.images: set[Path] = set()
        """Paths without their suffix."""
        self.used: set[Path] = set()
        self.named: dict[tuple[Path, str], list[Path]] = {}
        for path in files:
            self.named.setdefault((path.parent, path.name.lower()), []).append(path)

    def beside(self, image: Path, suffix: str) -> Path | None:
        """The file of this suffix: of the very same name, else one that no other image has the name of."""
        stem = image.with_suffix("")
        found = self.named.get((image.parent, f"{image.stem.lower()}{suffix}"), [])
        free = [path for path in found if path.with_suffix("") == stem]
        free += [path for path in found if path.with_suffix("") not in self.images]
        self.used.update(free[:1])
        return free[0] if free else None


def _files(root: Path, target: Path, hidden: list[Path]) -> Iterator[Path]:
    """All files below, those in linked folders too, each folder once; hidden ones are collected, `target` is left."""
    seen = {root.resolve()}
    for folder, subfolders, names in os.walk(root, followlinks=True):
        hidden += [Path(folder, name) for name in sorted([*subfolders, *names]) if _is_hidden(name)]
        subfolders[:] = sorted(name for name in subfolders if not name.startswith("."))
        for name in list(subfolders):
            place = Path(folder, name).resolve()
            if place == target.resolve() or place in seen:
                subfolders.remove(name)
            seen.add(place)
        yield from (Path(folder, name) for name in sorted(names) if not name.startswith("."))


def _is_hidden(name: str) -> bool:
    """A hidden name that someone may have given, other than those of systems and tools."""
    return name.startswith(".") and not name.startswith("._") and name not in (".DS_Store", ".git", ".gitattributes")


def _is_image(path: Path, texts: _Texts, named: bool) -> bool:
    """Whether a file is an image by its name or its bytes, or meant to be one: a caption lies beside it or names it.

    What is meant to be one and cannot be read is reported later, with the reason.
    """
    if path.suffix.lower().lstrip(".") in IMAGE_EXTENSIONS:
        return True
    if path.suffix.lower() in _NO_IMAGES or path.name.lower() in METADATA_FILES:
        return False
    if named or (path.parent, f"{path.stem.lower()}.txt") in texts.named:
        return True
    if not path.is_file():
        return False
    with open_file(path, at_most=bounds.MEMBER_END) as file:
        return looks_like_image(file.read(32))


def _key(relative: str, taken: set[str]) -> str:
    """The path without its extension; dots would end a key early, and two images may share a name."""
    stem = relative.rsplit(".", 1)[0].replace(".", "_")
    key, number = stem, 2
    while key in taken:
        key, number = f"{stem}-{number}", number + 1
    return key


def _texts(path: Path, texts: _Texts, row: Mapping[str, Any]) -> tuple[str | None, dict[str, Any]]:
    """(caption or None, the JSON's and the row's other values).

    Raises:
        ValueError: a text or JSON beside the image cannot be read.
    """
    text, description = texts.beside(path, ".txt"), texts.beside(path, ".json")
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


def _metadata(root: Path, files: Sequence[Path]) -> dict[str, dict[str, Any]]:
    """The rows of all metadata files, by the image's path relative to `root`.

    Raises:
        ValueError: a file cannot be read, a row names no image, or two give one image different captions.
    """
    rows: dict[str, dict[str, Any]] = {}
    for name in METADATA_FILES:
        for path in sorted(path for path in files if path.name.lower() == name):
            for number, row in enumerate(_rows(path), 1):
                # The image that a row is about, relative to the metadata file.
                file = next((row[key] for key in _FILE_KEYS if row.get(key)), None)
                if not isinstance(file, str):
                    raise ValueError(f"{str(path)!r} row {number} has no file_name ({', '.join(map(str, row))})")
                place = os.path.normpath(os.path.join(path.parent.relative_to(root).as_posix(), file))
                # Rows about the same image add up; a second caption is an error.
                known = rows.setdefault(place.replace(os.sep, "/"), {})
                other = [key for key in CAPTION_KEYS if key in known and row.get(key, known[key]) != known[key]]
                if other:
                    raise ValueError(
                        f"{str(path)!r} row {number} gives {file!r} another {other[0]} than a row before; keep one "
                        "row for each image"
                    )
                known.update(row)
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
