"""File formats: what a file is, and the names of its weights as each tool has them and as ours has them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from stable_cascade.lazy import lazy_exports

if TYPE_CHECKING:
    from .detection import Description, LoraFacts
    from .headers import read_header
    from .places import describe
    from .weight_names import KEY_MAPS, from_original, merge_checkpoint, split_checkpoint, to_original

__all__ = [
    "KEY_MAPS",
    "Description",
    "LoraFacts",
    "describe",
    "from_original",
    "merge_checkpoint",
    "read_header",
    "split_checkpoint",
    "to_original",
]

__getattr__, __dir__ = lazy_exports(globals())
