"""Pictures on request: what the commands and the page share, from settings to a PNG that can be drawn again."""

from __future__ import annotations

from typing import TYPE_CHECKING

from stable_cascade.lazy import lazy_exports

if TYPE_CHECKING:
    from .inputs import Pictures
    from .metadata import read_drawing, read_record, save_picture
    from .pictures import read_picture
    from .request import ControlChoice, Drawing, InputFile, LoraChoice
    from .session import Drawn, Session

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

__getattr__, __dir__ = lazy_exports(globals())
