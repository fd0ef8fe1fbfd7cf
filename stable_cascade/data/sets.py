"""Several sets of images as one index: each with its share of what is shown, a caption prefix and a loss weight."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from .captions import check_caption
from .samples import IndexReport, Mixture, SampleIndex, Source, mixed_hash
from .stream import SampleStream

_EXACT = 1_000_000
"""Largest denominator of a share."""


@dataclass(frozen=True)
class ImageSet:
    """One of several sets.

    Attributes:
        weight: its share of the images shown, relative to the other sets' weights; None: as many as it has, times
            `repeats`.
        repeats: how often an epoch shows each of its images, relative to the other sets.
        caption_prefix: put before each caption, as it is written.
        regularization: whether its images are of the whole class, and not of the subject.
        loss_weight: what the loss of its images is multiplied by.
    """

    index: SampleIndex | SampleStream
    weight: float | Fraction | None = None
    repeats: float = 1.0
    caption_prefix: str = ""
    regularization: bool = False
    loss_weight: float = 1.0


def joined(sets: Sequence[ImageSet]) -> SampleIndex:
    """The sets as one index, those for regularisation last; each goes through epochs of its own.

    The shares hold at every position and not only on average: of n places that the sets after it leave, a set takes
    floor(n share), with its share among itself and the sets before it rounded to millionths.

    Raises:
        ValueError: a set is a stream or joined already, or weights are missing, negative or all zero.
    """
    sets = sorted(sets, key=lambda one: one.regularization)
    # Plain indexes, and weights for all or for none.
    for one in sets:
        if not isinstance(one.index, SampleIndex):
            raise ValueError("several sets need random access to their images; set streaming: false")
        if one.index.mixture is not None:
            raise ValueError("an index of several sets already cannot be joined with others")
        if not (one.repeats > 0 and one.loss_weight >= 0 and (one.weight is None or one.weight > 0)):
            numbers = f"weight {one.weight}, repeats {one.repeats} and loss_weight {one.loss_weight}"
            raise ValueError(f"a set has {numbers}; weight and repeats must be above 0, loss_weight not negative")
        check_caption(one.caption_prefix)
    given = [one.weight is not None for one in sets]
    if any(given) and not all(given):
        raise ValueError("some sets have a weight and others none; give a weight to each of them, or use repeats")
    indexes = [one.index for one in sets if isinstance(one.index, SampleIndex)]
    sizes = [len(index) for index in indexes]

    # Shares that add up to one, then the arrays and reports one after the other.
    parts = [
        Fraction(one.weight if one.weight is not None else one.repeats * size).limit_denominator(_EXACT)
        for one, size in zip(sets, sizes, strict=True)
    ]
    mixture = Mixture(
        firsts=tuple(np.cumsum([0, *sizes[:-1]]).tolist()),
        shares=tuple(part / sum(parts) for part in parts),
        weights=tuple(float(one.loss_weight) for one in sets),
        regularization=tuple(one.regularization for one in sets),
    )
    names = _names(sets)
    hashes = [
        index.text_hashes if index.text_hashes is None else mixed_hash(index.text_hashes, one.caption_prefix)
        for one, index in zip(sets, indexes, strict=True)
    ]
    masks = tuple(index.masks for index in indexes)
    return SampleIndex(
        JoinedSource(
            [index.source for index in indexes], mixture.firsts, names, masks, [one.caption_prefix for one in sets]
        ),
        np.concatenate([index.widths for index in indexes]),
        np.concatenate([index.heights for index in indexes]),
        np.concatenate([index.content_hashes for index in indexes]),
        _report(indexes, names, mixture),
        indexes[0].max_broken_share,
        any(masks),
        mixture,
        None if any(part is None for part in hashes) else np.concatenate(hashes),  # type: ignore[arg-type]
    )


def with_regularization(
    index: SampleIndex | SampleStream, other: SampleIndex | SampleStream, share: float, weight: float
) -> SampleIndex:
    """Both sets as one index: `share` of the samples shown are of `other`, evenly spread, with `Batch.weights` weight.

    Position p shows an image of `other` where floor((p + 1) share) is one more than floor(p share), with the share
    rounded to millionths.

    Raises:
        ValueError: the share does not lie in (0, 1), the weight is negative, or a set is a stream or joined already.
    """
    if not isinstance(index, SampleIndex) or not isinstance(other, SampleIndex):
        raise ValueError("regularization_path needs random access to the images; set streaming: false")
    exact = Fraction(share).limit_denominator(_EXACT)
    if not 0 < exact < 1:
        raise ValueError(f"regularization_share {share} must lie between 0 and 1")
    if not weight >= 0:
        raise ValueError(f"prior_loss_weight {weight} must not be negative")
    others = ImageSet(other, weight=exact, regularization=True, loss_weight=weight)
    return joined([ImageSet(index, weight=1 - exact), others])


class JoinedSource:
    """Several sources, one after the other; keys of all but the first begin with their set's name."""

    def __init__(
        self,
        sources: Sequence[Source],
        firsts: Sequence[int],
        names: Sequence[str],
        masks: Sequence[bool],
        prefixes: Sequence[str],
    ):
        self.sources, self.names, self.masks, self.prefixes = sources, names, masks, prefixes
        self.firsts = np.asarray(firsts)

    def _place(self, index: int) -> tuple[int, Source, int]:
        number = int(np.searchsorted(self.firsts, index, side="right")) - 1
        return number, self.sources[number], index - int(self.firsts[number])

    def key(self, index: int) -> str:
        """The sample's name in messages."""
        number, source, place = self._place(index)
        return self.names[number] + source.key(place)

    def read(self, index: int) -> tuple[bytes, str]:
        """The image file and the caption."""
        number, source, place = self._place(index)
        data, caption = source.read(place)
        return data, self.prefixes[number] + caption

    def caption(self, index: int) -> str:
        """The caption alone."""
        number, source, place = self._place(index)
        return self.prefixes[number] + source.caption(place)

    def mask(self, index: int) -> bytes | None:
        """The mask's file; None where the sample has none, or its set was indexed without masks."""
        number, source, place = self._place(index)
        return source.mask(place) if self.masks[number] else None

    def identity(self) -> bytes:
        """All names in their order."""
        return b"".join(
            name.encode() + source.identity() for name, source in zip(self.names, self.sources, strict=True)
        )


def _names(sets: Sequence[ImageSet]) -> list[str]:
    """What keys begin with: nothing for the first set, `regularization/` for the only such one, else a number."""
    alone = sum(one.regularization for one in sets) == 1
    return [
        "" if not number else "regularization/" if one.regularization and alone else f"set {number + 1}/"
        for number, one in enumerate(sets)
    ]


def _report(indexes: Sequence[SampleIndex], names: Sequence[str], mixture: Mixture) -> IndexReport:
    """The reports of all sets as one."""
    # Counts add up; masks count where a set was indexed with them; keys carry their set's name.
    reports = [index.report for index in indexes]
    masked = [report.masked for report in reports if report.masked is not None]
    rejected: dict[str, int] = {}
    for report in reports:
        for key, count in report.rejected.items():
            rejected[key] = rejected.get(key, 0) + count
    return dataclasses.replace(
        reports[0],
        found=sum(report.found for report in reports),
        shards=sum(report.shards for report in reports),
        unreadable=sum(report.unreadable for report in reports),
        unreadable_keys=tuple(
            name + key for name, report in zip(names, reports, strict=True) for key in report.unreadable_keys
        ),
        rejected=rejected,
        uncaptioned=sum(report.uncaptioned for report in reports),
        masked=sum(masked) if masked else None,
        regularization=sum(
            report.found for report, aside in zip(reports, mixture.regularization, strict=True) if aside
        ),
        sets=tuple(
            f"{len(index):,}: {float(share):.1%}" for index, share in zip(indexes, mixture.shares, strict=True)
        ),
        skipped_shards=tuple(place for report in reports for place in report.skipped_shards),
    )
