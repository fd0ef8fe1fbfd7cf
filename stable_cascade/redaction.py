"""Credentials taken out of what is printed, logged or written: the one place that knows what they look like.

Imports nothing of the package, so that every layer may use it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

MARK = "***"
_USER = re.compile(r"(://)[^\s/?#'\"<>]*@")
_QUERY = re.compile(r"(\b[a-zA-Z][a-zA-Z0-9+.-]*://[^\s?#'\"<>]*)[?#][^\s'\"<>]*")
_ASSIGNED = re.compile(
    r"(?i)(?<![a-z0-9])([a-z0-9_-]*(?:token|password|passwd|secret|signature|credential|api[_-]?key|access[_-]?key)=)"
    r"[^\s&'\"]+"
)
_KNOWN = re.compile(r"\b(?:hf_[A-Za-z0-9]{16,}|(?:AKIA|ASIA)[A-Z0-9]{16})\b|(?<=Bearer )[\w.~+/=-]{16,}")
_SECRET_KEY = re.compile(
    r"(?i)(?:^|_)(?:token|password|passwd|secret|signature|credentials?|api_key|access_key|secret_key)$"
)


def redacted(value: Any) -> Any:
    """The value with `***` in place of every credential: text, numbers, and lists, tuples and mappings of them.

    An address loses `user:password@` and all behind `?` or `#`, which is where signatures are; known forms of tokens
    and the values of keys named token, password, secret or the like go as well. Doing it twice changes nothing.
    """
    if isinstance(value, str):
        return _redacted_text(value)
    if isinstance(value, Mapping):
        return {key: MARK if _is_secret(key, inner) else redacted(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(redacted(inner) for inner in value)
    return value


def bare_address(text: str) -> str:
    """An address without user, password, query and fragment; a local path stays as it is."""
    return _QUERY.sub(r"\1", _USER.sub(r"\1", text))


def _redacted_text(text: str) -> str:
    text = _QUERY.sub(rf"\1?{MARK}", _USER.sub(rf"\1{MARK}@", text))
    return _KNOWN.sub(MARK, _ASSIGNED.sub(rf"\g<1>{MARK}", text))


def _is_secret(key: Any, value: Any) -> bool:
    """Whether a key names a credential: `token` does, `train_tokens` and `token_lr` do not."""
    return isinstance(key, str) and isinstance(value, str) and bool(value) and bool(_SECRET_KEY.search(key))
