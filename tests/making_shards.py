"""Small tars and images for the data tests."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import numpy as np
from PIL import Image

from stable_cascade.data import Plan, planned_crops, training_batches
from stable_cascade.data.decoding import crop_place, window


def image(width: int = 40, height: int = 30, seed: int = 0, kind: str = "PNG", **options) -> bytes:
    """An image file of smooth colours that differ with the seed."""
    rng = np.random.default_rng(seed)
    corners = Image.fromarray(rng.integers(0, 256, (3, 3, 3), dtype=np.uint8))
    return encoded(corners.resize((width, height), Image.Resampling.BILINEAR), kind, **options)


def encoded(image: Image.Image, kind: str = "PNG", **options) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def undecodable(width: int = 40, height: int = 30, seed: int = 0) -> bytes:
    """An image whose header is fine and whose pixels are cut off."""
    noise = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return encoded(Image.fromarray(noise))[:200]


def write_tar(path: Path, members: dict[str, bytes | str | dict]) -> Path:
    """A tar of these members; a dict is written as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, content in members.items():
            if isinstance(content, dict):
                content = json.dumps(content)
            data = content.encode() if isinstance(content, str) else content
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def write_shard(path: Path, count: int, *, start: int = 0, sizes=((40, 30), (30, 40), (36, 36))) -> Path:
    """A shard of `count` images of several shapes with captions and scores."""
    members: dict[str, bytes | str | dict] = {}
    for i in range(start, start + count):
        width, height = sizes[i % len(sizes)]
        members[f"{i:04}.png"] = image(width, height, seed=i)
        members[f"{i:04}.txt"] = f"caption {i}\n"
        members[f"{i:04}.json"] = {"score": i, "caption": f"json {i}"}
    return write_tar(path, members)


def batches_of(samples, **settings):
    """`training_batches`, the fields of its plan and its other arguments in one."""
    plan = {name: settings.pop(name) for name in list(settings) if name in Plan.__dataclass_fields__}
    return training_batches(samples, Plan(**plan), **settings)


def crops_of(samples, steps, **settings):
    """`planned_crops`, the fields of its plan as keywords."""
    return planned_crops(samples, Plan(**settings), steps)


def crop_to(pixels, size, crop, seed):
    """The crop that a training takes of decoded pixels."""
    return window(pixels, size, crop_place(pixels, size, crop, seed))
