"""A LoRA, a ControlNet and images for the embedded cascade, made in milliseconds."""

from __future__ import annotations

import json
import struct
import zlib
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_file

from stable_cascade import StableCascadeControlNet

WIDTH = 128
"""Of the embedded prior."""


def checkered(width: int = 64, height: int = 64, shift: int = 0) -> Image.Image:
    """An image whose every pixel is its place."""
    rows, columns = np.mgrid[:height, :width]
    levels = np.stack([columns * 255 // width, rows * 255 // height, (columns + rows + shift) * 4 % 256], axis=-1)
    return Image.fromarray(levels.astype(np.uint8))


def saved(folder: Path, name: str = "photo.png", **settings: int) -> str:
    """The path of an image file."""
    path = folder / name
    checkered(**settings).save(path)
    return str(path)


def png_of_size(width: int, height: int) -> bytes:
    """A PNG of a few bytes that claims to be this large."""
    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunks = [(b"IHDR", head), (b"IDAT", zlib.compress(b"\0" * 100)), (b"IEND", b"")]
    packed = [(kind + data, struct.pack(">I", len(data))) for kind, data in chunks]
    parts = [length + body + struct.pack(">I", zlib.crc32(body)) for body, length in packed]
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def half_mask(folder: Path, size: tuple[int, int] = (64, 64)) -> str:
    """A mask that is white at the right."""
    mask = Image.new("L", size)
    mask.paste(255, (size[0] // 2, 0, *size))
    mask.save(folder / "mask.png")
    return str(folder / "mask.png")


def make_lora(path: Path, seed: int = 0, *, width: int = WIDTH, layers: tuple[str, ...] = ("to_q", "to_v")) -> str:
    """A LoRA for a prior of this width, in PEFT's layout, that changes what is drawn."""
    generator, tensors = torch.Generator().manual_seed(seed), {}
    for layer in layers:
        name = f"prior.down_blocks.0.2.attention.{layer}"
        tensors[f"{name}.lora_A.weight"] = torch.randn(2, width, generator=generator)
        tensors[f"{name}.lora_B.weight"] = torch.randn(width, 2, generator=generator)
    save_file(tensors, path)
    return str(path)


def make_controlnet(folder: Path, channels: int = 1, seed: int = 0, **description: object) -> str:
    """A ControlNet of the embedded prior as the trainer exports it, with random weights."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        network = StableCascadeControlNet(channels, WIDTH, [0, 5], "simple")
        for parameter in network.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
    network.save_pretrained(folder / "controlnet")
    known = {"filter": "CannyFilter", "filter_params": {}, **description}
    (folder / "controlnet" / "controlnet.json").write_text(json.dumps(known))
    return str(folder)


def same(one: Image.Image, two: Image.Image) -> bool:
    """Whether two images are the same, bit by bit."""
    return one.size == two.size and np.array_equal(np.asarray(one), np.asarray(two))


def distance(one: Image.Image, two: Image.Image) -> float:
    """Mean difference of two images, in levels."""
    return float(np.abs(np.asarray(one, np.float64) - np.asarray(two, np.float64)).mean())
