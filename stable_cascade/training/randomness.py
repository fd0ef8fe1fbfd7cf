"""Seeds of the networks' own randomness (dropout), so that a step can be repeated."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from contextlib import contextmanager

import torch


def step_seed(*parts: int) -> int:
    """A 63-bit number that depends on all parts and their order."""
    digest = hashlib.blake2b(",".join(map(str, parts)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


@contextmanager
def seeded(device: torch.device, *parts: int) -> Iterator[None]:
    """Torch's generators seeded from `parts` inside the `with` block, and as they were after it.

    Dropout has no generator argument; this is the one place where the package touches the global generators.
    """
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(step_seed(*parts))
        yield
