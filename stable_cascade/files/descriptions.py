"""What a file or folder is, as data and in words."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from stable_cascade.components import COMPONENTS
from stable_cascade.wording import brief

from .headers import TensorInfo

_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
_LISTED = 12


@dataclass(frozen=True)
class LoraFacts:
    """What a LoRA updates. `width` is that of the blocks of the prior it was trained for, `size` that prior."""

    ranks: dict[int, int] = field(default_factory=dict)
    targets: dict[str, int] = field(default_factory=dict)
    components: tuple[str, ...] = ()
    width: int | None = None
    size: str | None = None
    dora: bool = False
    tokens: int = 0


@dataclass(frozen=True)
class Description:
    """What a file or folder is.

    `kind`: network, checkpoint (several networks in one file), lora, tokens, pipeline, training, folder, shard.
    `parameters` counts trained values: running statistics are left out. `training` is the config that was recorded.
    """

    name: str
    kind: str
    component: str | None = None
    size: str | None = None
    format: str | None = None
    dtypes: dict[str, int] = field(default_factory=dict)
    tensors: int = 0
    parameters: int = 0
    bytes: int = 0
    parts: tuple[Description, ...] = ()
    lora: LoraFacts | None = None
    metadata: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def short(self) -> str:
        """What it is, as the end of "this is …"."""
        if self.kind == "network":
            size = f", {self.size}" if self.size else ""
            return f"the {COMPONENTS[str(self.component)].title}{size}, {self.format} names"
        if self.kind == "checkpoint":
            return f"a ComfyUI checkpoint of {', '.join(str(part.component) for part in self.parts)}"
        if self.kind == "lora":
            return f"a LoRA in {self.format} format, {_lora_words(self.lora)}"
        if self.kind == "pipeline":
            return f"a pipeline folder of {', '.join(part.name for part in self.parts)}"
        names = {
            "tokens": "learned tokens",
            "training": "a training's folder",
            "shard": "a shard of training data",
            "folder": f"a folder with {', '.join(part.name for part in self.parts)}",
        }
        return names[self.kind]

    def as_dict(self) -> dict[str, Any]:
        """Everything that is known, for JSON; what is empty is left out."""
        values: dict[str, Any] = {}
        for key, value in vars(self).items():
            if key == "parts":
                value = [part.as_dict() for part in self.parts]
            elif key == "lora" and self.lora is not None:
                value = vars(self.lora) | {"components": list(self.lora.components)}
            if value not in (None, {}, [], (), ""):
                values[key] = list(value) if isinstance(value, tuple) else value
        return values

    def lines(self, indent: str = "") -> list[str]:
        """Everything that is known, in words."""
        found = [f"{indent}{brief(self.name)}: {self.short()}"]
        inner = indent + "  "
        if self.tensors:
            found.append(f"{inner}{_amount(self)}")
        if self.lora is not None:
            found.append(f"{inner}targets: {_counted(self.lora.targets)}")
        for title, table in (("metadata", self.metadata), ("training", self.training)):
            if table:
                found.append(f"{inner}{title}:")
                shown = [(brief(key, 60), brief(_set_values(value), 100)) for key, value in _first(table)]
                found += [f"{inner}  {key}: {value}" for key, value in shown]
        found += [f"{inner}note: {note}" for note in self.notes]
        for part in self.parts:
            found += part.lines(inner)
        return found

    def __str__(self) -> str:
        return "\n".join(self.lines())


def counted(description: Description, tensors: Mapping[str, TensorInfo], *, size: int | None = None) -> Description:
    """The description with its tensors counted; `size` is the file's, the sum of the tensors' without."""
    from .headers import DTYPES

    bits = dict(DTYPES.values())
    dtypes: dict[str, int] = {}
    for info in tensors.values():
        dtypes[info.dtype] = dtypes.get(info.dtype, 0) + 1
    trained = [info for name, info in tensors.items() if not name.endswith(_STATISTICS)]
    return replace(
        description,
        dtypes=dict(sorted(dtypes.items(), key=lambda item: -item[1])),
        tensors=len(tensors),
        parameters=sum(info.elements for info in trained),
        bytes=sum(info.elements * bits.get(info.dtype, 0) // 8 for info in tensors.values()) if size is None else size,
    )


def _amount(found: Description) -> str:
    types = next(iter(found.dtypes)) if len(found.dtypes) == 1 else _counted(found.dtypes)
    return f"{found.parameters:,} parameters in {found.tensors:,} tensors, {types}, {_size(found.bytes)}"


def _size(count: int) -> str:
    for unit, divisor in (("GB", 10**9), ("MB", 10**6), ("kB", 10**3)):
        if count >= divisor:
            return f"{count / divisor:.2f} {unit}"
    return f"{count} bytes"


def _lora_words(lora: LoraFacts | None) -> str:
    if lora is None:
        return "of unknown rank"
    ranks = sorted(lora.ranks)
    rank = f"rank {ranks[0]}" if len(ranks) == 1 else f"ranks {ranks[0]} to {ranks[-1]}" if ranks else "tokens alone"
    trained = f", for a prior of width {lora.width}" if lora.width else ""
    trained = f", for the prior {lora.size}" if lora.size else trained
    return f"{rank}{' (DoRA)' if lora.dora else ''}, of {' and '.join(lora.components) or 'nothing'}{trained}"


def _set_values(value: Any) -> Any:
    """A JSON object of a header without the entries that are not set, as `key=value`; anything else as it is."""
    if not isinstance(value, str) or not value.lstrip().startswith("{"):
        return value
    try:
        entries = json.loads(value)
    except (ValueError, RecursionError):
        return value
    return ", ".join(f"{key}={brief(one, 60)}" for key, one in entries.items() if one not in (None, {}, [], False, ""))


def _counted(table: Mapping[Any, int]) -> str:
    return ", ".join(f"{count} x {brief(key, 60)}" for key, count in _first(table)) or "none"


def _first(table: Mapping[Any, Any]) -> list[tuple[Any, Any]]:
    """The first entries, and how many more there are."""
    entries = list(table.items())
    more = len(entries) - _LISTED
    if more <= 1:
        return entries
    rest: Any = sum(count for _, count in entries[_LISTED:]) if isinstance(entries[0][1], int) else "not shown"
    return [*entries[:_LISTED], (f"{more} more", rest)]
