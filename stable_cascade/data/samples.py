"""What an index is: the usable samples, their sizes, and where each of them is read."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, Protocol

import numpy as np

from .draws import mixed

HEAD_BYTES, TAIL_BYTES = 32768, 4096
"""What is read of an image to index it: enough for nearly every header, and for a hash of the content."""


class Source(Protocol):
    """Where an index reads its samples from."""

    def key(self, index: int) -> str:
        """The sample's name in messages."""

    def read(self, index: int) -> tuple[bytes, str]:
        """The image file and the caption.

        Raises:
            ValueError, OSError: they cannot be read.
        """

    def caption(self, index: int) -> str:
        """The caption alone, without the image's bytes."""

    def mask(self, index: int) -> bytes | None:
        """The mask's file; None where the sample has none."""

    def identity(self) -> bytes:
        """What tells these samples from others: all names in their order."""


@dataclass(frozen=True)
class IndexReport:
    """How many samples were found, and why others are not used."""

    found: int
    shards: int = 0
    unreadable: int = 0
    unreadable_keys: tuple[str, ...] = ()
    rejected: dict[str, int] = field(default_factory=dict)
    uncaptioned: int = 0
    masked: int | None = None
    regularization: int = 0
    sets: tuple[str, ...] = ()
    skipped_shards: tuple[str, ...] = ()

    def __str__(self) -> str:
        parts = [f"{self.found:,} samples" + (f" in {self.shards:,} shards" if self.shards else "")]
        if self.unreadable:
            parts.append(f"{self.unreadable:,} left out (for example {'; '.join(self.unreadable_keys[:3])})")
        parts += [f"{count:,} rejected by {name}" for name, count in self.rejected.items()]
        if self.uncaptioned:
            parts.append(f"{self.uncaptioned:,} without a caption")
        if self.masked is not None:
            parts.append(f"{self.masked:,} with a mask")
        if len(self.sets) > 2 or (self.sets and not self.regularization):
            parts.append(f"in {len(self.sets)} sets ({', '.join(self.sets)} of the images shown)")
        if self.regularization:
            parts.append(f"{self.regularization:,} of them for regularisation")
        if self.skipped_shards:
            parts.append(f"{len(self.skipped_shards):,} shards skipped: {'; '.join(self.skipped_shards)}")
        return ", ".join(parts)


@dataclass(frozen=True)
class Mixture:
    """Several sets in one index.

    Attributes:
        firsts: number of the first sample of each set, 0 for the first one.
        shares: of what is shown; they add up to one.
        weights: what the loss of each set's images is multiplied by.
        regularization: which sets are of the class and not of the subject; those are the last ones.
    """

    firsts: tuple[int, ...]
    shares: tuple[Fraction, ...]
    weights: tuple[float, ...]
    regularization: tuple[bool, ...]

    def set_of(self, samples: np.ndarray) -> np.ndarray:
        """The number of the set that each sample belongs to. Shapes: (N,) -> (N,)."""
        return np.searchsorted(self.firsts, samples, side="right") - 1


@dataclass(frozen=True)
class SampleIndex:
    """The usable samples: sizes after EXIF rotation, and a source that reads each of them at random.

    Shapes: widths, heights (N,) int32; content_hashes (N,) uint64, of the image (and the mask, where masks are asked
        for), whatever its file is called; text_hashes (N,) uint64, of the file or text that holds the caption.
    """

    source: Source
    widths: np.ndarray
    heights: np.ndarray
    content_hashes: np.ndarray
    report: IndexReport
    max_broken_share: float = 0.1
    masks: bool = False
    mixture: Mixture | None = None
    text_hashes: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.widths)

    def key(self, index: int) -> str:
        """The sample's name, such as `shard.tar/0001`."""
        return self.source.key(index)

    def read(self, index: int) -> tuple[bytes, str]:
        """The image file and the caption of one sample."""
        return self.source.read(index)

    def caption(self, index: int) -> str:
        """The caption of one sample, without reading the image."""
        return self.source.caption(index)

    def mask(self, index: int) -> bytes | None:
        """The mask's file of one sample; None where it has none, or none are asked for."""
        return self.source.mask(index) if self.masks else None

    def weights(self, indices: np.ndarray) -> np.ndarray:
        """What each sample's loss is multiplied by: 1, or the weight of its set.

        Shapes: (N,) -> (N,) float32.
        """
        if self.mixture is None:
            return np.ones(len(indices), np.float32)
        return np.asarray(self.mixture.weights, np.float32)[self.mixture.set_of(indices)]

    @property
    def subjects(self) -> int:
        """How many samples are of the subject; those for regularisation come after them."""
        if self.mixture is None or not any(self.mixture.regularization):
            return len(self)
        return self.mixture.firsts[self.mixture.regularization.index(True)]

    @property
    def content(self) -> dict[str, Any]:
        """What tells these samples from others, wherever they lie: plain values, for a checkpoint's record.

        `samples`, their number; `images`, a hash of their contents in any order; `order`, of their contents in
        order; `all`, of captions and masks as well; `some`, key -> content of eight of them, evenly spread.
        """
        digests = {name: hashlib.blake2b(digest_size=16) for name in ("images", "order", "all")}
        digests["images"].update(np.sort(self.content_hashes).astype("<u8").tobytes())
        digests["order"].update(self.content_hashes.astype("<u8").tobytes())
        for part in (self.content_hashes, self.text_hashes if self.text_hashes is not None else np.zeros(0)):
            digests["all"].update(part.astype("<u8").tobytes())
        some = np.unique(np.linspace(0, len(self) - 1, 8).round().astype(int)).tolist()
        return {
            "samples": len(self),
            **{name: digest.hexdigest() for name, digest in digests.items()},
            "some": {self.key(number): f"{int(self.content_hashes[number]):016x}" for number in some},
        }

    @property
    def fingerprint(self) -> str:
        """A hash of names and sizes: equal when the same samples are there in the same order."""
        digest = hashlib.blake2b(digest_size=16)
        digest.update(self.widths.astype("<i4").tobytes() + self.heights.astype("<i4").tobytes())
        digest.update(self.source.identity())
        return digest.hexdigest()


def mixed_hash(hashes: np.ndarray, text: str) -> np.ndarray:
    """The hashes, changed by a text that goes with all of them; as they are for an empty one.

    Shapes: (N,) uint64 -> (N,) uint64.
    """
    return mixed(hashes ^ np.uint64(content_hash(text.encode()))) if text else hashes


def content_hash(data: bytes) -> int:
    """An image file's content as one number: of its length, its first 32 KB and its last 4 KB.

    Two files that differ only in between, and in nothing else, are taken for the same; no encoder makes such files
    out of different images except uncompressed formats.
    """
    return content_hash_of_parts(len(data), data[:HEAD_BYTES], data[-TAIL_BYTES:])


def content_hash_of_parts(length: int, head: bytes, tail: bytes) -> int:
    """`content_hash` of a file of which only the first 32 KB and the last 4 KB were read."""
    digest = hashlib.blake2b(head[:HEAD_BYTES], digest_size=8)
    if length > HEAD_BYTES:
        digest.update(tail)
    digest.update(length.to_bytes(8, "little"))
    return int.from_bytes(digest.digest(), "little")


def with_masks(images: np.ndarray, masks: np.ndarray) -> np.ndarray:
    """Content hashes of images together with their masks (0: none).

    Shapes: (N,), (N,) uint64 -> (N,) uint64.
    """
    with np.errstate(over="ignore"):
        return np.where(masks == 0, images, mixed(images + mixed(masks)))


def check_unreadable(broken: int, found: int, named: Sequence[str], max_broken_share: float, remedy: str) -> None:
    """Passes when few enough of the found samples cannot be used; `named` are some of them, each with its reason.

    Raises:
        ValueError: too many are, or all.
    """
    if broken and (broken > max_broken_share * found or broken == found):
        raise ValueError(
            f"{broken:,} of {found:,} samples cannot be used, more than max_broken_share {max_broken_share} (for "
            f"example {'; '.join(named[:3])}); {remedy}, or raise max_broken_share"
        )


def check_kept(kept: int, found: int, rejected: dict[str, int]) -> None:
    """Passes when the filters together leave something.

    Raises:
        ValueError: they leave nothing.
    """
    if not kept:
        counts = "; ".join(f"{name} rejects {count:,}" for name, count in rejected.items())
        raise ValueError(f"dataset_filters leave none of {found:,} samples ({counts}); loosen one")


def check_masks(masked: int, found: int, where: str) -> None:
    """Passes when at least one sample has a mask.

    Raises:
        ValueError: none has; a masked loss would then be an ordinary one in silence.
    """
    if not masked:
        raise ValueError(
            f"masks are asked for, but none of {found:,} samples has one; add {where}, or turn masked_loss off"
        )


def missing_captions(count: int, total: int, example: str, captions: str) -> ValueError:
    """The error for samples without a caption."""
    return ValueError(
        f"{count:,} of {total:,} samples have no caption under captions_getter {captions!r}, for example {example}; "
        "name the right member or key, add the captions, or set allow_missing_captions to train them with ''"
    )
