"""Pictures and captions, from shards or Hugging Face datasets to batches that are a function of (seed, position)."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .batches import Batch, training_batches
    from .buckets import Buckets, make_buckets
    from .index import SampleIndex, index_samples
    from .prepare import prepare_shards
    from .stream import SampleStream

_PLACES = {
    "Batch": "batches",
    "Buckets": "buckets",
    "SampleIndex": "index",
    "SampleStream": "stream",
    "index_samples": "index",
    "make_buckets": "buckets",
    "prepare_shards": "prepare",
    "training_batches": "batches",
}

__all__ = [
    "Batch",
    "Buckets",
    "SampleIndex",
    "SampleStream",
    "index_samples",
    "make_buckets",
    "prepare_shards",
    "training_batches",
]


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_PLACES[name]}", __name__), name)
