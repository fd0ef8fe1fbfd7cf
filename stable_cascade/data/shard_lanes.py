"""Samples of shards in lanes: each shard passed once, from its beginning to its end, when its lane gets to it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from stable_cascade.wording import printable

from .captions import CaptionSource
from .lanes import shard_of
from .locations import ForwardFile, is_remote, open_shard
from .shards import shard_samples
from .stream import StreamedRow, Watches, hash_of_row

_FAILING_IN_A_ROW = 3


@dataclass(frozen=True)
class ShardLanes:
    """The lanes of a list of shards; a cursor is the lane's turn and the byte in that turn's shard."""

    locations: Sequence[str]
    names: Sequence[str]
    fields: Sequence[str]
    captions: CaptionSource
    allow_missing_captions: bool
    masks: bool

    def lane(self, lane: int, lanes: int, seed: int, cursor: Any, watches: Watches) -> Iterator[tuple[Any, Any]]:
        """A lane's usable rows from a cursor on, without end, each with the cursor after it."""
        turn, start = cursor or (0, 0)
        empty = failing = 0
        while True:
            number = shard_of(seed, len(self.locations), lanes, lane, turn)
            usable, fault = 0, ""
            rows = self._rows(number, start, watches)
            # A shard that fails is counted and named, and the lane goes on with its next one.
            while True:
                try:
                    row, end = next(rows)
                except StopIteration:
                    watches.shards.see(1, [])
                    break
                except _Failed as failure:
                    fault = str(failure)
                    watches.shards.see(1, [fault])
                    break
                usable += 1
                yield row, (turn, end)
            # Shards of which nothing can be used may follow each other, but not only they.
            failing = failing + 1 if fault and not usable else 0
            empty = 0 if usable or start else empty + 1
            if failing == _FAILING_IN_A_ROW:
                raise ValueError(f"webdataset_path: {failing} shards in a row cannot be used, the last: {fault}")
            if empty > len(self.locations):
                watches.rejections.finish()
                raise ValueError(f"webdataset_path: no sample of {len(self.locations):,} shards can be used")
            turn, start = turn + 1, 0

    def _rows(self, number: int, start: int, watches: Watches) -> Iterator[tuple[StreamedRow, int]]:
        """The usable rows of one shard, each with the byte at which the next one begins."""
        location = self.locations[number]
        with contextlib.ExitStack() as stack:
            try:
                file: Any = stack.enter_context(ForwardFile(location) if is_remote(location) else open_shard(location))
                samples = shard_samples(file, location, self.fields, self.captions, start)
            except ValueError as error:
                raise _Failed(str(error)) from None
            while True:
                try:
                    key, sample, end = next(samples)
                except StopIteration:
                    return
                except ValueError as error:
                    raise _Failed(str(error)) from None
                row = self._row(printable(f"{self.names[number]}/{key}"), sample, location, file, watches)
                if row is not None:
                    yield row, end
                if isinstance(file, ForwardFile):
                    file.forget(end)

    def _row(self, key: str, sample: Any, location: str, file: Any, watches: Watches) -> StreamedRow | None:
        """The row of a sample; None where it is broken or filtered out.

        Raises:
            ValueError: it has no caption, too many are broken, or a filter rejects all.
        """
        # Readable, and kept by the filters.
        fault = sample.fault or ("" if all(sample.size) else "its image cannot be read")
        if not watches.keeps(key, fault, sample.content or {}, sample.size):
            return None
        # Its caption, and its mask where masks are asked for.
        if not sample.has_caption(self.captions) and not self.allow_missing_captions:
            raise ValueError(
                f"{key} has no caption under captions_getter {self.captions.name!r}; name the right member or key, or "
                "set allow_missing_captions to train it with ''"
            )
        caption = ""
        if sample.has_caption(self.captions):
            caption = self.captions.from_bytes(_read(file, sample.spans[self.captions.member]))
        spans = [sample.spans["image"]]
        if self.masks and "mask" in sample.spans:
            spans.append(sample.spans["mask"])
        hashed = hash_of_row(sample.hash, sample.mask_hash if self.masks else 0)
        # A remote shard is passed only once, so its files are taken along.
        files = tuple(_read(file, span) for span in spans) if isinstance(file, ForwardFile) else ()
        if any(len(data) != span[1] for data, span in zip(files, spans, strict=False)):
            watches.samples.see(0, [f"{key}: its shard ends early"])
            return None
        width, height = sample.size
        return StreamedRow(key, caption, width, height, hashed, location, tuple(spans), files)


class _Failed(Exception):
    """A shard cannot be read, or not to its end."""


def _read(file: Any, span: tuple[int, int]) -> bytes:
    file.seek(span[0])
    return file.read(span[1])
