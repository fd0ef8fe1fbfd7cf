"""Random numbers as pure functions of (seed, stream, position): equal on every machine, library version and worker."""

from __future__ import annotations

import functools
import hashlib

import numpy as np

_STEP = np.uint64(0x9E3779B97F4A7C15)
_FIRST = np.uint64(0xBF58476D1CE4E5B9)
_SECOND = np.uint64(0x94D049BB133111EB)


def draws(seed: int, stream: str, positions: np.ndarray) -> np.ndarray:
    """One independent uint64 for every position; `stream` names the purpose.

    Shapes: (N,) integers -> (N,) uint64.

    Source: SplitMix64 (Steele, Lea, Flood 2014), counter-based, with a key hashed from seed and stream.
    """
    with np.errstate(over="ignore"):
        return mixed((np.asarray(positions).astype(np.uint64) + np.uint64(1)) * _STEP + _key(seed, stream))


@functools.lru_cache(maxsize=256)
def _key(seed: int, stream: str) -> np.uint64:
    return np.uint64(int.from_bytes(hashlib.blake2b(f"{seed}/{stream}".encode(), digest_size=8).digest(), "little"))


def mixed(z: np.ndarray) -> np.ndarray:
    """SplitMix64's output function: every input bit changes half of the output bits.

    Shapes: (N,) uint64 -> (N,) uint64.
    """
    with np.errstate(over="ignore"):
        z = (z ^ (z >> np.uint64(30))) * _FIRST
        z = (z ^ (z >> np.uint64(27))) * _SECOND
        return z ^ (z >> np.uint64(31))


def uniforms(seed: int, stream: str, positions: np.ndarray) -> np.ndarray:
    """One float64 in [0, 1) for every position."""
    return (draws(seed, stream, positions) >> np.uint64(11)).astype(np.float64) * 2.0**-53


def sample_seeds(seed: int, positions: np.ndarray) -> np.ndarray:
    """The non-negative int64 seed of each global sample position."""
    return (draws(seed, "sample", positions) >> np.uint64(1)).astype(np.int64)


def permutation(seed: int, epoch: int, count: int, stream: str = "epoch") -> np.ndarray:
    """The order of `count` samples in one epoch.

    A stable sort of hashed indices rather than a library shuffle, whose stream may change between versions.
    """
    return np.argsort(draws(seed, f"{stream} {epoch}", np.arange(count)), kind="stable")
