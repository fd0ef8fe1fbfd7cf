"""What a field of a config says about itself, and what is generated from that: `--help` and the reference page.

A field has a name, a type (whose `Literal`s are its choices), a default, and a line of documentation under it.
Everything else that is to know about its key is an argument of `setting`.
"""

from __future__ import annotations

import ast
import functools
import inspect
import itertools
import math
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

REQUIRED: Any = "???"
"""The default of a key that every config must set (OmegaConf's mark of a missing value)."""


@dataclass(frozen=True)
class Setting:
    """What is to know about a key, beside its type, its default and its documentation.

    Attributes:
        at_least, above: the smallest number, included or excluded.
        at_most, below: the largest number, included or excluded.
        check: value -> None, or a clause that says what is allowed.
        path: the value may name a file or folder: a leading `~` in it is the home folder.
        resume: whether a resumed run may have another value: never (`fixed`), always (`free`) because no weight
            depends on it, or while the images stay the same (`same data`).
        card: whether a model card shows the value.
        elsewhere: another trainer's word for it, for the message about an unknown key.
        values: what it may be, in words, where the type does not say.
    """

    at_least: float | None = None
    above: float | None = None
    at_most: float | None = None
    below: float | None = None
    check: Callable[[Any], str | None] | None = None
    path: bool = False
    resume: Literal["fixed", "free", "same data"] = "fixed"
    card: bool = True
    elsewhere: str = ""
    values: str = ""

    LARGEST = 1e9
    """What a number without an upper bound may be at most."""

    def problem(self, value: Any) -> str | None:
        """A clause that says what is allowed; None where the value is."""
        if value is None:
            return None
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        return (self._outside(value) if number else None) or (self.check(value) if self.check is not None else None)

    def _outside(self, number: float) -> str | None:
        """The clause for a number that is out of range."""
        if abs(number) > 1e300 or not math.isfinite(number):
            return "must be a finite number"
        largest = self.LARGEST if self.at_most is None else self.at_most
        low = number < self.at_least if self.at_least is not None else self.above is not None and number <= self.above
        high = abs(number) > largest or (self.below is not None and number >= self.below)
        # The message for a share names its interval, that for any other number the bound that it breaks.
        if (low or high) and 1 in (self.at_most, self.below):
            return f"must lie {self.range_text()}"
        if low:
            return (
                f"must be greater than {self.above}" if self.at_least is None else f"must be at least {self.at_least}"
            )
        return f"must be at most {largest:,.0f}" if high else None

    def range_text(self) -> str:
        """The range in words: `in [0, 1)`, `from 1 to 512`, `from 0`, `above 0`; empty where any number will do."""
        if 1 in (self.at_most, self.below):
            return f"in {'[' if self.above is None else '('}0, 1{']' if self.below is None else ')'}"
        low = "" if self.at_least is None else f"from {self.at_least}"
        low = low if self.above is None else f"above {self.above}"
        return f"{low} to {self.at_most:,}" if low and self.at_most is not None else low


def setting(default: Any, **known: Any) -> Any:
    """A field with this default and what `Setting` holds."""
    return field(default=default, metadata={"setting": Setting(**known)})


@functools.cache
def settings_of(cls: type) -> dict[str, Setting]:
    """Key -> what is to know about it."""
    return {one.name: one.metadata.get("setting", Setting()) for one in fields(cls)}  # type: ignore[arg-type]


def keys_where(classes: Sequence[type], **known: Any) -> frozenset[str]:
    """The keys of some configs whose `Setting` has these values: `keys_where([LoraConfig], resume="free")`."""
    return frozenset(
        key
        for cls in classes
        for key, one in settings_of(cls).items()
        if all(getattr(one, name) == value for name, value in known.items())
    )


def sections(cls: type) -> dict[type, list[str]]:
    """The small dataclasses a config is composed of, in order, each with the keys it brings."""
    owners = [owner for owner in reversed(cls.__mro__) if vars(owner).get("__annotations__")]
    last = {name: owner for owner in owners for name in owner.__annotations__}
    order = [one.name for one in fields(cls)]  # type: ignore[arg-type]
    return {owner: [name for name in order if last[name] is owner] for owner in owners if owner in last.values()}


@functools.cache
def documentation(cls: type) -> dict[str, str]:
    """The line of documentation of every key."""
    lines: dict[str, str] = {}
    for owner in sections(cls):
        body = ast.parse(textwrap.dedent(inspect.getsource(owner))).body[0].body  # type: ignore[attr-defined]
        for one, text in itertools.pairwise(body):
            if isinstance(one, ast.AnnAssign) and isinstance(text, ast.Expr) and isinstance(text.value, ast.Constant):
                lines[one.target.id] = str(text.value.value)  # type: ignore[union-attr]
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


def reference(classes: Sequence[type]) -> str:
    """The reference page of the keys of some configs, as Markdown: one table per section, and who has it."""
    # Sections are shared: each comes once, with the configs that have it.
    seen: dict[type, list[str]] = {}
    users: dict[type, list[str]] = {}
    for cls in classes:
        for owner, names in sections(cls).items():
            seen.setdefault(owner, names)
            users.setdefault(owner, []).append(cls.__name__)
    lines = [
        "# Configuration",
        "",
        "You can look up every key of every training here: its values, its default, its meaning. For one training,",
        "`stable-cascade train lora --help` prints them. The last column says whether a run that is resumed may have",
        "another value than before; where it is empty, the resumption is refused. Generated from",
        "`stable_cascade/config/settings.py`.",
        "",
    ]
    # One table per section, one row per key.
    resume = {"fixed": "", "free": "yes", "same data": "while the images stay the same"}
    for owner, names in seen.items():
        lines += [f"## {(owner.__doc__ or '').strip().rstrip('.')}", "", f"Keys of {', '.join(users[owner])}.", ""]
        lines += ["| key | values | default | meaning | may change on resume |", "|---|---|---|---|---|"]
        text, known = documentation(owner), settings_of(owner)
        for name in names:
            cells = (
                f"`{name}`",
                kind_text(owner, name),
                default_text(owner, name),
                text[name],
                resume[known[name].resume],
            )
            lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
        lines.append("")
    return "\n".join(lines)


def kind_text(cls: type, key: str) -> str:
    """The values a key takes, in words: `number from 0`, `list of text`, or its choices."""
    if settings_of(cls)[key].values:
        return settings_of(cls)[key].values
    kind = kinds(cls)[key]
    alternatives = get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
    text = " | ".join(_one_kind_text(one) for one in alternatives if one is not type(None))
    return f"{text} {settings_of(cls)[key].range_text()}".rstrip()


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
    default = next(one.default for one in fields(cls) if one.name == key)  # type: ignore[arg-type]
    return "(required)" if default == REQUIRED else "" if default is None else f"(default {default})"


@functools.cache
def kinds(cls: type) -> dict[str, Any]:
    """The type of every key."""
    return get_type_hints(cls)
