"""`dataset_filters`: which samples of an index are kept."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .expressions import Expression

FIRST = 1000
"""A filter that rejects this many samples from the first on is taken for a mistake."""

_SIZE_KEYS = ("width", "height")
_MISSING = object()


@dataclass(frozen=True)
class Filter:
    """Keeps a sample when the expression is true for the value of one of its keys."""

    key: str
    expression: Expression

    def keeps(self, values: dict[str, Any]) -> bool:
        """Whether the sample with these values stays; one without the key, or with a value of the wrong kind, goes."""
        value = values.get(self.key, _MISSING)
        if value is _MISSING:
            return False
        try:
            return bool(self.expression(value))
        except (TypeError, KeyError, IndexError, ValueError, ZeroDivisionError, OverflowError):
            return False


def parse_filters(dataset_filters: Iterable[Sequence[str]] | None) -> list[Filter]:
    """The filters that a config lists as [key, 'lambda s: …'] pairs.

    Raises:
        ValueError: an entry is no pair, or its expression is refused.
    """
    filters = []
    for entry in dataset_filters or ():
        pair = [entry] if isinstance(entry, str) else list(entry)
        if len(pair) != 2 or not all(isinstance(item, str) for item in pair):
            raise ValueError(f"dataset_filters {pair!r} is no pair; write ['aesthetic_score', 'lambda s: s > 4.5']")
        filters.append(Filter(pair[0], Expression(pair[1], f"dataset_filters {pair[0]!r}")))
    return filters


def with_size(values: dict[str, Any], size: Sequence[int]) -> dict[str, Any]:
    """`values`, with width and height from the image's header where the JSON has none."""
    return {**dict(zip(_SIZE_KEYS, (int(side) for side in size), strict=True)), **values}


def apply_filters(
    filters: Sequence[Filter], rows: Iterable[tuple[Any, Sequence[int]]]
) -> tuple[np.ndarray, list[int]]:
    """Which rows stay, and how many each filter rejected.

    Args:
        filters: all must keep a row.
        rows: the values of each row (or their JSON text, '' for none), and its (width, height).

    Shapes: -> (N,) bool.

    Raises:
        ValueError: a filter rejects all of the first 1,000 rows (all rows when there are fewer).
    """
    kept: list[bool] = []
    rejected = [0] * len(filters)
    watch = RejectionWatch(filters)
    for values, size in rows:
        if isinstance(values, str):
            values = json.loads(values) if values else {}
        verdicts = watch.verdicts(with_size(values, size))
        kept.append(all(verdicts))
        for number, verdict in enumerate(verdicts):
            rejected[number] += not verdict
    watch.finish()
    return np.array(kept, bool), rejected


class RejectionWatch:
    """Evaluates filters row by row and raises as soon as one has rejected the first 1,000 rows."""

    def __init__(self, filters: Sequence[Filter]):
        self.filters = filters
        self.count = 0
        self.passed = [False] * len(filters)
        self.examples: list[Any] = [_MISSING] * len(filters)

    def verdicts(self, values: dict[str, Any]) -> list[bool]:
        """Whether each filter keeps the row.

        Raises:
            ValueError: as the class says.
        """
        found = [item.keeps(values) for item in self.filters]
        self.count += 1
        for number, item in enumerate(self.filters):
            self.passed[number] |= found[number]
            if self.examples[number] is _MISSING:
                self.examples[number] = values.get(item.key, _MISSING)
        if self.count == FIRST:
            self.finish()
        return found

    def finish(self) -> None:
        """Raises ValueError when a filter has kept nothing so far."""
        for item, passed, example in zip(self.filters, self.passed, self.examples, strict=True):
            if self.count and not passed:
                shown = "none has this key" if example is _MISSING else f"for example {item.key} = {example!r}"
                raise ValueError(
                    f"dataset_filters [{item.key!r}, {item.expression.text!r}] rejects all of the first "
                    f"{min(self.count, FIRST):,} samples ({shown}); correct the key or the threshold"
                )
