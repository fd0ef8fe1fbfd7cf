"""Classes by name: built in, or `package.module:Class`; and what their constructors accept."""

from __future__ import annotations

import difflib
import importlib
import inspect
from collections.abc import Iterable, Mapping
from typing import Any

from stable_cascade.wording import brief, quoted


def load_class(key: str, name: Any, known: Mapping[str, Any]) -> Any:
    """The class that `known` has under `name`, or that `package.module:Class` names.

    Raises:
        ValueError: there is none.
    """
    if not isinstance(name, str) or not name:
        raise ValueError(f"{key} is {brief(repr(name), 60)}; allowed: {', '.join(known)}, or 'package.module:Class'")
    if ":" in name:
        return _imported(key, name)
    if name not in known:
        raise ValueError(
            f"{key} {quoted(name, 60)} is unknown;{nearest(name[:200], known)} or write 'package.module:Class'"
        )
    return known[name]


def constructed(cls: Any, params: Mapping[str, Any] | None, key: str, **extra: Any) -> Any:
    """`cls(**params)`; of `extra`, which the program gives, only what the constructor takes.

    Raises:
        ValueError: a parameter is unknown or missing, or the constructor refuses a value.
    """
    name = getattr(cls, "__name__", str(cls))
    given = dict(params or {})
    signature = _signature(cls, name)
    accepted = [p for p in signature.parameters.values() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    free = any(p.kind is p.VAR_KEYWORD for p in signature.parameters.values())
    names = [p.name for p in accepted]
    own = [parameter for parameter in names if parameter not in extra]
    for parameter in given:
        if parameter in extra:
            raise ValueError(f"{key} holds {parameter!r}, which {name} is given by the program; leave it away")
        if parameter not in names and not free:
            raise ValueError(
                f"{key} {quoted(parameter, 60)} is unknown to {name};{nearest(str(parameter)[:200], own)}"
            )
    missing = [p.name for p in accepted if p.default is p.empty and p.name not in {*given, *extra}]
    if missing:
        raise ValueError(f"{key} lacks {', '.join(map(repr, missing))}, which {name} requires")
    wanted = {parameter: value for parameter, value in extra.items() if parameter in names}
    try:
        return cls(**given, **wanted)
    except (ValueError, TypeError, OverflowError) as error:
        raise ValueError(f"{key}: {name}: {error}") from error


def nearest(name: str, known: Iterable[str]) -> str:
    """How an error about an unknown name ends: the nearest known one, if any is near, and all of them."""
    names = list(known)
    lower = {candidate.lower(): candidate for candidate in names}
    close = [lower[match] for match in difflib.get_close_matches(name.lower(), lower, n=1, cutoff=0.4)]
    listed = f" known: {', '.join(names)}" if names else " it takes none"
    return f" nearest: {close[0]!r};{listed}" if close else listed


def _imported(key: str, name: str) -> Any:
    module_name, _, attribute = name.partition(":")
    try:
        module = importlib.import_module(module_name)
    except (ImportError, ValueError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise ValueError(f"{key} {name!r}: module {module_name!r} cannot be imported ({reason})") from error
    found: Any = module
    for part in attribute.split("."):
        found = getattr(found, part, None) if part else None
    if found is None:
        classes = [n for n, value in vars(module).items() if isinstance(value, type) and not n.startswith("_")]
        raise ValueError(f"{key} {name!r}: module {module_name!r} has no {attribute!r};{nearest(attribute, classes)}")
    return found


def _signature(cls: Any, name: str) -> inspect.Signature:
    if not callable(cls):
        raise ValueError(f"{name} is a {type(cls).__name__}, not a class; name a class")
    try:
        return inspect.signature(cls)
    except (TypeError, ValueError) as error:
        raise ValueError(f"the parameters of {name} cannot be read ({error}); give it a plain __init__") from error
