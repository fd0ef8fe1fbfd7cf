"""Pictures on request: what the commands and the page share, from settings to a PNG that can be drawn again."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

_PLACES = {
    "ControlChoice": "request",
    "Drawing": "request",
    "Drawn": "session",
    "InputFile": "request",
    "LoraChoice": "request",
    "Pictures": "inputs",
    "Session": "session",
    "read_drawing": "metadata",
    "read_picture": "pictures",
    "read_record": "metadata",
    "save_picture": "metadata",
}

__all__ = [
    "ControlChoice",
    "Drawing",
    "Drawn",
    "InputFile",
    "LoraChoice",
    "Pictures",
    "Session",
    "read_drawing",
    "read_picture",
    "read_record",
    "save_picture",
]

if TYPE_CHECKING:
    from .inputs import Pictures
    from .metadata import read_drawing, read_record, save_picture
    from .pictures import read_picture
    from .request import ControlChoice, Drawing, InputFile, LoraChoice
    from .session import Drawn, Session


def __getattr__(name: str) -> Any:
    if name not in _PLACES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f".{_PLACES[name]}", __name__), name)
