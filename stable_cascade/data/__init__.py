"""Pictures and captions, from shards or Hugging Face datasets to batches that are a function of (seed, position)."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .batches import Batch, training_batches
    from .buckets import Buckets, make_buckets
    from .index import index_samples
    from .planned import PlannedCrop, crop_batches, planned_crops
    from .prepare import prepare_shards
    from .regularization import with_regularization
    from .samples import SampleIndex
    from .stream import SampleStream

_PLACES = {
    "Batch": "batches",
    "Buckets": "buckets",
    "PlannedCrop": "planned",
    "SampleIndex": "samples",
    "SampleStream": "stream",
    "crop_batches": "planned",
    "index_samples": "index",
    "make_buckets": "buckets",
    "planned_crops": "planned",
    "prepare_shards": "prepare",
    "training_batches": "batches",
    "with_regularization": "regularization",
}

__all__ = [
    "Batch",
    "Buckets",
    "PlannedCrop",
    "SampleIndex",
    "SampleStream",
    "crop_batches",
    "index_samples",
    "make_buckets",
    "planned_crops",
    "prepare_shards",
    "training_batches",
    "with_regularization",
]


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_PLACES[name]}", __name__), name)
