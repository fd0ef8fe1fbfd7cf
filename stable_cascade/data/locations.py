"""Where shards are: from `webdataset_path` to a list of tars, and bytes out of them at any place."""

from __future__ import annotations

import glob
import io
import logging
import math
import os
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from typing import Any, BinaryIO, TypeVar

import numpy as np

from stable_cascade.wording import quoted

from .draws import uniforms

_OPEN_FILES = 128
_READ_AHEAD = 1 << 20
_PACKED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")

ASIDE_SECONDS = 60.0
"""How long a remote shard that keeps failing is left alone."""


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
    found: dict[str, None] = {}  # in order, and quick to ask for a hundred thousand names
    for entry in entries:
        if not isinstance(entry, (str, os.PathLike)):
            raise ValueError(f"webdataset_path entry {quoted(entry)} is no place; a trainer's config may hold sets")
        for place in _braces(os.fspath(entry)):
            found.update(dict.fromkeys(_expand(place)))
    return list(found)


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
        return _tars_of_folder(place)
    if any(letter in place for letter in "*?["):
        return _tars_or_error(place, sorted(path for path in glob.glob(place, recursive=True)), "pattern")
    raise ValueError(f"webdataset_path {place!r} does not exist{_neighbours(place)}")


def _tars_of_folder(place: str) -> list[str]:
    """The tars in a folder, whatever the case of their names.

    Raises:
        ValueError: there are none, or some are compressed and not unpacked beside it.
    """
    # Compressed tars allow no random access.
    names = sorted(os.listdir(place))
    tars = [name for name in names if name.lower().endswith(".tar")]
    packed = [name for name in names if name.lower().endswith(_PACKED)]
    left = [name for name in packed if f"{name[: name.lower().rindex('.t')]}.tar" not in tars]
    if left:
        raise ValueError(
            f"webdataset_path {place!r} holds {len(left):,} compressed tars, for example {left[0]!r}; unpack them to "
            "plain .tar files, or take them out of the folder"
        )
    # What is not read is said.
    hidden = [name for name in tars if name.startswith(".")]
    if hidden:
        log.warning("%s: hidden tars are not read, for example %s", place, quoted(hidden[0]))
    deeper = sorted(glob.glob(os.path.join(glob.escape(place), "*", "*.tar")))
    if deeper and len(tars) > len(hidden):
        log.warning(
            "%s: tars in its subfolders are not read, for example %s; the pattern '**/*.tar' names them all",
            place, quoted(os.path.relpath(deeper[0], place)),
        )  # fmt: skip
    return _tars_or_error(place, [os.path.join(place, name) for name in tars if name not in hidden], "folder")


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

    def names_below() -> list[str]:
        files.invalidate_cache()
        return files.glob(path) if pattern else [name for name in files.find(path) if name.lower().endswith(".tar")]

    try:
        names = with_retries(f"webdataset_path {place!r}", names_below)
    except Exception as error:
        raise ValueError(f"webdataset_path {place!r} cannot be listed: {short(error)}") from None
    return _tars_or_error(place, [files.unstrip_protocol(name) for name in sorted(names)], "prefix")


def filesystem(location: str) -> tuple[Any, str]:
    """The fsspec file system of a URL, and the path within it.

    Raises:
        ValueError: the scheme is unknown or needs a package that is not installed.
    """
    import fsspec

    scheme = location.split("://", 1)[0]
    try:
        files, path = fsspec.core.url_to_fs(location, **_options(scheme))
    except ImportError as error:
        remedy = "pip install 'stable-cascade[s3]'" if scheme in ("s3", "s3a") else short(error)
        raise ValueError(f"{location!r}: the package that reads {scheme}:// is not installed ({remedy})") from None
    except ValueError as error:
        raise ValueError(f"{location!r}: {short(error)}; use a path, http(s):// or s3://") from None
    if scheme in ("s3", "s3a"):
        files.retries = 1  # s3fs would otherwise repeat each attempt of ours five times
    return files, path


def _options(scheme: str) -> dict[str, Any]:
    """Time limits, and attempts of one: what fails is tried again by `with_retries` alone."""
    if scheme in ("s3", "s3a"):
        return {"config_kwargs": {"retries": {"max_attempts": 0}, "connect_timeout": 10, "read_timeout": 30}}
    if scheme in ("http", "https"):
        import aiohttp

        return {"client_kwargs": {"timeout": aiohttp.ClientTimeout(total=None, sock_connect=10, sock_read=30)}}
    return {}


def open_shard(location: str) -> BinaryIO:
    """The shard as a seekable file, for one pass from its beginning.

    Raises:
        ValueError: it cannot be opened.
    """
    if is_remote(location):
        return io.BufferedReader(_RemoteFile(location, shard_stamp(location)[0]), _READ_AHEAD)  # type: ignore[arg-type]
    try:
        return open(location, "rb", buffering=1 << 16)
    except OSError as error:
        raise ValueError(f"shard {location!r} cannot be opened: {short(error)}") from None


def shard_stamp(location: str) -> tuple[int, str]:
    """Size and version (time of change or ETag) of a shard: when both are the same, so are its bytes.

    Raises:
        ShardFailure: a remote one cannot be asked, after all attempts.
        ValueError: it does not exist, or may not be read.
    """
    # Local: size and time of change.
    if not is_remote(location):
        try:
            status = os.stat(location)
        except OSError as error:
            raise ValueError(f"shard {location!r} cannot be opened: {short(error)}") from None
        return status.st_size, str(status.st_mtime_ns)
    # Remote: size and ETag, asked for anew.
    files, path = filesystem(location)

    def ask() -> dict[str, Any]:
        files.invalidate_cache()
        return files.info(path)

    try:
        info = with_retries(f"shard {location!r}", ask)
    except Exception as error:
        kind = ShardFailure if may_pass(error) else ValueError
        raise kind(f"shard {location!r} cannot be opened: {short(error)}") from None
    version = info.get("ETag") or info.get("etag") or info.get("LastModified") or info.get("mtime") or ""
    if info.get("size") is None:
        raise ValueError(f"shard {location!r}: the server does not tell its size, which random access needs")
    return int(info["size"]), str(version)


class _RemoteFile(io.RawIOBase):
    """A remote shard, read in ranges, each of which is tried again on its own."""

    def __init__(self, location: str, size: int):
        super().__init__()
        self.location, self.size, self.place = location, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.place

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self.place = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self.place, os.SEEK_END: self.size}[whence]
        return self.place

    def readinto(self, buffer: Any) -> int:
        count = max(0, min(len(buffer), self.size - self.place))
        if count:
            try:
                (data,) = _remote_spans(self.location, [(self.place, count)])
            except OSError as error:
                raise ShardFailure(str(error)) from None
            buffer[:count] = data
            self.place += count
        return count


class ForwardFile:
    """A remote shard from some place on, each byte fetched once; what lies behind `forget` is gone.

    Ranges grow from 256 KB to 4 MB, so that the first sample is here soon and the last ones take few requests.
    """

    def __init__(self, location: str):
        self.location, self.size = location, shard_stamp(location)[0]
        self.place = self.base = 0
        self.window, self.ahead = bytearray(), 1 << 18

    def __enter__(self) -> ForwardFile:
        return self

    def __exit__(self, *_: Any) -> None:
        self.window = bytearray()

    def seek(self, offset: int) -> int:
        """Go to a place; one before the window is fetched again."""
        self.place = offset
        return offset

    def read(self, count: int) -> bytes:
        """The next bytes, fewer at the end.

        Raises:
            ShardFailure: they cannot be read after all attempts.
        """
        end = min(self.place + count, self.size)
        have = self.base + len(self.window)
        if not self.base <= self.place <= have + self.ahead:
            self.window, self.base, have = bytearray(), self.place, self.place
        if end > have:
            stop = min(self.size, max(end, have + self.ahead))
            try:
                self.window += _remote_spans(self.location, [(have, stop - have)])[0]
            except OSError as error:
                raise ShardFailure(str(error)) from None
            self.ahead = min(2 * self.ahead, 1 << 22)
        data = bytes(self.window[self.place - self.base : max(0, end - self.base)])
        self.place += len(data)
        return data

    def forget(self, before: int) -> None:
        """Let go of what lies before a place."""
        gone = min(before - self.base, len(self.window))
        if gone > 0:
            del self.window[:gone]
            self.base += gone


def _remote_spans(location: str, spans: Sequence[tuple[int, int]]) -> list[bytes]:
    """The bytes of each (offset, size) of a remote shard.

    Raises:
        OSError: they still cannot be read after all attempts, or the shard is gone.
    """
    files, path = filesystem(location)
    starts, ends = [start for start, _ in spans], [start + size for start, size in spans]

    def fetch() -> list[bytes]:
        parts = [bytes(part) for part in files.cat_ranges([path] * len(spans), starts, ends, on_error="raise")]
        if any(len(part) != size for part, (_, size) in zip(parts, spans, strict=True)):
            raise ConnectionError("the answer has another length than was asked for (cut off, or no range requests)")
        return parts

    try:
        return with_retries(f"shard {location!r}", fetch)
    except Exception as error:
        raise OSError(f"shard {location!r} cannot be read: {short(error)}") from None


class ByteReader:
    """Bytes at any place of any shard; local shards by pread, others by range requests.

    A remote shard that still fails after all attempts is set aside: reported once, and its samples fail at once for a
    minute, so that a training goes on with others instead of waiting at each of them. Then it is tried again.

    Handles are opened on first use in each process, so that a reader may be pickled or forked at any time.
    """

    def __init__(self) -> None:
        self._process = -1
        self._files: OrderedDict[str, int] = OrderedDict()
        self._aside: dict[str, float] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {"_process": -1, "_files": OrderedDict(), "_aside": {}}

    def read(self, location: str, spans: Sequence[tuple[int, int]]) -> list[bytes]:
        """The bytes of each (offset, size).

        Raises:
            OSError: the shard is gone, shorter than it was, or failing.
        """
        if is_remote(location):
            return self._remote(location, spans)
        handle = self._handle(location)
        parts = [os.pread(handle, size, offset) for offset, size in spans]
        if any(len(part) != size for part, (_, size) in zip(parts, spans, strict=True)):
            raise OSError(f"shard {location!r} ends early; it changed since it was indexed")
        return parts

    def _remote(self, location: str, spans: Sequence[tuple[int, int]]) -> list[bytes]:
        if time.monotonic() < self._aside.get(location, -math.inf):
            raise OSError(f"shard {location!r} is set aside, since it kept failing")
        try:
            parts = _remote_spans(location, spans)
        except OSError as error:
            log.error("%s; its samples are replaced by others, and it is tried again in %.0f s", error, ASIDE_SECONDS)
            self._aside[location] = time.monotonic() + ASIDE_SECONDS
            raise
        if self._aside.pop(location, None) is not None:
            log.warning("shard %r can be read again", location)
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


log = logging.getLogger(__name__)

T = TypeVar("T")

WAITS = (0.5, 1.0, 2.0, 4.0, 8.0)
"""Seconds before the second, third, … attempt."""

_PERMANENT = (FileNotFoundError, IsADirectoryError, PermissionError, NotImplementedError, ImportError)
_CREDENTIALS = ("NoCredentialsError", "PartialCredentialsError", "ParamValidationError", "InvalidURL")
_WORTH_ANOTHER = (408, 425, 429)


class ShardFailure(ValueError):
    """A shard that is damaged, or that still cannot be read after all attempts; others may be fine."""


def with_retries(what: str, action: Callable[[], T]) -> T:
    """The action's result; a failure that may pass is tried again after WAITS, each wait between 1 and 1.5 times it.

    Args:
        what: named in the log.

    Raises:
        Exception: the last error, or at once one that will not pass (missing, forbidden, no credentials).
    """
    for attempt, wait in enumerate((*WAITS, None)):
        try:
            return action()
        except Exception as error:  # every file system has its own errors
            if wait is None or not may_pass(error):
                raise
            # A counter-based number, so that the processes of a cluster do not all come back at the same moment.
            spread = 1 + 0.5 * float(uniforms(os.getpid(), what, np.array([attempt]))[0])
            log.warning("%s: %s; trying again in %.1f s", what, short(error), wait * spread)
            time.sleep(wait * spread)
    raise AssertionError("unreachable")


def cause_of(error: BaseException) -> BaseException:
    """What a file system's error stands for: fsspec tells any failed first request over HTTP as a missing file."""
    cause = error.__cause__
    return cause_of(cause) if isinstance(error, FileNotFoundError) and cause is not None else error


def may_pass(error: BaseException) -> bool:
    """Whether the same request may succeed later."""
    error = cause_of(error)
    if isinstance(error, _PERMANENT) or type(error).__name__ in _CREDENTIALS:
        return False
    status = getattr(error, "status", None)
    if isinstance(status, int) and 400 <= status < 500:
        return status in _WORTH_ANOTHER
    return True


def short(error: BaseException) -> str:
    """Kind and first line of an error, and what an HTTP status that refuses means."""
    error = cause_of(error)
    if (status := getattr(error, "status", None)) in (401, 403):
        return f"the server refuses it (HTTP {status}); check the address, its signature or the credentials"
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0]}" if text else type(error).__name__
