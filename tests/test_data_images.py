"""Every kind of image file becomes the same upright RGB pixels."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from stable_cascade.data.decoding import SMART_SHARE, fit_stored
from stable_cascade.data.images import (
    decode_image,
    decode_stored,
    image_size,
    in_unit_range,
    resize_to,
    resize_to_cover,
)
from tests.making_shards import crop_to, encoded, image, undecodable

WIDTH, HEIGHT = 24, 16


def gradient(mode: str = "RGB") -> Image.Image:
    """Red grows to the right, green downwards, blue is constant."""
    array = np.zeros((HEIGHT, WIDTH, 3), np.uint8)
    array[..., 0] = np.linspace(0, 250, WIDTH)[None]
    array[..., 1] = np.linspace(0, 250, HEIGHT)[:, None]
    array[..., 2] = 100
    return Image.fromarray(array).convert(mode)


def reference(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.asarray(image.convert("RGB"), np.float32) / 255).permute(2, 0, 1)


@pytest.mark.parametrize(
    ("mode", "kind", "tolerance"),
    [
        ("RGB", "PNG", 0),
        ("RGB", "BMP", 0),
        ("RGB", "TIFF", 0),
        ("RGB", "PPM", 0),
        ("RGB", "JPEG", 0.1),
        ("RGB", "WEBP", 0.1),
        ("L", "PNG", 0),
        ("L", "JPEG", 0.05),
        ("1", "PNG", 0),
        ("P", "PNG", 0),
        ("P", "GIF", 0),
        ("CMYK", "JPEG", 0.1),
        ("CMYK", "TIFF", 0),
        ("YCbCr", "JPEG", 0.1),
    ],
)
def test_modes(mode, kind, tolerance):
    image = gradient(mode)
    data = encoded(image, kind)
    assert image_size(data) == (WIDTH, HEIGHT)
    pixels = decode_image(data)
    assert pixels.shape == (3, HEIGHT, WIDTH)
    assert pixels.dtype == torch.float32
    assert (pixels - reference(image)).abs().max() <= tolerance + 1e-6


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_exif_orientation(orientation, kind):
    """The stored image is turned so that the orientation tag turns it back."""
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}
    upright = gradient()
    stored = upright.transpose(Image.Transpose(undo[orientation])) if orientation > 1 else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True} if kind == "WEBP" else {"quality": 95} if kind == "JPEG" else {}
    data = encoded(stored, kind, exif=exif, **options)
    assert image_size(data) == (WIDTH, HEIGHT)
    pixels = decode_image(data)
    assert (pixels - reference(upright)).abs().max() < 0.15
    assert (pixels - reference(upright)).abs().mean() < 0.02


def test_alpha_lies_on_white():
    array = np.array([[[255, 0, 0, 255], [255, 0, 0, 0], [0, 0, 0, 51]]], np.uint8)
    pixels = decode_image(encoded(Image.fromarray(array)))
    expected = torch.tensor([[[1.0, 0, 0], [1, 1, 1], [0.8, 0.8, 0.8]]]).permute(2, 0, 1)
    assert torch.allclose(pixels, expected)


def test_grey_alpha_and_palette_transparency_lie_on_white():
    grey = Image.fromarray(np.array([[[0, 0], [0, 255]]], np.uint8), "LA")
    assert decode_image(encoded(grey))[0].tolist() == [[1, 0]]
    palette = Image.new("P", (2, 1))
    palette.putpalette([255, 0, 0, 0, 0, 255])
    palette.putpixel((1, 0), 1)
    pixels = decode_image(encoded(palette, transparency=0))
    assert pixels[:, 0, 0].tolist() == [1, 1, 1]
    assert pixels[:, 0, 1].tolist() == [0, 0, 1]
    keyed = Image.fromarray(np.array([[[9, 9, 9], [0, 0, 255]]], np.uint8))
    assert decode_image(encoded(keyed, transparency=(9, 9, 9)))[:, 0, 0].tolist() == [1, 1, 1]


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "PPM"])
def test_sixteen_bits_are_scaled_not_clipped(kind):
    values = np.array([[0, 256, 32768, 65535]], np.uint16)
    pixels = decode_image(encoded(Image.fromarray(values), kind))
    assert torch.allclose(pixels[0, 0], torch.from_numpy(values[0].astype(np.float32) / 65535), atol=1e-6)
    assert torch.equal(pixels[0], pixels[2])


def test_broken_files():
    for data in (b"", b"no image", image()[:20]):
        with pytest.raises(ValueError, match="no readable image"):
            image_size(data)
    assert image_size(undecodable()) == (40, 30)
    for data in (b"no image", undecodable()):
        with pytest.raises(ValueError, match="cannot decode"):
            decode_image(data)


def test_header_of_a_long_file_from_its_beginning():
    noise = np.random.default_rng(0).integers(0, 256, (200, 300, 3), dtype=np.uint8)
    jpeg = encoded(Image.fromarray(noise), "JPEG")
    assert image_size(jpeg[:4000], whole=False) == (300, 200)
    late = encoded(Image.fromarray(noise), "JPEG", icc_profile=bytes(60000))
    assert image_size(late[:4000], whole=False) is None
    assert image_size(late) == (300, 200)


def test_large_jpeg_is_decoded_small_and_upright():
    large = gradient().resize((WIDTH * 40, HEIGHT * 40), Image.Resampling.BICUBIC)
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encoded(large.transpose(Image.Transpose.ROTATE_90), "JPEG", exif=exif, quality=95)
    assert image_size(data) == (WIDTH * 40, HEIGHT * 40)
    small = decode_stored(data, at_least=(HEIGHT * 5 + 1, WIDTH * 5))
    assert small.shape == (3, HEIGHT * 10, WIDTH * 10)
    assert decode_stored(data, at_least=(HEIGHT * 5, WIDTH * 5)).shape == (3, HEIGHT * 5, WIDTH * 5)
    size = (HEIGHT * 5, WIDTH * 5)
    exact = resize_to_cover(decode_image(data), size)
    assert (in_unit_range(fit_stored(data, size, "center", 0)[0]) - exact).abs().mean() < 0.01


def test_bytes_are_resized_as_floats_are():
    stored = decode_stored(image(300, 200, seed=3))
    assert stored.dtype == torch.uint8
    exact = resize_to(stored / 255, (90, 120))
    assert (resize_to(stored, (90, 120)) / 255 - exact).abs().max() <= 1.01 / 255  # rounded after each of two passes
    assert torch.equal(resize_to(stored, (200, 300)), stored)


def test_crops():
    pixels = torch.rand(3, 20, 50, generator=torch.Generator().manual_seed(0))
    assert torch.equal(crop_to(pixels, (20, 20), "center", 0), pixels[:, :, 15:35])
    assert torch.equal(crop_to(pixels, (20, 20), "random", 7), crop_to(pixels, (20, 20), "random", 7))
    lefts = {crop_to(pixels, (20, 20), "random", seed)[0, 0, 0].item() for seed in range(400)}
    assert lefts == set(pixels[0, 0, :31].tolist()), "every place is drawn, both ends included"


def test_smart_crop_finds_the_detail():
    pixels = torch.full((3, 20, 100), 0.5)
    pixels[:, 5:15, 62:72] = torch.rand(3, 10, 10, generator=torch.Generator().manual_seed(0))
    crops = [crop_to(pixels, (20, 20), "smart", seed) for seed in range(200)]
    whole = sum((crop.std() > 0.14).item() for crop in crops) / 200
    assert whole > 1 - SMART_SHARE, "the detail is in every crop but some of the drawn ones"
    assert torch.equal(crops[7], crop_to(pixels, (20, 20), "smart", 7))


def test_smart_crop_draws_among_the_good_places():
    """A slope whose steepness grows to the right: the best crop is the last, the drawn ones are near it."""
    pixels = (torch.linspace(0, 1, 120) ** 2).expand(3, 20, 120)
    lefts = [round(119 * crop_to(pixels, (20, 20), "smart", seed)[0, 0, 0].item() ** 0.5) for seed in range(300)]
    assert min(lefts) >= 100 - 0.2 * 101
    assert 0.6 < sum(left == 100 for left in lefts) / 300 < 0.85
