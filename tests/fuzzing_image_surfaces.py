"""Damaged images through everything that reads images: trainings, drawings and their records, filters."""

from __future__ import annotations

import json
import random
from functools import cache
from pathlib import Path

import torch

from tests.fuzzing import Surface
from tests.fuzzing_folders import mutated_json
from tests.fuzzing_images import mutated_image, png_with_text, warm

CONTROL_SIZES = (1, 2, 3, 5, 7, 8, 9, 16, 31, 64, 100, 257, 1000, 20_000)
FILTERS = ("CannyFilter", "SoftEdgeFilter", "SRPixelFilter", "InpaintFilter", "QRFilter", "IdentityFilter")
PARAMS: tuple[dict, ...] = ({}, {}, {}, {"resize": None}, {"resize": 8}, {"resize": 100_000}, {"resize": "x"},
                            {"sigma": float("nan")},
                            {"low": 300}, {"scale_factors": [0]}, {"scale_factors": [1e9]},
                            {"dilation_kernels": [100_001]}, {"unknown": 1})  # fmt: skip


def write(folder: Path, name: str, data: bytes) -> Path:
    """The new file."""
    path = folder / name
    path.write_bytes(data)
    return path


def make_image(rng: random.Random, folder: Path) -> tuple[str, Path]:
    kind, extension, data = mutated_image(rng)
    return kind, write(folder, f"image.{extension}", data)


def _use_image_bytes(path: Path) -> None:
    """What trainings read: sizes first, then whole images and masks."""
    from stable_cascade.data.images import decode_mask, decode_stored, image_size, in_unit_range, plain_size

    data = path.read_bytes()
    plain_size(data)
    image_size(data)
    pixels = in_unit_range(decode_stored(data, at_least=(16, 16)))
    assert pixels.shape[0] == 3
    assert pixels.isfinite().all()
    decode_mask(data)


def _use_image(path: Path) -> None:
    from stable_cascade.drawing.files import read_image

    image = read_image(path)
    assert image.mode == "RGB"
    assert min(image.size) > 0
    read_image(path, mode="L", paper="black", largest=1.0)


def _make_drawing(rng: random.Random, folder: Path) -> tuple[str, Path]:
    kind, text = mutated_json(rng, _drawing_text())
    return kind, write(
        folder, "drawn.png", png_with_text(rng, rng.choice(["stable_cascade"] * 9 + ["parameters"]), text)
    )


@cache
def _drawing_text() -> bytes:
    from stable_cascade.drawing.png import describe
    from stable_cascade.drawing.request import ControlChoice, Drawing, InputFile, LoraChoice

    drawing = Drawing(
        task="inpaint", prompt="a fox", guidance_interval=(0.1, 0.9), loras=(LoraChoice("a.safetensors", 0.5),),
        image_weights=(1.0, 2.0),
        image=InputFile("photo.png", "0" * 64), images=(InputFile("a.png"), InputFile("b.png")),
        outpaint=(8, 0, 8, 0), strength=0.5, shift=2.0,
        controlnets=(ControlChoice("canny.safetensors", InputFile("c.png"), 0.5),), height=64, width=128,
    )  # fmt: skip
    return json.dumps(describe(drawing, {"stable_cascade": "0.1", "device": "cpu"})).encode()


def _use_drawing(path: Path) -> None:
    """Reads it; a drawing that is read can be written and read again."""
    from stable_cascade.drawing.png import parameters, read_record
    from stable_cascade.drawing.request import Drawing

    record = read_record(path)
    assert Drawing.from_json(record.drawing.to_json()) == record.drawing
    parameters(record.drawing, record.made_with)


def _make_control(rng: random.Random, folder: Path) -> tuple[str, Path]:
    """An image of any shape, and a filter with any settings; the file holds their description."""
    filling = rng.choice(["zeros", "ones", "noise", "nan", "inf", "beyond"])
    small = rng.choice([1, 2, 5, 8, 64])
    height, width = rng.choice([(small, rng.choice(CONTROL_SIZES)), (rng.choice(CONTROL_SIZES), small), (257, 300)])
    shape = rng.choice(
        [[1, 3, height, width]] * 9 + [[1, 4, height, width], [3, height, width], [0, 3, 8, 8], [1, 3, 0, 8]]
    )
    name, params = rng.choice([*FILTERS, *FILTERS, "PidiFilter", "os:system", "", "x" * 1000]), rng.choice(PARAMS)
    kind = f"{name[:20]} {params} {shape} {filling}"
    return kind, write(folder, "control.json", json.dumps([name, params, shape, filling]).encode())


def _use_control(path: Path) -> None:
    from stable_cascade.controls import make_filter

    name, params, shape, filling = json.loads(path.read_bytes())
    values = {"zeros": 0.0, "ones": 1.0, "nan": float("nan"), "inf": float("inf"), "beyond": 7.0}
    noise = torch.rand(shape, generator=torch.Generator().manual_seed(0))
    pixels = noise if filling == "noise" else torch.full_like(noise, values[filling])
    found = make_filter(name, params)
    control = found(pixels, None)
    assert control.shape[:2] == (shape[0], found.channels)
    if filling not in ("nan", "inf"):
        assert control.isfinite().all()


SURFACES = (
    Surface("image bytes", make_image, _use_image_bytes, warm, names_file=False),
    Surface("drawing image", make_image, _use_image, warm),
    Surface("drawing record", _make_drawing, _use_drawing, _drawing_text),
    Surface("control image", _make_control, _use_control, lambda: __import__("cv2"), names_file=False),
)
