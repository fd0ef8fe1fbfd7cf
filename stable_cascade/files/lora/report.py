"""What a conversion did and how faithful it is."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

EXACTNESS = ("bitwise", "exact", "rounded")
"""Every factor keeps its bits; factors are put together, or rounded once to float32; rounded to less than float32."""


@dataclass
class Report:
    """What a conversion did. It drops nothing: what a format cannot hold is refused.

    Attributes:
        source, source_format: what was read.
        target, format: what was written.
        layers: component -> number of layers.
        tokens: names of the learned tokens.
        exactness: one of `EXACTNESS`.
        error: how far a factor's value is off at most by rounding, relative to itself.
        notes: what else is worth knowing, one sentence each.
        files: everything that was written.
    """

    source: str
    source_format: str
    target: str
    format: str
    layers: dict[str, int] = field(default_factory=dict)
    tokens: list[str] = field(default_factory=list)
    exactness: str = "bitwise"
    error: float = 0.0
    notes: list[str] = field(default_factory=list)
    files: list[str] = field(default_factory=list)

    def lower(self, exactness: str, error: float = 0.0) -> None:
        """Records that something is no more faithful than this."""
        self.exactness = max(self.exactness, exactness, key=EXACTNESS.index)
        self.error = max(self.error, error)

    def note(self, sentence: str) -> None:
        """Adds a note once."""
        if sentence not in self.notes:
            self.notes.append(sentence)

    def as_dict(self) -> dict[str, Any]:
        """The report for JSON."""
        return dict(vars(self))

    def __str__(self) -> str:
        parts = [f"{count} layers of the {component}" for component, count in self.layers.items()]
        parts += [f"token {name}" for name in self.tokens]
        rounding = f", values off by at most {self.error:.1e} of themselves" if self.error else ""
        lines = [f"{self.source_format} -> {self.format}: {', '.join(parts)}; {self.exactness}{rounding}"]
        return "\n".join([*lines, *(f"  {note}" for note in self.notes)])
