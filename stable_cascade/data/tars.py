"""What is in a tar, by its headers alone; five times as fast as `tarfile`, and strict about damage."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from typing import BinaryIO

from stable_cascade import bounds

from .locations import ShardFailure

Span = tuple[int, int]

_BLOCK = 512
_COMPRESSED = ((b"\x1f\x8b", "gzip"), (b"BZh", "bzip2"), (b"\xfd7zXZ", "xz"), (b"\x28\xb5\x2f\xfd", "zstd"))
_ADLER = 65521


def tar_members(
    file: BinaryIO, location: str, others: list[tuple[str, str]] | None = None, start: int = 0
) -> Iterator[tuple[str, Span]]:
    """Name and (offset, size) of every regular file, in their order; names in POSIX (pax), GNU or old headers.

    Args:
        others: gets the name and the kind of every link, device, pipe and sparse file.
        start: the byte at which a member's headers begin, as `end_of` tells it; members before are passed over.

    Raises:
        ShardFailure: the tar is truncated, or a header is damaged.
        ValueError: it is no tar, or compressed.
    """
    place = start
    name, size = None, None  # from an extended header before the member's own
    while True:
        file.seek(place)
        header = file.read(_BLOCK)
        if not place:
            _check_start(header, location)
        if len(header) < _BLOCK:
            raise _truncated(location)
        if not header.strip(b"\0"):
            return
        if not _intact(header):
            if not place:
                raise ValueError(f"shard {location!r} is not a tar: its first header is invalid")
            raise _damaged(location, f"the header at byte {place} is invalid")
        kind, length = header[156:157], _size(header[124:136], location, place)
        data = place + _BLOCK
        _check_end(data + length, length, location, place)
        if kind in b"xL":
            if length > bounds.TAR_HEADER:
                raise _damaged(location, f"the extended header at byte {place} claims {length:,} bytes")
            file.seek(data)
            content = file.read(length)
            if len(content) < length:
                raise _truncated(location)
            if kind == b"L":
                name = _text(content)
            else:
                name, size = _pax(content, name, size)
        elif kind not in b"gK":  # global headers and link names say nothing about files
            length = length if size is None else size
            _check_end(data + length, length, location, place)
            if kind in b"0\x007":
                yield name or _own_name(header), (data, length)
            elif kind in OTHER_KINDS and others is not None:
                others.append((name or _own_name(header), OTHER_KINDS[kind]))
            name, size = None, None
        place = end_of((data, length))


def end_of(span: Span) -> int:
    """The byte at which the headers of the next member begin."""
    return span[0] + -(-span[1] // _BLOCK) * _BLOCK


OTHER_KINDS = {
    b"1": "a link",
    b"2": "a link",
    b"3": "a device",
    b"4": "a device",
    b"6": "a pipe",
    b"S": "a sparse file",
}
"""What members are that hold no bytes of their own, or not in their order."""


def _damaged(location: str, what: str) -> ShardFailure:
    return ShardFailure(f"shard {location!r} is damaged: {what}; copy or make it again")


def _check_end(end: int, length: int, location: str, place: int) -> None:
    if end > bounds.MEMBER_END:
        raise _damaged(location, f"the member at byte {place} claims {length:,} bytes")


def _size(field: bytes, location: str, place: int) -> int:
    """A member's size.

    Raises:
        ShardFailure: the field holds no number that a size can be.
    """
    try:
        return _number(field)
    except ValueError:
        raise _damaged(location, f"the header at byte {place} claims no possible size") from None


def _check_start(header: bytes, location: str) -> None:
    for magic, kind in _COMPRESSED:
        if header.startswith(magic):
            raise ValueError(f"shard {location!r} is compressed with {kind}; unpack it to a plain .tar first")
    if not header:
        raise ValueError(f"shard {location!r} is not a tar: empty file")


def _truncated(location: str) -> ShardFailure:
    return ShardFailure(f"shard {location!r} is truncated: it ends before the tar's end marker; copy or make it again")


def _intact(header: bytes) -> bool:
    """Whether the header's checksum is right: the sum of its bytes, its own field counted as spaces.

    Adler-32 has that sum in its lower half, modulo a prime, and is much faster than adding up in Python.
    """
    try:
        stored = _number(header[148:156])
    except ValueError:
        return False
    total = (zlib.adler32(header[:148]) & 0xFFFF) + (zlib.adler32(header[156:]) & 0xFFFF) - 2 + 8 * 32
    return (total - stored) % _ADLER == 0


def _number(field: bytes) -> int:
    """An octal number, or a binary one as GNU tar writes for files of 8 GB and more."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    digits = field.split(b"\0", 1)[0].strip() or b"0"
    if digits.strip(b"01234567"):  # int() would take a sign and underscores too
        raise ValueError("no octal number")
    return int(digits, 8)


def _text(field: bytes) -> str:
    return field.split(b"\0", 1)[0].decode("utf-8", errors="surrogateescape")


def _own_name(header: bytes) -> str:
    name = _text(header[:100])
    prefix = _text(header[345:500]) if header[257:263] == b"ustar\0" else ""
    return f"{prefix}/{name}" if prefix else name


def _pax(content: bytes, name: str | None, size: int | None) -> tuple[str | None, int | None]:
    """(path, size) with what the records `length key=value` of a pax header say."""
    place = 0
    while place < len(content):
        digits = content[place : place + 10].partition(b" ")[0]
        if not digits.isdigit() or len(digits) > 9 or not int(digits):
            break
        key, _, value = content[place + len(digits) + 1 : place + int(digits) - 1].partition(b"=")
        place += int(digits)
        if key == b"path":
            name = value.decode("utf-8", errors="surrogateescape")
        elif key == b"size" and value.isdigit():
            size = int(value) if len(value) < 20 else bounds.MEMBER_END
    return name, size
