"""The images that were drawn while the page runs: PNG files that carry their settings, and how to get those back."""

from __future__ import annotations

import re
import secrets
import threading
from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from stable_cascade.drawing import Drawing, Drawn, save_image
from stable_cascade.drawing.metadata import slug

from .form import Form

MOST_SHOWN = 48
MOST_KEPT = 2000
_NAME = re.compile(r"[\w-]{1,60}-[0-9a-f]{16}\.png")
_IMAGES = ("image", "reference_1", "reference_2", "reference_3", "control_image", "reconstructed")


@dataclass(frozen=True)
class Entry:
    """A drawn image, and the widgets' values that it was asked for with, its own seed among them."""

    path: Path
    drawing: Drawing
    form: Form


class History:
    """The drawn images by name.

    A name cannot be guessed, so that whoever has it is who drew the image: that is how several people at one page
    see only their own.

    Args:
        folder: where the files go.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._entries: OrderedDict[str, Entry] = OrderedDict()
        self._lock = threading.Lock()
        folder.mkdir(parents=True, exist_ok=True)

    def keep(self, drawn: Drawn, form: Form) -> str:
        """The name of the new file; the oldest one goes when there are too many."""
        words = slug(drawn.drawing.prompt, 32) or drawn.drawing.task
        name = f"{words}-{drawn.drawing.seed}-{secrets.token_hex(8)}.png"
        path = save_image(drawn, self.folder / name)
        kept = replace(form, seed=drawn.drawing.seed, new_seed=False, count=1)
        with self._lock:
            self._entries[name] = Entry(path, drawn.drawing, kept)
            while len(self._entries) > MOST_KEPT:
                _, oldest = self._entries.popitem(last=False)
                oldest.path.unlink(missing_ok=True)
        return name

    def entries(self, names: Any) -> list[Entry]:
        """Those of the named images that are still there, in this order; what a browser made up is passed over."""
        return [entry for entry in map(self._entry, known_names(names)) if entry is not None]

    def entry(self, name: str) -> Entry:
        """The named image.

        Raises:
            ValueError: there is none, or no longer.
        """
        found = self._entry(name)
        if found is None:
            raise ValueError("this image is no longer there; the page keeps images while it runs")
        return found

    def _entry(self, name: str) -> Entry | None:
        entry = self._entries.get(name)
        return entry if entry is not None and entry.path.is_file() else None


def with_newest(names: Any, newest: Iterable[str]) -> list[str]:
    """The names with the newest first, as many as are shown."""
    return [*reversed(list(newest)), *known_names(names)][:MOST_SHOWN]


def known_names(names: Any) -> list[str]:
    """Those of the names that could be ours."""
    given = names if isinstance(names, list) else []
    return [name for name in given[:MOST_SHOWN] if isinstance(name, str) and _NAME.fullmatch(name)]


def values_of(entry: Entry) -> tuple[dict[str, Any], list[str]]:
    """The widgets' values of an entry, its images among them, and which of those are no longer there."""
    values = {field.name: getattr(entry.form, field.name) for field in fields(Form)}
    lost = [name for name in _IMAGES if values[name] and not Path(values[name]).is_file()]
    values |= dict.fromkeys(lost)
    edited = values["edited"] or {}
    files = [path for path in (edited.get("background"), *(edited.get("layers") or ())) if path]
    if not all(Path(path).is_file() for path in files):
        values["edited"] = None
        lost.append("edited")
    return values, ["its input image is no longer there; upload it again"] if lost else []
