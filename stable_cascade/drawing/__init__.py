"""Images on request: what the commands and the page share, from settings to a PNG that can be drawn again."""

from __future__ import annotations

from typing import TYPE_CHECKING

from stable_cascade.lazy import lazy_exports

if TYPE_CHECKING:
    from .files import read_image
    from .inputs import InputImages
    from .png import read_drawing, read_record, save_image
    from .request import ControlChoice, Drawing, InputFile, LoraChoice
    from .session import Drawn, Session

__all__ = [
    "ControlChoice",
    "Drawing",
    "Drawn",
    "InputFile",
    "InputImages",
    "LoraChoice",
    "Session",
    "read_drawing",
    "read_image",
    "read_record",
    "save_image",
]

__getattr__, __dir__ = lazy_exports(globals())
