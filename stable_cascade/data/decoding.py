"""From image files to the rows of a batch; a broken sample is replaced, counted and named."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .buckets import covering_size
from .crops import CropChoice, crop_place, window
from .draws import sample_seeds
from .images import decode_mask, decode_stored, in_unit_range, resize_to

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
            if key in self.known_broken:
                broken.append(f"{key}: known to be broken")
                continue
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


def fit_image(data: bytes, size: tuple[int, int], crop: str, seed: int) -> Tensor:
    """An image file, decoded, resized and cropped to a bucket.

    Shapes: -> (3, *size) float32 in [0, 1].

    Raises:
        ValueError: it cannot be decoded.
    """
    return in_unit_range(fit_stored(data, size, crop, seed)[0])


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

    def __init__(self, max_broken_share: float):
        self.max_broken_share = max_broken_share
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
                log.warning("broken sample replaced: %s", key)
        if self.broken > self.max_broken_share * max(self.seen, _FIRST_JUDGED):
            raise ValueError(
                f"{self.broken:,} broken samples among {self.seen:,} are more than max_broken_share "
                f"{self.max_broken_share}, the last is {broken_keys[-1] if broken_keys else ''}; check the shards"
            )
