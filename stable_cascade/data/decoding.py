"""One sample from its file to a crop of its bucket's size, and what is done about files that cannot be decoded."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .draws import draws, mixed, sample_seeds, uniforms
from .images import covering_size, decode_mask, decode_stored, resize_to

log = logging.getLogger(__name__)

_FIRST_JUDGED = 100


@dataclass(frozen=True)
class Candidate:
    """A sample that may be shown: its name, its content's hash, and how its files are read."""

    key: str
    content_hash: int
    read: Callable[[], tuple[bytes, str]]
    mask: Callable[[], bytes | None] = lambda: None


@dataclass(frozen=True)
class Place:
    """Where a sample is shown: a position of the sequence, and the bucket's size."""

    position: int
    size: tuple[int, int]
    weight: float = 1.0


@dataclass(frozen=True)
class Decoded:
    """One row of a batch, its pixels as stored, and the keys of the broken samples it stands in for."""

    pixels: Tensor | None
    caption: str
    key: str
    seed: int
    position: int
    broken_keys: tuple[str, ...] = ()
    mask: Tensor | None = None
    weight: float = 1.0
    identity: str = ""


@dataclass(frozen=True)
class Undecodable:
    """Why no sample could be found for a position. A value, since errors raised in a worker arrive as tracebacks."""

    reason: str


def identity_of(key: str, content_hash: int, size: tuple[int, int], crop: str) -> str:
    """The name of what a row shows: the sample, its content, the bucket's size and the crop."""
    return f"{key} {content_hash:016x} {size[0]}x{size[1]} {crop}"


@dataclass(frozen=True)
class Decoder:
    """Turns candidates into rows. `masks` asks for masks, `known_broken` are keys that are not even tried."""

    choice: CropChoice
    masks: bool = False
    known_broken: Collection[str] = ()

    def first_decodable(self, candidates: Iterable[Candidate], place: Place) -> Decoded | Undecodable:
        """The first of the candidates that is not broken, fitted to the bucket."""
        broken: list[str] = []
        where = np.array([place.position])
        seed = int(sample_seeds(self.choice.seed, where)[0])
        for candidate in candidates:
            key = candidate.key
            # Pass over what is known to be broken, without a try.
            if key in self.known_broken:
                broken.append(f"{key}: known to be broken")
                continue
            # Decode and crop; whatever is wrong with a file makes it broken.
            hashes = np.array([candidate.content_hash], np.uint64)
            crop_seed = int(self.choice.seeds(where, hashes, place.size)[0])
            try:
                data, caption = candidate.read()
                mask = candidate.mask() if self.masks else None
                pixels, place_of_mask = fit_stored(data, place.size, self.choice.crop, crop_seed)
                mask_pixels = _fit_mask(mask, place.size, *place_of_mask) if self.masks else None
            except (ValueError, OSError) as error:
                broken.append(f"{key}: {error}")
                continue
            identity = identity_of(key, candidate.content_hash, place.size, self.choice.names(where)[0])
            return Decoded(
                pixels, caption, key, seed, place.position, tuple(broken), mask_pixels, place.weight, identity
            )
        return Undecodable(f"{len(broken)} samples in a row are broken, the last is {broken[-1]}; check the data")


Fitting = tuple[tuple[int, int], tuple[int, int]]
"""The (height, width) that covers a bucket, and the (row, column) in it where the bucket is cut out."""


def fit_stored(data: bytes, size: tuple[int, int], crop: str, seed: int) -> tuple[Tensor, Fitting]:
    """An image file, decoded, resized and cropped to a bucket, as stored; and how, for its mask.

    Bytes stay bytes: a batch becomes floats in one pass, and on its way to the device it is a quarter as large.

    Shapes: -> (3, *size) uint8, or float32 in [0, 1] where the file has transparency or more bits.

    Raises:
        ValueError: it cannot be decoded.
    """
    pixels = decode_stored(data, at_least=size)
    cover = covering_size(pixels.shape[1], pixels.shape[2], size)
    resized = resize_to(pixels, cover)
    place = crop_place(resized, size, crop, seed)
    return window(resized, size, place).contiguous(), (cover, place)


def _fit_mask(mask: bytes | None, size: tuple[int, int], cover: tuple[int, int], place: tuple[int, int]) -> Tensor:
    """A mask cut out where its image was; without a mask all ones. Shapes: -> (1, *size) float32 in [0, 1]."""
    if mask is None:
        return torch.ones(1, *size)
    return window(resize_to(decode_mask(mask), cover), size, place).contiguous()


class BrokenWatch:
    """Counts broken samples, logs each one once, and stops a training that would run on few of its images."""

    def __init__(self, max_broken_share: float, what: str = "samples"):
        self.max_broken_share, self.what = max_broken_share, what
        self.seen = 0
        self.broken = 0
        self._logged: set[str] = set()

    def see(self, count: int, broken_keys: Sequence[str]) -> None:
        """Adds a micro-batch of `count` samples.

        Raises:
            ValueError: more than max_broken_share of what was seen is broken; the first 100 are judged together.
        """
        self.seen += count
        self.broken += len(broken_keys)
        for key in broken_keys:
            if key not in self._logged:
                self._logged.add(key)
                log.warning("broken %s: %s", "sample replaced" if self.what == "samples" else self.what, key)
        if self.broken > self.max_broken_share * max(self.seen, _FIRST_JUDGED):
            raise ValueError(
                f"{self.broken:,} broken {self.what} among {self.seen:,} are more than max_broken_share "
                f"{self.max_broken_share}, the last is {broken_keys[-1] if broken_keys else ''}; check the shards"
            )


CROPS = ("random", "center", "smart")

SMART_SHARE = 0.3
"""How often the smart crop takes a random good place instead of the best one (the original's randomise_p)."""

SMART_TOP = 0.2
"""Which share of the places counts as good then (the original's randomise_q)."""


def check_crop(crop: str) -> None:
    """Passes for a known kind of crop.

    Raises:
        ValueError: it is unknown.
    """
    if crop not in CROPS:
        raise ValueError(f"crop {crop!r} is none of {', '.join(CROPS)}")


@dataclass(frozen=True)
class CropChoice:
    """Which crop of an image a position shows.

    `per_image` None takes a fresh one at every position. Otherwise an image has that many of each bucket size (one,
    unless `crop` is random), each a function of (seed, the image's content, size, crop number), and the position
    draws the number. The only crop of center or smart does not depend on the seed.
    """

    crop: str
    seed: int
    per_image: int | None = None

    def __post_init__(self) -> None:
        check_crop(self.crop)
        if self.per_image is not None and self.per_image < 1:
            raise ValueError(f"crops_per_image {self.per_image} must be at least 1; leave it out for fresh crops")

    @property
    def fresh(self) -> bool:
        """Whether every position has a crop of its own."""
        return self.crop != "center" and self.per_image is None

    def numbers(self, positions: np.ndarray) -> np.ndarray:
        """The crop number of each position.

        Shapes: (N,) -> (N,) int64.
        """
        if self.crop != "random" or self.per_image is None:
            return np.zeros(len(positions), np.int64)
        return (draws(self.seed, "crop number", positions) % np.uint64(self.per_image)).astype(np.int64)

    def seeds(self, positions: np.ndarray, content_hashes: np.ndarray, size: tuple[int, int]) -> np.ndarray:
        """What decides the place of each position's crop, for `crop_place`.

        Shapes: (N,), (N,) uint64 -> (N,) int64.
        """
        if self.per_image is None:
            return sample_seeds(self.seed, positions)
        with np.errstate(over="ignore"):
            which = mixed(content_hashes) + self.numbers(positions).astype(np.uint64)
        seed = self.seed if self.crop == "random" else 0
        return (draws(seed, f"crop {size[0]}x{size[1]}", which) >> np.uint64(1)).astype(np.int64)

    def names(self, positions: np.ndarray) -> list[str]:
        """The crops' part of an identity: equal where image, size and this are enough to get the same crop."""
        if self.crop == "center" or (self.crop == "smart" and self.per_image is not None):
            return [self.crop] * len(positions)
        if self.per_image is None:
            return [f"{self.crop} fresh {seed:x}" for seed in sample_seeds(self.seed, positions).tolist()]
        return [f"random {number} of seed {self.seed}" for number in self.numbers(positions).tolist()]


def window(pixels: Tensor, size: tuple[int, int], place: tuple[int, int]) -> Tensor:
    """The `size` window whose upper left corner is at `place` (row, column).

    Shapes: (C, H, W) -> (C, size[0], size[1]).
    """
    top, left = place
    return pixels[:, top : top + size[0], left : left + size[1]]


def crop_place(pixels: Tensor, size: tuple[int, int], crop: str, seed: int) -> tuple[int, int]:
    """Row and column of the window's upper left corner.

    Shapes: (3, H, W).
    """
    free = (pixels.shape[1] - size[0], pixels.shape[2] - size[1])
    if free == (0, 0):
        return 0, 0
    if crop == "center":
        return round(free[0] / 2), round(free[1] / 2)
    first, second = uniforms(seed, "crop", np.arange(2))
    if crop == "random":
        return int(first * (free[0] + 1)), int(second * (free[1] + 1))
    energy = _window_energy(pixels, size)
    if first >= SMART_SHARE:
        best = int(energy.argmax())
    else:
        good = energy.flatten().argsort(descending=True, stable=True)[: max(1, int(SMART_TOP * energy.numel()))]
        best = int(good[int(second * len(good))])
    return divmod(best, energy.shape[1])


def _window_energy(pixels: Tensor, size: tuple[int, int]) -> Tensor:
    """The gradient energy inside the window at every place it fits.

    Edges stand in for the saliency network of the original, which is not published: textured parts win, and a calm
    subject before a busy background loses.

    Shapes: (3, H, W) -> (H - size[0] + 1, W - size[1] + 1) float64.
    """
    grey = pixels.mean(0, dtype=torch.float64)
    edges = torch.zeros_like(grey)
    edges[1:] += (grey[1:] - grey[:-1]).abs()
    edges[:, 1:] += (grey[:, 1:] - grey[:, :-1]).abs()
    sums = torch.zeros(grey.shape[0] + 1, grey.shape[1] + 1, dtype=torch.float64)
    sums[1:, 1:] = edges.cumsum(0).cumsum(1)
    height, width = size
    return sums[height:, width:] - sums[:-height, width:] - sums[height:, :-width] + sums[:-height, :-width]
