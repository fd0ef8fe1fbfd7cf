"""Damaged images: sound ones in every format and mode that Pillow writes, and what may be wrong with them."""

from __future__ import annotations

import io
import random
import struct
import zlib
from collections.abc import Callable
from functools import cache

import numpy as np
from PIL import Image

SIZE = (48, 40)
SIGNATURE = b"\x89PNG\r\n\x1a\n"
VARIANTS: tuple[tuple[str, str, dict], ...] = (
    ("PNG", "RGB", {}), ("PNG", "RGBA", {}), ("PNG", "L", {}), ("PNG", "LA", {}), ("PNG", "P", {}),
    ("PNG", "P", {"transparency": 3}),
    ("PNG", "P", {"transparency": b"\0\x80\xff"}), ("PNG", "1", {}), ("PNG", "I;16", {}),
    ("PNG", "RGB", {"transparency": (1, 2, 3)}),
    ("PNG", "RGB", {"dpi": (300, 300)}), ("JPEG", "RGB", {}), ("JPEG", "L", {}), ("JPEG", "CMYK", {}),
    ("JPEG", "RGB", {"progressive": True}),
    ("JPEG", "YCbCr", {"subsampling": 0}), ("WEBP", "RGB", {}), ("WEBP", "RGBA", {"lossless": True}),
    ("GIF", "P", {}), ("GIF", "RGB", {}),
    ("TIFF", "RGB", {}), ("TIFF", "RGBA", {"compression": "tiff_deflate"}),
    ("TIFF", "CMYK", {"compression": "tiff_lzw"}),
    ("TIFF", "1", {"compression": "group4"}), ("TIFF", "I;16", {}), ("TIFF", "F", {}), ("TIFF", "I", {}),
    ("TIFF", "LAB", {}),
    ("TIFF", "RGB", {"compression": "jpeg"}), ("BMP", "RGB", {}), ("BMP", "P", {}), ("AVIF", "RGB", {}),
    ("JPEG2000", "RGB", {}), ("PPM", "RGB", {}),
    ("ICO", "RGBA", {}), ("TGA", "RGBA", {"compression": "tga_rle"}), ("PCX", "P", {}), ("SGI", "RGB", {}),
    ("DDS", "RGBA", {}), ("EPS", "RGB", {}),
    ("PDF", "RGB", {}), ("IM", "RGB", {}), ("MSP", "1", {}), ("XBM", "1", {}), ("QOI", "RGB", {}),
)  # fmt: skip


@cache
def sound_image(number: int) -> bytes:
    """The file of `VARIANTS[number]`; empty where this Pillow cannot write it."""
    form, mode, options = VARIANTS[number]
    generator = np.random.default_rng(number)
    colours = np.linspace(0, 255, SIZE[0] * SIZE[1] * 3).reshape(SIZE[1], SIZE[0], 3)
    image = Image.fromarray((colours + generator.integers(0, 9, colours.shape)).clip(0, 255).astype(np.uint8))
    if mode == "I;16":
        image = Image.fromarray((colours[..., 0] * 200).astype(np.uint16))
    elif mode == "LAB":
        image = Image.new("LAB", SIZE, (90, 120, 130))
    elif image.mode != mode:
        image = image.convert(mode)
    file = io.BytesIO()
    try:
        image.save(file, form, **options)
    except (OSError, ValueError, KeyError):
        return b""
    return file.getvalue()


def png(chunks: list[tuple[bytes, bytes]], *, wrong_sums: bool = False) -> bytes:
    """A PNG of these chunks."""
    parts = [SIGNATURE]
    for name, body in chunks:
        check = zlib.crc32(name + body) ^ (1 if wrong_sums else 0)
        parts.append(struct.pack(">I", len(body)) + name + body + struct.pack(">I", check))
    return b"".join(parts)


def png_header(width: int, height: int, depth: int = 8, colour: int = 2, interlace: int = 0) -> tuple[bytes, bytes]:
    return b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, interlace)


@cache
def bomb(width: int, height: int, colour: int = 0, depth: int = 8) -> bytes:
    """A small PNG with that many pixels: all of them zero, deflated as often as it takes."""
    samples = {0: 1, 2: 3, 3: 1, 4: 2, 6: 4}[colour]
    packer = zlib.compressobj(9)
    row = bytes(1 + -(-width * samples * depth // 8))
    data = b"".join(packer.compress(row) for _ in range(height)) + packer.flush()
    palette = [(b"PLTE", bytes(3))] if colour == 3 else []
    return png([png_header(width, height, depth, colour), *palette, (b"IDAT", data), (b"IEND", b"")])


def mutated_image(rng: random.Random) -> tuple[str, str, bytes]:
    """What was done, the file's extension, and its bytes."""
    kind = rng.choice(list(KINDS))
    number = rng.randrange(len(VARIANTS))
    form, mode, _ = VARIANTS[number]
    data = KINDS[kind](rng, bytearray(sound_image(number)) or bytearray(b"nothing"))
    extension = rng.choice(["png", "jpg", form.lower(), form.lower(), "webp", "gif"])
    return f"{kind} ({form} {mode})", extension, bytes(data)


def _truncated(rng, data) -> bytes:
    places = [
        0,
        1,
        2,
        8,
        16,
        33,
        40,
        len(data) - 1,
        len(data) - 4,
        len(data) - 12,
        len(data) // 2,
        rng.randrange(len(data)),
    ]
    return bytes(data[: max(0, rng.choice(places))])


def _bits(rng, data) -> bytes:
    end = rng.choice([len(data), min(len(data), 64)])
    for _ in range(rng.choice([1, 2, 8, 64, 400])):
        data[rng.randrange(end)] ^= 1 << rng.randrange(8)
    return bytes(data)


def _words(rng, data) -> bytes:
    """Four bytes that say a length, an offset or a size, replaced by an extreme."""
    for _ in range(rng.choice([1, 1, 2, 4])):
        place = rng.randrange(max(1, min(len(data) - 4, rng.choice([32, 128, 4096]))))
        order = rng.choice(["big", "little"])
        size = rng.choice([2, 4, 4])
        data[place : place + size] = (
            rng.choice([0, 1, 2**31 - 1, 2**31, 2**32 - 1, 2**16, 100_000]) % 256**size
        ).to_bytes(size, order)
    return bytes(data)


def _spliced(rng, data) -> bytes:
    """The start of one image and the end of another."""
    other = sound_image(rng.randrange(len(VARIANTS)))
    return bytes(data[: rng.randrange(len(data) + 1)]) + other[rng.randrange(len(other) + 1) :]


def _cut_out(rng, data) -> bytes:
    start = rng.randrange(len(data))
    return bytes(data[:start] + data[start + rng.randrange(1, 200) :])


def _repeated(rng, data) -> bytes:
    start = rng.randrange(len(data))
    part = bytes(data[start : start + rng.randrange(1, 200)])
    return bytes(data[:start]) + part * rng.choice([2, 50, 2000]) + bytes(data[start:])


def _png_size(rng, data) -> bytes:
    sides = (0, 1, 7, 2**15, 2**16, 2**24, 2**31 - 1, 2**31, 2**32 - 1)
    header = png_header(
        rng.choice(sides),
        rng.choice(sides),
        rng.choice([0, 1, 8, 16, 7]),
        rng.choice([0, 2, 3, 4, 6, 5]),
        rng.choice([0, 1, 9]),
    )
    pixels = zlib.compress(bytes(rng.choice([0, 10, 5000])))
    return png([header, (b"IDAT", pixels), (b"IEND", b"")], wrong_sums=rng.random() < 0.1)


BOMBS = ((10_000, 10_000, 3, 1), (20_000, 20_000, 0, 1), (100_001, 1000, 0, 1), (12_000, 9_000, 0, 1))


def warm() -> None:
    """Makes what takes long to make, before processes are forked."""
    for sizes in BOMBS:
        bomb(*sizes)
    for number in range(len(VARIANTS)):
        sound_image(number)


def _bomb(rng, data) -> bytes:
    """From 100 to 400 megapixels in some hundred kilobytes."""
    return bomb(*rng.choice(BOMBS))


def _chunks(rng, data) -> bytes:
    """A sound PNG with chunks that are too long, twice there, in the wrong order or full of rubbish."""
    header, pixels = png_header(4, 4), (b"IDAT", zlib.compress(bytes(4 * 13)))
    text = b"parameters\0" + b"x" * rng.choice([0, 100, 70_000])
    rubbish = [
        (b"iCCP", b"icc\0\0" + zlib.compress(bytes(rng.choice([0, 128, 5_000_000])))), (b"iCCP", rng.randbytes(60)),
        (b"zTXt", b"a\0\0" + zlib.compress(bytes(2_000_000))),
        (b"tEXt", text), (b"tEXt", b""),
        (b"iTXt", b"stable_cascade\0\1\0\0\0" + zlib.compress(b'{"a":' * 100_000)), (b"iTXt", rng.randbytes(30)),
        (b"eXIf", rng.randbytes(80)),
        (b"eXIf", _exif_loop(rng)), (b"tRNS", rng.randbytes(700)), (b"PLTE", rng.randbytes(700)),
        (b"gAMA", b"\0\0\0\0"), (b"acTL", rng.randbytes(8)),
        (b"fcTL", rng.randbytes(26)), (b"fdAT", rng.randbytes(26)), (b"cHRM", b""), (b"pHYs", b"\xff" * 9),
        (b"IHDR", png_header(9, 9)[1]),
        (b"\0\0\0\0", b""), (b"ZZZZ", bytes(10)), (b"IEND", b"trailing"),
    ]  # fmt: skip
    middle = rng.sample(rubbish, rng.choice([1, 2, 6]))
    chunks = [header, *middle, pixels, (b"IEND", b"")]
    if rng.random() < 0.2:
        rng.shuffle(chunks)
    return png(chunks, wrong_sums=rng.random() < 0.05)


def _exif_loop(rng) -> bytes:
    """EXIF whose directories point at themselves, or whose entries are longer than the file."""
    entries = [struct.pack(">HHII", tag, kind, count, value) for tag, kind, count, value in (
        (0x0112, rng.choice([3, 4, 2, 7, 12]), rng.choice([1, 2, 2**31]), rng.choice([0x00060000, 99, 2**32 - 1])),
        (0x8769, 4, 1, rng.choice([8, 0, 2**31])), (0x8825, 4, 1, 8),
        (0x0100, 4, rng.choice([1, 2**32 - 1]), 8))]  # fmt: skip
    body = struct.pack(">H", rng.choice([len(entries), 65535])) + b"".join(entries)
    return b"MM\0*" + struct.pack(">I", rng.choice([8, 8, 0, 2**31])) + body + struct.pack(">I", rng.choice([0, 8]))


def _jpeg_segments(rng, data) -> bytes:
    """A JPEG with rubbish where EXIF, ICC profiles, Photoshop's or several images' directories are."""
    jpeg = sound_image(11)
    exif = _exif_loop(rng)
    bodies = [b"Exif\0\0" + exif, b"ICC_PROFILE\0\1\2" + rng.randbytes(90), b"ICC_PROFILE\0\0\0", b"MPF\0" + exif,
              b"Adobe" + rng.randbytes(7),
              b"Photoshop 3.0\08BIM" + rng.randbytes(40), rng.randbytes(40),
              b"http://ns.adobe.com/xap/1.0/\0<x" * 300]  # fmt: skip
    parts = b"".join(
        b"\xff"
        + bytes([rng.choice([0xE1, 0xE2, 0xED, 0xEE, 0xFE, 0xE0])])
        + struct.pack(">H", rng.choice([len(body) + 2, 0, 1, 65535]))
        + body
        for body in rng.sample(bodies, rng.choice([1, 3]))
    )
    return jpeg[:2] + parts + jpeg[2:]


def _frames(rng, data) -> bytes:
    """Animations and files of several pages, whole or damaged."""
    form = rng.choice(["GIF", "WEBP", "PNG", "TIFF", "AVIF"])
    sizes = [SIZE] * 3 if form != "TIFF" else [SIZE, (3, 900), (1, 1)]
    frames = [Image.new("RGB", size, (80 * number, 20, 200)) for number, size in enumerate(sizes)]
    file = io.BytesIO()
    frames[0].save(file, form, save_all=True, append_images=frames[1:])
    whole = bytearray(file.getvalue())
    return bytes(whole) if rng.random() < 0.4 else rng.choice([_bits, _words, _truncated])(rng, whole)


def _no_image(rng, data) -> bytes:
    return rng.choice((
        b"", b"\0", b"not an image", b"<svg xmlns='http://www.w3.org/2000/svg' width='1' height='1'/>",
        b"%PDF-1.4\n%%EOF", SIGNATURE,
        b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 99999 99999\n", b"RIFF\xff\xff\xff\xffWEBPVP8 ",
        b"BM" + bytes(52), b"P6\n9999999 9999999\n255\n",
        b"P6\n# " + b"x" * 100_000, b"GIF89a\xff\xff\xff\xff\xf7\0\0", b"II*\0\x08\0\0\0\xff\xff",
        b"\xff\xd8\xff\xe0", b"#define x_width 999999\n",
        b"\0\0\0\x18ftypavif", b"MZ\x90\0" * 40, rng.randbytes(500), b"P5 1 1 65536 \0\0", b"8BPS\0\1" + bytes(40),
        b"P7\nWIDTH 9\n", b"DDS " + bytes(124),
    ))  # fmt: skip


def _sound(rng, data) -> bytes:
    return bytes(data)


def png_with_text(rng: random.Random, key: str, text: bytes) -> bytes:
    """A sound PNG with this entry, in one or two of the chunks that hold text, sometimes with a wrong sum."""
    name = key.encode("latin-1")
    kinds = [(b"tEXt", name + b"\0" + text)] * 3 + [
        (b"iTXt", name + b"\0\0\0\0\0" + text), (b"iTXt", name + b"\0\1\0\0\0" + zlib.compress(text)),
        (b"zTXt", name + b"\0\0" + zlib.compress(text))]  # fmt: skip
    pixels = (b"IDAT", zlib.compress(bytes(4 * 13)))
    chunks = [png_header(4, 4), *rng.sample(kinds, rng.choice([1, 1, 2])), pixels, (b"IEND", b"")]
    return png(chunks, wrong_sums=rng.random() < 0.05)


KINDS: dict[str, Callable[[random.Random, bytearray], bytes]] = {
    "truncated": _truncated, "bits": _bits, "words": _words, "spliced": _spliced, "cut out": _cut_out,
    "repeated": _repeated,
    "png size": _png_size, "bomb": _bomb, "chunks": _chunks, "jpeg segments": _jpeg_segments, "frames": _frames,
    "no image": _no_image, "sound": _sound,
}  # fmt: skip
