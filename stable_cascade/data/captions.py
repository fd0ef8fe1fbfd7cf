"""Where a caption comes from: the .txt member, a JSON key, or a safe expression over the JSON object."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from stable_cascade import bounds
from stable_cascade.disk import decode_text
from stable_cascade.wording import brief

from .filters import Expression

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
        return self.from_content(json_object(data) if self.member == "json" else text_of(data))

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
        check_caption(caption)
        return caption.strip()


def text_of(data: bytes) -> str:
    """The caption in a text file's bytes.

    Raises:
        ValueError: it is too long, or neither UTF-8 nor UTF-16.
    """
    if len(data) > bounds.CAPTION_FILE:
        raise ValueError(_too_long(len(data)))
    try:
        return decode_text(data).strip()
    except ValueError as error:
        raise ValueError(f"its caption {error}") from None


def check_caption(caption: str) -> None:
    """Passes when a caption from JSON, a table or a data set can be given to a text encoder.

    Raises:
        ValueError: it is too long, or holds half a character.
    """
    if len(caption) > bounds.CAPTION_FILE:
        raise ValueError(_too_long(len(caption)))
    if any("\ud800" <= character <= "\udfff" for character in caption):
        raise ValueError("its caption holds half a character (a lone surrogate); write it anew")


def _too_long(length: int) -> str:
    return f"its caption has {length:,} bytes; at most {bounds.CAPTION_FILE:,} are read"


def json_object(data: bytes) -> dict[str, Any]:
    """The object in a JSON file's bytes.

    Raises:
        ValueError: it is too large, nested too deeply, no JSON, or no object.
    """
    if len(data) > bounds.JSON_FILE:
        raise ValueError(f"its JSON has {len(data):,} bytes; at most {bounds.JSON_FILE:,} are read")
    try:
        content = json.loads(decode_text(data))
    except RecursionError:
        raise ValueError("its JSON nests its brackets too deeply to be read") from None
    except ValueError as error:
        raise ValueError(f"its JSON cannot be read: {brief(error)}") from None
    if not isinstance(content, dict):
        raise ValueError(f"its member holds no JSON object, but a {type(content).__name__}")
    return content


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
