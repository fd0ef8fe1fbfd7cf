"""ICC profiles are applied wherever an image comes in: a Display P3, Adobe RGB, grey or CMYK image becomes sRGB."""

from __future__ import annotations

import io
import logging
import struct

import numpy as np
import pytest
from PIL import Image, ImageCms

from stable_cascade import pixels
from stable_cascade.data.images import decode_image, decode_stored
from stable_cascade.drawing import read_image
from stable_cascade.pipelines.call import to_pixels

D50 = (0.9642, 1.0, 0.8249)
# Columns of the matrices to XYZ, adapted to D50 (Lindbloom).
P3 = ((0.5151, 0.2412, -0.0011), (0.2920, 0.6922, 0.0419), (0.1571, 0.0666, 0.7841))
ADOBE = ((0.6097, 0.3111, 0.0195), (0.2053, 0.6257, 0.0609), (0.1492, 0.0632, 0.7446))


def profile(columns=None, gamma=2.2, name=b"a wide space") -> bytes:
    """A version 2 display profile with a matrix and one gamma; of grey without a matrix."""

    def number(value):
        return struct.pack(">i", round(value * 65536))

    def xyz(values):
        return b"XYZ \0\0\0\0" + b"".join(map(number, values))

    curve = b"curv\0\0\0\0" + struct.pack(">IH", 1, round(gamma * 256)) + b"\0\0"
    text = b"desc\0\0\0\0" + struct.pack(">I", len(name) + 1) + name + b"\0" + bytes(78)
    tags = {b"desc": text + bytes(-len(text) % 4), b"wtpt": xyz(D50), b"cprt": b"text\0\0\0\0none"}
    if columns:
        tags |= {letter + b"XYZ": xyz(column) for letter, column in zip((b"r", b"g", b"b"), columns, strict=True)}
    tags |= {letter + b"TRC": curve for letter in ((b"r", b"g", b"b") if columns else (b"k",))}
    table, data, place = struct.pack(">I", len(tags)), b"", 128 + 4 + 12 * len(tags)
    for tag, value in tags.items():
        table += tag + struct.pack(">II", place + len(data), len(value))
        data += value
    head = struct.pack(">I4sI4s4s4s", 128 + len(table) + len(data), b"lcms", 0x02400000, b"mntr",
                       b"RGB " if columns else b"GRAY", b"XYZ ") + bytes(12) + b"acsp"  # fmt: skip
    head += bytes(28) + b"".join(map(number, D50))
    return head.ljust(128, b"\0") + table + data


def png(image: Image.Image, icc: bytes | None) -> bytes:
    out = io.BytesIO()
    image.save(out, "PNG", **({"icc_profile": icc} if icc else {}))
    return out.getvalue()


def everywhere(data: bytes) -> list[np.ndarray]:
    """(H, W, 3) in [0, 1], as data, pipelines and commands read it."""
    pipeline = to_pixels(Image.open(io.BytesIO(data)))[0].permute(1, 2, 0).numpy()
    command = np.asarray(read_image(data), np.float32) / 255
    return [decode_image(data).permute(1, 2, 0).numpy(), pipeline, command]


def colour(values, icc, mode="RGB"):
    return [read[0, 0] for read in everywhere(png(Image.new(mode, (4, 4), values), icc))]


SRGB = ((0.4361, 0.2225, 0.0139), (0.3851, 0.7169, 0.0971), (0.1431, 0.0606, 0.7142))


def in_srgb(columns, given) -> np.ndarray:
    """By hand: to linear light, to XYZ, to sRGB's primaries, clipped, and sRGB's curve."""
    light = (np.array(given) / 255) ** 2.2
    linear = np.clip(np.linalg.inv(np.array(SRGB).T) @ np.array(columns).T @ light, 0, 1)
    return np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


@pytest.mark.parametrize("columns", [P3, ADOBE])
@pytest.mark.parametrize("given", [(255, 0, 0), (128, 128, 128), (100, 180, 90), (220, 120, 60), (30, 60, 200)])
def test_a_wide_colour_becomes_srgb(columns, given):
    expected = in_srgb(columns, given)
    for read in colour(given, profile(columns)):
        assert np.abs(read - expected).max() < 0.02, (read, expected)


def test_colours_do_change():
    assert np.abs(in_srgb(P3, (100, 180, 90)) - np.array((100, 180, 90)) / 255).max() > 0.1


def test_a_profile_of_srgb_changes_no_bit():
    values = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    for icc in (None, srgb):
        read = decode_stored(png(Image.fromarray(values), icc)).permute(1, 2, 0).numpy()
        assert np.array_equal(read, values)


def test_grey_palette_and_alpha_follow_their_profile():
    dark = colour(128, profile(gamma=1.0), mode="L")  # linear light: half of it is bright
    assert all(np.abs(read - 0.735).max() < 0.02 for read in dark)
    red = Image.new("P", (4, 4))
    red.putpalette([90, 180, 60])
    plain = colour((90, 180, 60), profile(P3))
    for read, expected in zip(everywhere(png(red, profile(P3))), plain, strict=True):
        assert np.abs(read[0, 0] - expected).max() < 0.01
    clear = png(Image.new("RGBA", (4, 4), (0, 200, 0, 0)), profile(P3))
    assert all(np.allclose(read, 1) for read in everywhere(clear))


@pytest.mark.parametrize(("icc", "said"), [
    (b"no profile at all", "left out"), (profile(P3)[:150], "left out"),
    (profile(), "is about GRAY, the image is RGB"),
    (profile(P3) + bytes(2**22), "more than 4,194,304"),
])  # fmt: skip
def test_a_profile_that_cannot_be_used_is_left_out_with_a_warning(icc, said, caplog):
    pixels._warn.cache_clear()
    with caplog.at_level(logging.WARNING):
        out = io.BytesIO()
        Image.new("RGB", (4, 4), (10, 200, 30)).save(out, "JPEG" if len(icc) > 2**20 else "PNG", icc_profile=icc)
        read = decode_image(out.getvalue())
        decode_image(out.getvalue())
    assert np.abs(read[:, 0, 0].numpy() - np.array([10, 200, 30]) / 255).max() < 0.02
    assert [said in record.message for record in caplog.records] == [True]  # once, not for every image


def test_wide_grey_is_the_same_in_every_way_in():
    values = np.array([[0, 300, 32768, 65535]], np.uint16).repeat(4, axis=0)
    reads = everywhere(png(Image.fromarray(values), None))
    for read in reads:
        assert np.abs(read[0, :, 0] - values[0] / 65535).max() < 0.003


def test_a_turned_image_with_a_profile_is_turned_and_converted():
    image = Image.new("RGB", (8, 4), (90, 180, 60))
    exif = Image.Exif()
    exif[0x0112] = 6
    out = io.BytesIO()
    image.save(out, "JPEG", icc_profile=profile(P3), exif=exif, quality=100)
    for read in everywhere(out.getvalue()):
        assert read.shape == (8, 4, 3)
        assert np.abs(read[0, 0] - in_srgb(P3, (90, 180, 60))).max() < 0.03


def ink_profile() -> bytes:
    """A version 2 printer profile of CMYK to Lab by a table of its corners: every ink is a neutral grey there."""
    corners = b""
    for corner in range(16):
        cyan, magenta, yellow, black = (corner >> 3 & 1, corner >> 2 & 1, corner >> 1 & 1, corner & 1)
        light = 100 * (1 - black) * (1 - 0.3 * (cyan + magenta + yellow))
        corners += bytes([round(light * 2.55), 128, 128])
    identity = struct.pack(">9i", *[65536 if place in (0, 4, 8) else 0 for place in range(9)])
    table = b"mft1\0\0\0\0" + bytes([4, 3, 2, 0]) + identity + bytes(range(256)) * 4 + corners + bytes(range(256)) * 3
    text = b"desc\0\0\0\0" + struct.pack(">I", 5) + b"inks\0" + bytes(79)
    white = b"XYZ \0\0\0\0" + b"".join(struct.pack(">i", round(value * 65536)) for value in D50)
    tags = {b"desc": text, b"wtpt": white, b"cprt": b"text\0\0\0\0none", b"A2B0": table}
    index, data, place = struct.pack(">I", len(tags)), b"", 128 + 4 + 12 * len(tags)
    for tag, value in tags.items():
        padded = value + bytes(-len(value) % 4)
        index += tag + struct.pack(">II", place + len(data), len(value))
        data += padded
    head = struct.pack(">I4sI4s4s4s", 128 + len(index) + len(data), b"lcms", 0x02400000, b"prtr", b"CMYK", b"Lab ")
    head += bytes(12) + b"acsp" + bytes(28) + b"".join(struct.pack(">i", round(value * 65536)) for value in D50)
    return head.ljust(128, b"\0") + index + data


@pytest.mark.parametrize("kind, options", [("TIFF", {}), ("JPEG", {"quality": 100, "subsampling": 0})])
def test_the_inks_of_a_cmyk_image_are_those_of_its_profile(kind, options):
    """Full cyan is a grey of L* 70 by this profile, sRGB 171; without one it is cyan."""
    image, out = Image.new("CMYK", (32, 32), (255, 0, 0, 0)), io.BytesIO()
    image.save(out, kind, icc_profile=ink_profile(), **options)
    read = np.asarray(read_image(out.getvalue()))
    assert np.abs(read.astype(int) - 171).max() <= 4
    decoded = (decode_image(out.getvalue()).permute(1, 2, 0) * 255).round().byte().numpy()
    assert np.array_equal(read, decoded)
    plain = io.BytesIO()
    image.save(plain, kind, **options)
    assert np.asarray(read_image(plain.getvalue()))[0, 0, 0] < 40
