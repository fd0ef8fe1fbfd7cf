"""Regularisation: a second set of images shown between the first ones, with a weight of its own."""

from __future__ import annotations

import dataclasses
from fractions import Fraction

import numpy as np

from .samples import Regularization, SampleIndex, Source
from .stream import SampleStream

_PREFIX = "regularization/"


class JoinedSource:
    """Two sources, one after the other; the second one's keys begin with `regularization/`."""

    def __init__(self, main: Source, other: Source, first: int, masks: tuple[bool, bool]):
        self.main, self.other, self.first, self.masks = main, other, first, masks

    def _place(self, index: int) -> tuple[Source, int]:
        return (self.main, index) if index < self.first else (self.other, index - self.first)

    def key(self, index: int) -> str:
        """The sample's name in messages."""
        source, number = self._place(index)
        return source.key(number) if index < self.first else _PREFIX + source.key(number)

    def read(self, index: int) -> tuple[bytes, str]:
        """The image file and the caption."""
        source, number = self._place(index)
        return source.read(number)

    def caption(self, index: int) -> str:
        """The caption alone."""
        source, number = self._place(index)
        return source.caption(number)

    def mask(self, index: int) -> bytes | None:
        """The mask's file; None where the sample has none, or its set was indexed without masks."""
        source, number = self._place(index)
        return source.mask(number) if self.masks[index >= self.first] else None

    def identity(self) -> bytes:
        """All names in their order."""
        return self.main.identity() + _PREFIX.encode() + self.other.identity()


def with_regularization(
    index: SampleIndex | SampleStream, other: SampleIndex | SampleStream, share: float, weight: float
) -> SampleIndex:
    """Both sets as one index: `share` of the samples shown are of `other`, evenly spread, with `Batch.weights` weight.

    Each set goes through epochs of its own. Position p shows an image of `other` where floor((p + 1) share) is one
    more than floor(p share), with the share rounded to millionths.

    Raises:
        ValueError: the share does not lie in (0, 1), the weight is negative, or a set is a stream or joined already.
    """
    for part in (index, other):
        if not isinstance(part, SampleIndex):
            raise ValueError("regularization_path needs random access to the images; set streaming: false")
        if part.regularization is not None:
            raise ValueError("an index that has regularisation images already cannot be joined with others")
    assert isinstance(index, SampleIndex)
    assert isinstance(other, SampleIndex)
    exact = Fraction(share).limit_denominator(1_000_000)
    if not 0 < exact < 1:
        raise ValueError(f"regularization_share {share} must lie between 0 and 1")
    if not weight >= 0:
        raise ValueError(f"prior_loss_weight {weight} must not be negative")
    main, extra = index.report, other.report
    report = dataclasses.replace(
        main,
        found=main.found + extra.found,
        shards=main.shards + extra.shards,
        unreadable=main.unreadable + extra.unreadable,
        unreadable_keys=(*main.unreadable_keys, *(_PREFIX + key for key in extra.unreadable_keys)),
        uncaptioned=main.uncaptioned + extra.uncaptioned,
        masked=None if main.masked is extra.masked is None else (main.masked or 0) + (extra.masked or 0),
        regularization=extra.found,
        skipped_shards=main.skipped_shards + extra.skipped_shards,
    )
    return SampleIndex(
        JoinedSource(index.source, other.source, len(index), (index.masks, other.masks)),
        np.concatenate([index.widths, other.widths]),
        np.concatenate([index.heights, other.heights]),
        np.concatenate([index.content_hashes, other.content_hashes]),
        report,
        index.max_broken_share,
        index.masks or other.masks,
        Regularization(len(index), exact, float(weight)),
        None
        if index.text_hashes is None or other.text_hashes is None
        else np.concatenate([index.text_hashes, other.text_hashes]),
    )
