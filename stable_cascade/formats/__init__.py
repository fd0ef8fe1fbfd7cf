"""File formats: what a file is, and the names of its weights as each tool has them and as ours has them."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

_EXPORTS = {
    "KEY_MAPS": "networks",
    "Description": "descriptions",
    "LoraFacts": "descriptions",
    "describe": "detection",
    "from_original": "networks",
    "merge_checkpoint": "checkpoints",
    "read_header": "headers",
    "split_checkpoint": "checkpoints",
    "to_original": "networks",
}

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

if TYPE_CHECKING:
    from .checkpoints import merge_checkpoint, split_checkpoint
    from .descriptions import Description, LoraFacts
    from .detection import describe
    from .headers import read_header
    from .networks import KEY_MAPS, from_original, to_original


def __getattr__(name: str) -> Any:
    """The public name `name`, imported on first use."""
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_EXPORTS[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
