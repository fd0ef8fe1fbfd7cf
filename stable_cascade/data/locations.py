"""Where shards are: from `webdataset_path` to a list of tars, and bytes out of them at any place."""

from __future__ import annotations

import glob
import os
from collections import OrderedDict
from collections.abc import Iterable, Sequence
from typing import Any, BinaryIO

_OPEN_FILES = 128


def shard_locations(webdataset_path: str | Iterable[str]) -> list[str]:
    """Every tar that the setting names, in its order (a folder's, prefix's or pattern's tars sorted by name).

    Each entry may be `/x.tar`, `file:/x.tar`, a folder, `x-{000..003}.tar`, a pattern with `*`, `http(s)://….tar` or
    `s3://bucket/prefix/`.

    Raises:
        ValueError: an entry names nothing.
    """
    entries = [webdataset_path] if isinstance(webdataset_path, (str, os.PathLike)) else list(webdataset_path)
    if not entries:
        raise ValueError("webdataset_path is empty; give a tar, a folder of tars or a list of them")
    found: list[str] = []
    for entry in entries:
        for place in _braces(os.fspath(entry)):
            found += [location for location in _expand(place) if location not in found]
    return found


def _braces(entry: str) -> list[str]:
    from braceexpand import braceexpand

    if os.path.exists(entry):  # a name that really has braces in it
        return [entry]
    try:
        return list(braceexpand(entry, escape=False))
    except ValueError:
        raise ValueError(
            f"webdataset_path {entry!r} has unbalanced braces; write for example x-{{000..003}}.tar"
        ) from None


def is_remote(location: str) -> bool:
    """Whether the location is a URL rather than a local path."""
    return "://" in location


def _expand(place: str) -> list[str]:
    if place.startswith("pipe:"):
        raise ValueError(f"webdataset_path {place!r}: commands are not run; give a path or an http(s):// or s3:// URL")
    if place.startswith("file:"):
        place = place.removeprefix("file://") if place.startswith("file://") else place.removeprefix("file:")
    if is_remote(place):
        return _expand_remote(place)
    place = os.path.expanduser(place)
    if os.path.isfile(place):
        return [place]
    if os.path.isdir(place):
        return _tars_or_error(place, sorted(glob.glob(os.path.join(glob.escape(place), "*.tar"))), "folder")
    if any(letter in place for letter in "*?["):
        return _tars_or_error(place, sorted(path for path in glob.glob(place, recursive=True)), "pattern")
    raise ValueError(f"webdataset_path {place!r} does not exist{_neighbours(place)}")


def _neighbours(place: str) -> str:
    import difflib

    folder = os.path.dirname(place) or "."
    if not os.path.isdir(folder):
        return f"; its folder {folder!r} does not exist either"
    names = sorted(name for name in os.listdir(folder) if name.endswith(".tar"))
    close = difflib.get_close_matches(os.path.basename(place), names, n=1, cutoff=0.0)
    return f"; nearest: {os.path.join(folder, close[0])!r}" if close else f"; {folder!r} holds no .tar"


def _tars_or_error(place: str, tars: list[str], kind: str) -> list[str]:
    if not tars:
        raise ValueError(
            f"webdataset_path {place!r}: the {kind} holds no .tar; "
            "`stable-cascade prepare FOLDER OUT` makes them from images and captions"
        )
    return tars


def _expand_remote(place: str) -> list[str]:
    scheme = place.split("://", 1)[0]
    pattern = "*" in place
    if not pattern and (place.endswith(".tar") or (scheme in ("http", "https") and not place.endswith("/"))):
        return [place]
    files, path = filesystem(place)
    try:
        if pattern:
            names = files.glob(path)
        else:
            names = [name for name in files.find(path) if name.endswith(".tar")]
    except Exception as error:
        raise ValueError(f"webdataset_path {place!r} cannot be listed: {_short(error)}") from None
    return _tars_or_error(place, [files.unstrip_protocol(name) for name in sorted(names)], "prefix")


def filesystem(location: str) -> tuple[Any, str]:
    """The fsspec file system of a URL, and the path within it.

    Raises:
        ValueError: the scheme is unknown or needs a package that is not installed.
    """
    import fsspec

    scheme = location.split("://", 1)[0]
    try:
        return fsspec.core.url_to_fs(location)
    except ImportError:
        extra = "stable-cascade[s3]" if scheme in ("s3", "s3a") else f"an fsspec package for {scheme}"
        raise ValueError(f"{location!r} needs {extra}: pip install '{extra}'") from None
    except ValueError as error:
        raise ValueError(f"{location!r}: {_short(error)}; use a path, http(s):// or s3://") from None


def _short(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0]}" if text else type(error).__name__


def open_shard(location: str) -> BinaryIO:
    """The shard as a seekable file, for one pass from its beginning.

    Raises:
        ValueError: it cannot be opened.
    """
    try:
        if not is_remote(location):
            return open(location, "rb", buffering=1 << 16)
        files, path = filesystem(location)
        return files.open(path, "rb", block_size=1 << 20, cache_type="readahead")
    except ValueError:
        raise
    except Exception as error:
        raise ValueError(f"shard {location!r} cannot be opened: {_short(error)}") from None


def shard_stamp(location: str) -> tuple[int, str]:
    """Size and version (time of change or ETag) of a shard: when both are the same, so are its bytes.

    Raises:
        ValueError: it does not exist or cannot be asked.
    """
    if not is_remote(location):
        try:
            status = os.stat(location)
        except OSError as error:
            raise ValueError(f"shard {location!r} cannot be opened: {_short(error)}") from None
        return status.st_size, str(status.st_mtime_ns)
    files, path = filesystem(location)
    try:
        info = files.info(path)
    except Exception as error:
        raise ValueError(f"shard {location!r} cannot be opened: {_short(error)}") from None
    version = info.get("ETag") or info.get("etag") or info.get("LastModified") or info.get("mtime") or ""
    return int(info.get("size") or 0), str(version)


class ByteReader:
    """Bytes at any place of any shard; local shards by pread, others by range requests.

    Handles are opened on first use in each process, so that a reader may be pickled or forked at any time.
    """

    def __init__(self) -> None:
        self._process = -1
        self._files: OrderedDict[str, int] = OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        return {"_process": -1, "_files": OrderedDict()}

    def read(self, location: str, spans: Sequence[tuple[int, int]]) -> list[bytes]:
        """The bytes of each (offset, size).

        Raises:
            OSError: the shard is gone or shorter than it was.
        """
        if is_remote(location):
            files, path = filesystem(location)
            starts, ends = [s for s, _ in spans], [s + n for s, n in spans]
            parts = [bytes(part) for part in files.cat_ranges([path] * len(spans), starts, ends, on_error="raise")]
        else:
            handle = self._handle(location)
            parts = [os.pread(handle, size, offset) for offset, size in spans]
        if any(len(part) != size for part, (_, size) in zip(parts, spans, strict=True)):
            raise OSError(f"shard {location!r} ends early; it changed since it was indexed")
        return parts

    def _handle(self, location: str) -> int:
        if self._process != os.getpid():
            self._process, self._files = os.getpid(), OrderedDict()
        handle = self._files.pop(location, None)
        if handle is None:
            handle = os.open(location, os.O_RDONLY)
        self._files[location] = handle
        if len(self._files) > _OPEN_FILES:
            os.close(self._files.popitem(last=False)[1])
        return handle
