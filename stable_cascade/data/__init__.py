"""Images and captions, from shards or Hugging Face datasets to batches that are a function of (seed, position)."""

from __future__ import annotations

from typing import TYPE_CHECKING

from stable_cascade.lazy import lazy_exports

if TYPE_CHECKING:
    from .batches import Batch, PlannedCrop, crop_batches, planned_crops, training_batches
    from .index import index_samples
    from .plan import Buckets, Plan, make_buckets
    from .prepare import prepare_shards
    from .samples import SampleIndex
    from .sets import ImageSet, joined, with_regularization
    from .stream import SampleStream

__all__ = [
    "Batch",
    "Buckets",
    "ImageSet",
    "Plan",
    "PlannedCrop",
    "SampleIndex",
    "SampleStream",
    "crop_batches",
    "index_samples",
    "joined",
    "make_buckets",
    "planned_crops",
    "prepare_shards",
    "training_batches",
    "with_regularization",
]

__getattr__, __dir__ = lazy_exports(globals())
