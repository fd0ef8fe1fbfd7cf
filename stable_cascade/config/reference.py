"""What the keys mean, take and default to: `--help` and the reference page, read from the dataclasses themselves."""

from __future__ import annotations

import ast
import functools
import inspect
import itertools
import textwrap
from dataclasses import fields
from typing import Any, Literal, get_args, get_origin, get_type_hints

from stable_cascade.config.settings import REQUIRED, TRAINERS, GenerateConfig


def sections(cls: type) -> dict[type, list[str]]:
    """The small dataclasses a config is composed of, in order, each with the keys it brings."""
    owners = [owner for owner in reversed(cls.__mro__) if vars(owner).get("__annotations__")]
    last = {name: owner for owner in owners for name in owner.__annotations__}
    order = [field.name for field in fields(cls)]  # type: ignore[arg-type]
    return {owner: [name for name in order if last[name] is owner] for owner in owners if owner in last.values()}


@functools.cache
def documentation(cls: type) -> dict[str, str]:
    """The line of documentation of every key."""
    lines: dict[str, str] = {}
    for owner in sections(cls):
        body = ast.parse(textwrap.dedent(inspect.getsource(owner))).body[0].body  # type: ignore[attr-defined]
        for field, text in itertools.pairwise(body):
            if (
                isinstance(field, ast.AnnAssign)
                and isinstance(text, ast.Expr)
                and isinstance(text.value, ast.Constant)
            ):
                lines[field.target.id] = str(text.value.value)  # type: ignore[union-attr]
    return lines


def help_text(cls: type) -> str:
    """What `--help` prints: every key with its values, default and one line."""
    lines = [f"{(cls.__doc__ or '').strip()}", "", "usage: [--config] FILE [--key value ...] [--check] [--help]"]
    text = documentation(cls)
    for owner, names in sections(cls).items():
        lines += ["", (owner.__doc__ or "").strip()]
        for name in names:
            lines.append(f"  --{name}  {kind_text(cls, name)}  {default_text(cls, name)}")
            lines += textwrap.wrap(text[name], 100, initial_indent="      ", subsequent_indent="      ")
    return "\n".join(lines)


def reference() -> str:
    """The reference page of all keys, as Markdown: one table per section, and the trainers that have it."""
    seen: dict[type, list[str]] = {}
    users: dict[type, list[str]] = {}
    for trainer in (*TRAINERS, GenerateConfig):
        for owner, names in sections(trainer).items():
            seen.setdefault(owner, names)
            users.setdefault(owner, []).append(trainer.__name__)
    lines = ["# Configuration", "", "Generated from `stable_cascade/config/settings.py`; a test keeps both equal.", ""]
    for owner, names in seen.items():
        lines += [f"## {(owner.__doc__ or '').strip().rstrip('.')}", "", f"Keys of {', '.join(users[owner])}.", ""]
        lines += ["| key | values | default | meaning |", "|---|---|---|---|"]
        text = documentation(owner)
        for name in names:
            cells = (f"`{name}`", kind_text(owner, name), default_text(owner, name), text[name])
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
        lines.append("")
    return "\n".join(lines)


def kind_text(cls: type, key: str) -> str:
    """The values a key takes, in words: `number`, `list of text`, or its choices."""
    kind = kinds(cls)[key]
    parts = [part for part in (get_args(kind) or (kind,)) if part is not type(None)]
    if get_origin(kind) is Literal:
        return " | ".join(map(str, get_args(kind)))
    if get_origin(kind) in (list, tuple, dict):
        parts = [kind]
    return " | ".join(_one_kind_text(part) for part in parts)


def _one_kind_text(kind: Any) -> str:
    """One alternative of `kind_text`."""
    names = {int: "whole number", float: "number", str: "text", bool: "True | False", Any: "any"}
    if get_origin(kind) is Literal:
        return " | ".join(map(str, get_args(kind)))
    if get_origin(kind) is list:
        return f"list of {_one_kind_text(get_args(kind)[0])}"
    if get_origin(kind) is tuple:
        return f"list of {len(get_args(kind))} numbers"
    if get_origin(kind) is dict:
        return "mapping"
    return names.get(kind, "text or null")


def default_text(cls: type, key: str) -> str:
    """The default of a key in words."""
    default = next(field.default for field in fields(cls) if field.name == key)  # type: ignore[arg-type]
    return "(required)" if default == REQUIRED else "" if default is None else f"(default {default})"


@functools.cache
def kinds(cls: type) -> dict[str, Any]:
    """The type of every key."""
    return get_type_hints(cls)
