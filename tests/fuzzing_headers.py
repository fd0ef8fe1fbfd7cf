"""Damaged safetensors files: each function takes a sound file's header and data and gives a damaged file's bytes."""

from __future__ import annotations

import json
import math
import random
import struct
from collections.abc import Callable
from typing import Any

Header = dict[str, Any]
ITEM = {"BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "I16": 2, "F16": 2, "BF16": 2, "I32": 4, "F32": 4,
        "I64": 8, "F64": 8}  # fmt: skip
NAMES = (
    "", " ", ".", "..", "....", "/", "../../etc/passwd", "weight", "a\nb", "a\r\nb", "\x1b[31mred", "nul\0byte",
    "\u202egnp",
    "\u0000", "日本語", "é" * 40, "x" * 1_000_000, "a." * 300_000, "\t", "%s%n{0}", "__metadata__.x", "None", "\ud800",
)  # fmt: skip
SHAPES = (
    [2**40], [2**62, 2**62], [2**32, 2**32], [2**63], [2**64], [10**30], [-1], [-4, -4], [0], [0, 2**40], [], [1] * 70,
    [1] * 100_000, [1.5], [1e3], ["4"], [None], [[4]], [True], "4", None, {}, 4,
)  # fmt: skip
OFFSETS = (
    [0, 0], [8, 0], [-8, 0], [0, 2**40], [0, 2**63], [2**63, 2**64 - 1], [10**30, 10**31], [0.0, 4.0], ["0", "4"],
    [0], [0, 4, 8],
    [], None, "0", [1, 5], [True, False], {"a": 1},
)  # fmt: skip
DTYPES = ("F99", "f32", "float32", "", None, 5, [], "F8_E4M3FNUZ", "C64", "F4", "F6_E2M3", "F" * 300_000, "BOOL",
          "I64", "F8_E5M2",
          "F64\n", "U64")  # fmt: skip
JSON_TEXTS = (
    "", "{", "null", "[]", "3", '"text"', "{}", '{"a": ' * 100_000, "[" * 1_000_000, '{"prior.r": 1e999}',
    '{"prior.r": NaN}',
    '{"r": {"r": {"r": []}}}', '{"prior.lora_alpha": "many"}', '{"prior.lora_alpha": {}}',
    '{"prior.lora_alpha": null}',
    '{"prior.alpha_pattern": [1, 2]}', '{"prior.alpha_pattern": {"(": 1}}', '{"prior.alpha_pattern": {"(a+)+$": 2}}',
    '{"lora_alpha": -1e308}', '{"prior.r": 0}', '{"prior": 3}', '{"config": 3}', '{"config": {"in_channels": -5}}',
    '{"filter": "os:system"}', '{"filter": 7}', '{"model_version": ["3.6B"]}', '{"prior.use_rslora": "no"}',
    "\ud800", "\0",
)  # fmt: skip


def laid_out(header: Header) -> bytes:
    """JSON as the format wants it, keys as they are, halves of surrogate pairs as escapes."""
    return json.dumps(header).encode()


def file_of(header: bytes, data: bytes, length: int | None = None) -> bytes:
    """A file's bytes, saying that its header has `length`."""
    return struct.pack("<Q", (len(header) if length is None else length) % 2**64) + header + data


def sound(tensors: dict[str, tuple[str, list[int]]], metadata: dict[str, str] | None = None) -> tuple[Header, bytes]:
    """Header and data of tensors (dtype, shape) of zeros and small numbers."""
    header: Header = {} if metadata is None else {"__metadata__": metadata}
    place = 0
    for name, (dtype, shape) in tensors.items():
        size = math.prod(shape) * ITEM[dtype]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [place, place + size]}
        place += size
    return header, bytes(place)


def mutated_file(
    rng: random.Random,
    tensors: dict[str, tuple[str, list[int]]],
    metadata: dict[str, str] | None,
    keys: tuple[str, ...],
) -> tuple[str, bytes]:
    """What was done, and the file; `keys` are the header's entries that the reader parses."""
    kind = rng.choice(list(KINDS))
    return kind, KINDS[kind](rng, dict(tensors), dict(metadata or {}), keys)


def _pick(rng: random.Random, tensors: dict) -> str:
    return rng.choice(list(tensors))


def _length_lie(rng, tensors, metadata, keys) -> bytes:
    header, data = sound(tensors, metadata)
    text = laid_out(header)
    near = [len(text) + step for step in (-9, -1, 1, 7, 8, len(data), len(data) + 8)]
    lies = [
        0,
        1,
        2,
        2**31,
        2**32,
        2**40,
        2**62,
        2**63 - 8,
        2**63,
        2**64 - 1,
        2**64 - 8,
        100_000_000,
        100_000_001,
        *near,
    ]
    return file_of(text, data, rng.choice(lies))


def _truncated(rng, tensors, metadata, keys) -> bytes:
    header, data = sound(tensors, metadata)
    whole = file_of(laid_out(header), data)
    return whole[
        : rng.choice([0, 1, 4, 7, 8, 9, 10, len(whole) - 1, len(whole) - len(data), rng.randrange(len(whole))])
    ]


def _longer(rng, tensors, metadata, keys) -> bytes:
    header, data = sound(tensors, metadata)
    return file_of(laid_out(header), data + bytes(rng.choice([1, 8, 4096])))


def _bits(rng, tensors, metadata, keys) -> bytes:
    header, data = sound(tensors, metadata)
    text = laid_out(header)
    whole = bytearray(file_of(text, data))
    for _ in range(rng.choice([1, 1, 2, 8, 64])):
        whole[rng.randrange(8 + len(text))] ^= 1 << rng.randrange(8)
    return bytes(whole)


def _broken_text(rng, tensors, metadata, keys) -> bytes:
    header, data = sound(tensors, metadata)
    text = laid_out(header)
    place = rng.randrange(len(text))
    changes = [
        text[:place] + text[place + 1 :], text[:place] + b"\xff\xfe" + text[place:],
        text[:place] + b"\0" + text[place:],
        text.replace(b'"', b"'"), text[:-1] + b",}", b"\xef\xbb\xbf" + text, b"  \n" + text, text + b"   ",
        text + b"\0" * 8,
        text + b"{}", text.replace(b"[", b"[NaN,", 1), b"// a comment\n" + text, text[: place // 2] + text[place:],
    ]  # fmt: skip
    return file_of(rng.choice(changes), data)


def _other_json(rng, tensors, metadata, keys) -> bytes:
    texts = (b"", b"{}", b"[]", b"null", b"3", b'"a"', b"true", b"[" * 200_000, b'{"a":' * 200_000, b"{" * 10,
             b'{"a": {}}',
             b'{"a": []}', b'{"a": 1}', b'{"__metadata__": 3}', b'{"__metadata__": {"a": {"b": 1}}}',
             b'{"__metadata__": null}',
             b'{"__metadata__": {}}', b'{"a": {"dtype": "F32"}}')  # fmt: skip
    return file_of(rng.choice(texts), bytes(rng.choice([0, 0, 4])))


def _other_file(rng, tensors, metadata, keys) -> bytes:
    return rng.choice(
        (b"", b"\0", b"\0" * 8, b"\0" * 4096, b"<!DOCTYPE html><html>Not found</html>", b"PK\x03\x04" + bytes(200),
         b"\x89PNG\r\n\x1a\n",
         b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 9\n", b"\x80\x02}q\x00.",
         b"GGUF\x03" + bytes(60),
         bytes(rng.randrange(256) for _ in range(300)), b"prompt: ein Fuchs\n" * 20, b"\xff" * 100)
    )  # fmt: skip


def _duplicates(rng, tensors, metadata, keys) -> bytes:
    header, data = sound(tensors, metadata)
    text, name = laid_out(header).decode(), _pick(rng, tensors)
    again = rng.choice([json.dumps(name), '"__metadata__"'])
    value = json.dumps(header[name]) if again != '"__metadata__"' else '{"format": "pt"}'
    return file_of(f"{text[:-1]}, {again}: {value}, {again}: {value}}}".encode(), data)


def _entry(key: str, values: tuple) -> Callable[..., bytes]:
    """One tensor's entry changed, everything else sound."""

    def change(rng, tensors, metadata, keys) -> bytes:
        header, data = sound(tensors, metadata)
        name = _pick(rng, tensors)
        header[name] = {**header[name], key: rng.choice(values)}
        return file_of(laid_out(header), data)

    return change


def _overlap(rng, tensors, metadata, keys) -> bytes:
    header, data = sound(tensors, metadata)
    one, other = _pick(rng, tensors), _pick(rng, tensors)
    header[one] = {**header[one], "data_offsets": header[other]["data_offsets"]}
    return file_of(laid_out(header), data)


def _fields(rng, tensors, metadata, keys) -> bytes:
    header, data = sound(tensors, metadata)
    name = _pick(rng, tensors)
    entry = dict(header[name])
    if rng.random() < 0.5:
        entry.pop(rng.choice(list(entry)))
    else:
        entry[rng.choice(["extra", "Dtype", ""])] = rng.choice([1, None, [[]], "x" * 1000])
    header[name] = rng.choice([entry, entry, None, [], 3, "F32"])
    return file_of(laid_out(header), data)


def _huge_but_told(rng, tensors, metadata, keys) -> bytes:
    """Shape and offsets agree on what is far more than the file has."""
    count = rng.choice([2**28, 2**34, 2**44, 2**60])
    header, data = sound(tensors, metadata)
    header[_pick(rng, tensors)] = {"dtype": "F32", "shape": [count], "data_offsets": [0, 4 * count]}
    return file_of(laid_out(header), data)


def _metadata(rng, tensors, metadata, keys) -> bytes:
    header, data = sound(tensors, metadata)
    values = (1, None, [], {"a": {}}, True, "x" * 3_000_000, "\ud800", "a\nb", {"": ""}, 1e400, "\0" * 100)
    whole = (rng.choice(values), {rng.choice(["format", "k" * 1_000_000, "", *keys]): rng.choice(values)})
    header["__metadata__"] = rng.choice(whole)
    return file_of(laid_out(header), data)


def _parsed_metadata(rng, tensors, metadata, keys) -> bytes:
    """Sound for safetensors; one of the entries that the reader parses is not what it expects."""
    key = rng.choice(keys or ("format",))
    header, data = sound(tensors, metadata | {key: rng.choice(JSON_TEXTS)})
    return file_of(laid_out(header), data)


# From here on the files are sound, and what they hold is not what anybody wrote.
def _names(rng, tensors, metadata, keys) -> bytes:
    for _ in range(rng.choice([1, 1, 3])):
        name = _pick(rng, tensors)
        new = rng.choice(
            [*NAMES, name + rng.choice(NAMES), rng.choice(NAMES) + name, name[1:], name[:-1], name.upper()]
        )
        tensors[new] = tensors.pop(name)
    return file_of(*_encoded(tensors, metadata))


def _dropped(rng, tensors, metadata, keys) -> bytes:
    for name in rng.sample(list(tensors), rng.randint(1, len(tensors))):
        del tensors[name]
    return file_of(*_encoded(tensors, metadata))


def _added(rng, tensors, metadata, keys) -> bytes:
    for number in range(rng.choice([1, 2, 5_000])):
        tensors[f"extra.{number}.weight"] = ("F32", [1])
    return file_of(*_encoded(tensors, metadata))


def _reshaped(rng, tensors, metadata, keys) -> bytes:
    for name in rng.sample(list(tensors), min(len(tensors), rng.choice([1, 1, 4]))):
        dtype, shape = tensors[name]
        shapes = ([], [0], [0, 0], [1], shape[::-1], [*shape, 1], [1, *shape], shape[:1], [side + 1 for side in shape],
                  [math.prod(shape)], [1] * 12, [side * 2 for side in shape], [0, *shape[1:]],
                  [*shape[:1], 0])  # fmt: skip
        tensors[name] = (dtype, list(rng.choice(shapes)))
    return file_of(*_encoded(tensors, metadata))


def _retyped(rng, tensors, metadata, keys) -> bytes:
    names = list(tensors) if rng.random() < 0.3 else [_pick(rng, tensors)]
    dtype = rng.choice(list(ITEM))
    for name in names:
        tensors[name] = (dtype, tensors[name][1])
    return file_of(*_encoded(tensors, metadata))


def _bytes(rng, tensors, metadata, keys) -> bytes:
    """Random bits for weights: NaN and infinities among them."""
    header, data = _encoded(tensors, metadata)
    return file_of(header, rng.randbytes(len(data)))


def _encoded(tensors, metadata) -> tuple[bytes, bytes]:
    header, data = sound(tensors, metadata or None)
    return laid_out(header), data


KINDS: dict[str, Callable[..., bytes]] = {
    "length of the header": _length_lie, "truncated": _truncated, "longer": _longer, "bits": _bits,
    "broken text": _broken_text,
    "other json": _other_json, "other file": _other_file, "duplicates": _duplicates, "shape": _entry("shape", SHAPES),
    "dtype": _entry("dtype", DTYPES), "offsets": _entry("data_offsets", OFFSETS), "overlap": _overlap,
    "fields": _fields,
    "huge but told": _huge_but_told, "metadata": _metadata, "parsed metadata": _parsed_metadata, "names": _names,
    "dropped": _dropped, "added": _added, "reshaped": _reshaped, "retyped": _retyped, "weights": _bytes,
}  # fmt: skip
