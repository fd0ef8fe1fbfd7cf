"""Which columns of a Hugging Face dataset hold image, caption and mask, and how a row's are read."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from stable_cascade import bounds
from stable_cascade.disk import read_file


@dataclass(frozen=True)
class HubColumns:
    """The columns' names; `mask` is None where masks are not asked for."""

    image: str
    caption: str
    allow_missing_captions: bool = False
    mask: str | None = None

    def image_file(self, row: Mapping[str, Any]) -> bytes:
        """The image file in a row.

        Raises:
            ValueError: the row has none.
        """
        found = _file(row[self.image])
        if found is None:
            raise ValueError(f"the column {self.image!r} holds no image")
        return found

    def mask_file(self, row: Mapping[str, Any]) -> bytes | None:
        """The mask in a row; None when there is none, or masks are not asked for."""
        return None if self.mask is None else _file(row.get(self.mask))

    def text(self, row: Mapping[str, Any]) -> str | None:
        """The caption in a row, the first one of a list; None when there is none."""
        value = row.get(self.caption)
        if isinstance(value, Sequence) and not isinstance(value, str):
            value = value[0] if value else None
        return value.strip() if isinstance(value, str) else None


def _file(value: Any) -> bytes | None:
    """The bytes of an image, given as such, as a path, or as the pair of both that `datasets` stores."""
    if isinstance(value, Mapping):
        if value.get("bytes"):
            return value["bytes"]
        value = value.get("path")
    if isinstance(value, bytes):
        return value
    if isinstance(value, str) and os.path.isfile(value):
        return read_file(value, at_most=bounds.IMAGE_FILE, what="image")
    return None
