"""Where a caption comes from: the .txt member, a JSON key, or a safe expression over the JSON object."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from .expressions import Expression

_KEY = "captions_getter"
_FORMS = (
    "allowed: 'txt', a JSON key, 'lambda j: …', or a pair such as ['txt', 'identity'] or "
    "['json', \"lambda j: j['caption']\"]"
)


@dataclass(frozen=True)
class CaptionSource:
    """Which member holds the caption (`txt` or `json`) and what is done with its content."""

    member: str
    expression: Expression

    @property
    def name(self) -> str:
        """What identifies this source in the cached index."""
        return f"{self.member}:{self.expression.text}"

    def from_bytes(self, data: bytes) -> str:
        """The caption in a member's content.

        Raises:
            ValueError: the content has none.
        """
        content = json.loads(data) if self.member == "json" else data.decode("utf-8", errors="replace").strip()
        return self.from_content(content)

    def from_content(self, content: Any) -> str:
        """The caption in the decoded content (text, or a JSON object).

        Raises:
            ValueError: the content has none.
        """
        try:
            caption = self.expression(content)
        except (TypeError, KeyError, IndexError, ValueError, ZeroDivisionError, OverflowError) as error:
            raise ValueError(f"{_KEY} {self.expression.text!r}: {type(error).__name__}: {error}") from None
        if not isinstance(caption, str):
            raise ValueError(f"{_KEY} {self.expression.text!r} gives {type(caption).__name__}, not a text")
        return caption.strip()


def caption_source(captions_getter: str | Sequence[str] | None) -> CaptionSource:
    """The source that `captions_getter` names.

    Raises:
        ValueError: it has none of the allowed forms.
    """
    if captions_getter is None or captions_getter == "txt":
        return CaptionSource("txt", Expression("identity", _KEY))
    if isinstance(captions_getter, str):
        text = captions_getter.strip()
        if text.startswith("lambda"):
            return CaptionSource("json", Expression(text, _KEY))
        if not text:
            raise ValueError(f"{_KEY} is empty; {_FORMS}")
        return CaptionSource("json", Expression(f"lambda j: j[{text!r}]", _KEY))
    pair = list(captions_getter)
    if len(pair) != 2 or not all(isinstance(item, str) for item in pair) or pair[0] not in ("txt", "json"):
        raise ValueError(f"{_KEY} {pair!r} has no known form; {_FORMS}")
    if pair == ["json", "identity"]:
        raise ValueError(f"{_KEY} {pair!r}: a JSON object is no caption; write ['json', \"lambda j: j['caption']\"]")
    return CaptionSource(pair[0], Expression(pair[1], _KEY))
