"""The row of images per second on one core: 2048 px JPEGs to batches of 768 px buckets."""

from __future__ import annotations

import io
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

from .measure import Row, in_turns
from .scale import Scale

IMAGES = 24
SIZES = [(2048, 2048), (2048, 1536), (1536, 2048)]
SIDE = 768
ASPECTS = ["1/1", "3/4"]


def rows(scale: Scale) -> Iterator[Row]:
    """Ours and webdataset with Pillow, in one process, on one thread."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with tempfile.TemporaryDirectory() as folder:
            shard = write_shard(Path(folder) / "images.tar")
            ours, peer = our_batches(shard), peer_images(shard)
            yield in_turns(
                f"data, 2048 px JPEG to {SIDE} px", lambda: take(ours, IMAGES), lambda: take(peer, IMAGES),
                peer_name="webdataset, Pillow decode, resize, crop", rounds=max(2, scale.rounds - 2),
                amount=IMAGES, unit="images/s",
            )  # fmt: skip
    finally:
        torch.set_num_threads(threads)


def take(images: Iterator[int], count: int) -> None:
    """Reads on until `count` images have come."""
    seen = 0
    while seen < count:
        seen += next(images)


def write_shard(path: Path) -> Path:
    """Images with detail at every scale, as photographs have it: a flat image would decode too fast."""
    rng = np.random.default_rng(0)
    with tarfile.open(path, "w") as tar:
        for number in range(IMAGES):
            width, height = SIZES[number % len(SIZES)]
            _add(tar, f"{number:04}.jpg", photograph(rng, width, height))
            _add(tar, f"{number:04}.txt", b"an image")
    return path


def photograph(rng: np.random.Generator, width: int, height: int) -> bytes:
    """A JPEG of noise with as much in every octave, the spectrum of photographs: about 1 MB at 2048 x 2048."""
    image = np.zeros((height, width, 3), np.float32)
    for octave in range(2, 11):
        side = 2**octave
        noise = Image.fromarray(rng.integers(0, 256, (side, side, 3), dtype=np.uint8))
        image += np.asarray(noise.resize((width, height), Image.Resampling.BILINEAR), np.float32)
    image = 255 * (image - image.min()) / np.ptp(image)
    file = io.BytesIO()
    Image.fromarray(image.astype(np.uint8)).save(file, "JPEG", quality=85)
    return file.getvalue()


def our_batches(shard: Path) -> Iterator[int]:
    """The number of images of each batch of the library's stream, whose pixels stay bytes as for a GPU."""
    from stable_cascade.data import Plan, index_samples, training_batches

    index = index_samples(str(shard), cache_dir=str(shard.parent / "index"))
    stream = training_batches(index, Plan(image_size=SIDE, batch_size=4, multi_aspect_ratio=ASPECTS), as_stored=True)
    return (len(batch.keys) for batch in stream)


def peer_images(shard: Path) -> Iterator[int]:
    """One per image of webdataset, decoded, resized to cover its bucket and cropped with Pillow, batched by four."""
    import webdataset

    def fit(image: Image.Image) -> torch.Tensor:
        ratio = image.width / image.height
        width, height = min(((768, 768), (672, 896), (896, 672)), key=lambda size: abs(size[0] / size[1] - ratio))
        scale = max(width / image.width, height / image.height)
        covering = (max(width, round(image.width * scale)), max(height, round(image.height * scale)))
        image = image.resize(covering, Image.Resampling.BILINEAR)  # the filter that ours has
        left, top = (covering[0] - width) // 2, (covering[1] - height) // 2
        pixels = np.asarray(image.crop((left, top, left + width, top + height)), np.float32) / 255
        return torch.from_numpy(pixels).permute(2, 0, 1).contiguous()

    stream: Any = webdataset.WebDataset(str(shard), shardshuffle=False, empty_check=False)
    stream = stream.decode("pil").to_tuple("jpg", "txt").repeat()

    def images() -> Iterator[int]:
        waiting: dict[tuple[int, ...], list[torch.Tensor]] = {}
        for image, _ in stream:
            pixels = fit(image)
            together = waiting.setdefault(tuple(pixels.shape), [])
            together.append(pixels)
            if len(together) == 4:
                torch.stack(waiting.pop(tuple(pixels.shape)))
            yield 1

    return images()


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(content)
    tar.addfile(info, io.BytesIO(content))
