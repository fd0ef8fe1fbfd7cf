"""What evaluate.py measures, as functions of tensors, and the small image files that it reads and writes."""

import io
import tarfile
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor


def shrink(images: Tensor, side: int = 16) -> Tensor:
    """Images as `side` x `side` means of their pixels.

    Shapes: (B, 3, H, W) -> (B, 3, side, side).
    """
    return F.adaptive_avg_pool2d(images.float(), side)


def distances(a: Tensor, b: Tensor) -> Tensor:
    """Euclidean distances between all rows, flattened.

    Shapes: (N, ...), (M, ...) -> (N, M).
    """
    return torch.cdist(a.flatten(1).double(), b.flatten(1).double(), compute_mode="donot_use_mm_for_euclid_dist")


def ranks(distance: Tensor, right: Tensor) -> Tensor:
    """Place of the right candidate when sorted by distance; 0 is the nearest, ties count against it.

    Shapes: (N, M), (N,) -> (N,).
    """
    own = distance.gather(1, right[:, None])
    return (distance <= own).sum(1) - 1


def mean_nearest_distance(latents: Tensor, targets: Tensor) -> float:
    """Mean over `latents` of the distance to the nearest of `targets`."""
    return distances(latents, targets).min(1).values.mean().item()


def read_mosaic(path: Path, side: int) -> tuple[list[str], list[str], Tensor]:
    """Keys, captions and tiles of a mosaic written by prepare_data.py.

    Shapes: tiles (N, 3, side, side) in [0, 1].

    Raises:
        ValueError: the mosaic or its text file is missing.

    """
    for name in (path, path.with_suffix(".txt")):
        if not name.is_file():
            raise ValueError(f"{name} is missing; write it with prepare_data.py --committed")
    lines = path.with_suffix(".txt").read_text(encoding="utf-8").splitlines()
    keys, captions = (list(column) for column in zip(*(line.split("\t") for line in lines), strict=True))
    with Image.open(path) as mosaic:
        pixels = to_tensor(mosaic)
    tiles = pixels.unfold(1, side, side).unfold(2, side, side).permute(1, 2, 0, 3, 4).flatten(0, 1)
    return keys, captions, tiles[: len(keys)].contiguous()


def to_tensor(image: Image.Image) -> Tensor:
    """An image as (3, H, W) in [0, 1]."""
    return torch.from_numpy(np.asarray(image.convert("RGB"), dtype=np.float32) / 255).permute(2, 0, 1)


def write_sheet(path: Path, blocks: list[list[Tensor]], columns: int, side: int = 64) -> None:
    """Writes blocks of images side by side, `columns` blocks a row, with a gap between blocks."""
    gap, width = 8, max(len(block) for block in blocks)
    rows = -(-len(blocks) // columns)
    sheet = Image.new("RGB", (columns * (width * side + gap), rows * (side + gap)), (90, 90, 90))
    for place, block in enumerate(blocks):
        for column, image in enumerate(block):
            data = (image.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
            left = (place % columns) * (width * side + gap) + column * side
            sheet.paste(Image.fromarray(data).resize((side, side)), (left, (place // columns) * (side + gap)))
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)


def read_shard(path: Path, side: int) -> list[tuple[str, str, Tensor]]:
    """(key, caption, (3, side, side) image) of every sample of a shard, in its order.

    Raises:
        ValueError: the shard is missing.

    """
    if not path.is_file():
        raise ValueError(f"{path} is missing; write it with examples/embedded/prepare_data.py")
    with tarfile.open(path) as tar:
        parts = {member.name: tar.extractfile(member).read() for member in tar if member.isfile()}
    samples = []
    for name, data in parts.items():
        key, _, ending = name.partition(".")
        if ending == "png":
            with Image.open(io.BytesIO(data)) as opened:
                image = to_tensor(opened.convert("RGB").resize((side, side), Image.Resampling.BICUBIC))
            samples.append((key, parts[f"{key}.txt"].decode(), image))
    return samples
