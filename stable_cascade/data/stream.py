"""Training on a set that is read while it trains: lanes of shards, buckets filled on the way, resumable anywhere.

Position p shows the next sample of lane p % lanes. Of the step's micro-batches, number f of M takes the positions
p with p % M = f and fills its own buckets with them; process q of P owns those with f % P = q, whose positions lie in
lanes that no other process reads.
"""

from __future__ import annotations

import functools
import itertools
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy as np
from torch.utils.data import Dataset

from stable_cascade import bounds
from stable_cascade.disk import read_file

from .decoding import BrokenWatch, Candidate, Decoded, Decoder, Place, Undecodable, identity_of
from .draws import draws, sample_seeds
from .filters import Filter, RejectionWatch, with_size
from .lanes import buffer_size, check_lanes, lane_count
from .locations import ByteReader
from .plan import Buckets, Plan, with_random_buckets
from .samples import with_masks

_FALLBACKS = 3
Span = tuple[int, int]


class StreamedRow(NamedTuple):
    """One usable sample, not decoded: its files, or where they are in a shard. Plain values, for a checkpoint."""

    key: str
    caption: str
    width: int
    height: int
    content_hash: int
    location: str = ""
    spans: tuple[Span, ...] = ()
    """Of the image, and of the mask where there is one."""
    files: tuple[bytes, ...] = ()
    """The same files, where they were read already."""


class Watches(NamedTuple):
    """What is counted while a stream is read: broken samples, shards that fail, rejections by filters."""

    samples: BrokenWatch
    shards: BrokenWatch
    rejections: RejectionWatch

    def keeps(self, key: str, fault: str, values: Mapping[str, Any], size: tuple[int, int] | None) -> bool:
        """Whether a sample is readable and passes the filters; counts it either way.

        Raises:
            ValueError: too many are broken, or a filter rejects all.
        """
        self.samples.see(1, [f"{key}: {fault}"] if fault else [])
        if fault or not self.rejections.filters:
            return not fault
        return all(self.rejections.verdicts(with_size(dict(values), size or (0, 0))))


class LaneSource(Protocol):
    """Where a stream's samples come from."""

    def lane(self, lane: int, lanes: int, seed: int, cursor: Any, watches: Watches) -> Iterator[tuple[Any, Any]]:
        """A lane's usable rows from a cursor (None: the beginning) on, without end, each with the cursor after it.

        Raises:
            ValueError: too much cannot be read, or nothing is usable.
        """


@dataclass(frozen=True)
class SampleStream:
    """Samples that are read in lanes while the training goes on.

    Attributes:
        shards: how many there are.
        lanes_wanted: how many shards to read at a time, over all processes; `lanes` says how many are.
        shuffle_buffer: samples that all lanes together hold to draw from.
        why: what the plan says about it.
    """

    source: LaneSource
    shards: int
    lanes_wanted: int
    shuffle_buffer: int
    max_broken_share: float
    filters: tuple[Filter, ...] = ()
    masks: bool = False
    why: str = ""

    @functools.cached_property
    def lanes(self) -> int:
        """How many shards are read at a time: a divisor of what was asked for, so that no lane is without one."""
        return lane_count(self.lanes_wanted, self.shards)

    def __str__(self) -> str:
        return f"a stream of {self.shards:,} shards in {self.lanes} lanes" + (f" ({self.why})" if self.why else "")

    def check_processes(self, num_processes: int) -> None:
        """Passes when the processes can share out the lanes.

        Raises:
            ValueError: they cannot.
        """
        check_lanes(self.lanes, self.lanes_wanted, self.shards, num_processes)

    def watches(self) -> Watches:
        """Fresh counts."""
        share = self.max_broken_share
        return Watches(BrokenWatch(share), BrokenWatch(share, what="shards"), RejectionWatch(self.filters))

    def first(self) -> StreamedRow:
        """The first usable row, to find out early whether there is one.

        Raises:
            ValueError: there is none, or the settings do not fit the samples.
        """
        return next(self.source.lane(0, self.lanes, 0, None, self.watches()))[0]


@dataclass(frozen=True)
class StreamState:
    """Where one process, or all together, are in a stream after a step: plain values under `data`."""

    data: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def merged(cls, parts: Iterable[StreamState]) -> StreamState:
        """The states of all processes as one."""
        parts = list(parts)
        lanes = {lane: held for part in parts for lane, held in part.data["lanes"].items()}
        waiting = sorted(pair for part in parts for pair in part.data["waiting"])
        ready = [micro for part in parts for micro in part.data["ready"]]
        return cls({**parts[0].data, "lanes": lanes, "waiting": waiting, "ready": ready})

    def plain(self) -> dict[str, Any]:
        """For a checkpoint: rows as tuples, and of files that can be read again only where they are."""
        return self._mapped(_reference)

    @classmethod
    def of(cls, plain: Mapping[str, Any]) -> StreamState:
        """The state that `plain` gave."""
        return cls(cls(dict(plain))._mapped(_row_of))

    def _mapped(self, change: Callable[[Any], Any]) -> dict[str, Any]:
        """The values with every row changed."""
        data = self.data
        pairs = [(position, change(row)) for position, row in data["waiting"]]
        lanes = {
            lane: (cursor, shown, tuple(change(row) for row in rows))
            for lane, (cursor, shown, rows) in data["lanes"].items()
        }
        ready = [
            (number, bucket, tuple((at, change(row)) for at, row in rows), tuple(change(row) for row in spare))
            for number, bucket, rows, spare in data["ready"]
        ]
        return {**data, "lanes": lanes, "waiting": pairs, "ready": ready}


def _reference(row: StreamedRow) -> tuple[Any, ...]:
    return tuple(_light(row))


def _row_of(values: Sequence[Any]) -> StreamedRow:
    return StreamedRow(*values)


class _Lane:
    """One lane while it is read: what it holds to draw from, and where it goes on."""

    def __init__(self, stream: SampleStream, seed: int, number: int, watches: Watches, saved: Any):
        self.stream, self.seed, self.number = stream, seed, number
        self.cursor: Any
        self.shown: int
        self.cursor, self.shown, rows = saved or (None, 0, ())
        self.rows: list[StreamedRow] = list(rows)
        self.full = stream.shuffle_buffer // stream.lanes
        self.source = stream.source.lane(number, stream.lanes, seed, self.cursor, watches)

    @property
    def position(self) -> int:
        """Of the next sample."""
        return self.number + self.stream.lanes * self.shown

    def next(self) -> StreamedRow:
        """A sample drawn from those that it holds, after filling up."""
        while len(self.rows) < buffer_size(self.full, self.shown):
            row, self.cursor = next(self.source)
            self.rows.append(row)
        chosen = int(draws(self.seed, "shuffle buffer", np.array([self.position]))[0]) % (len(self.rows) - 1)
        self.shown += 1
        # The last one takes the place of the one that leaves.
        last = self.rows.pop()
        if chosen == len(self.rows):
            return last
        row, self.rows[chosen] = self.rows[chosen], last
        return row

    def state(self) -> tuple[Any, int, tuple[StreamedRow, ...]]:
        return self.cursor, self.shown, tuple(self.rows)


@dataclass(frozen=True)
class StreamedItem:
    """What a worker gets: the row, and others that may replace it."""

    position: int
    bucket: int
    row: StreamedRow
    fallbacks: tuple[StreamedRow, ...]


class StreamedRows:
    """The batch sampler of a stream: one list of items for every micro-batch, made while reading.

    `states` gets, for every micro-batch in order, where the stream stands after its step.
    """

    def __init__(self, stream: SampleStream, plan: Plan, start_step: int, state: StreamState | None = None):
        stream.check_processes(plan.num_processes)
        if state is not None and state.data["set"] != (stream.shards, stream.lanes):
            shards, lanes = state.data["set"]
            raise ValueError(
                f"the stream that this run began with had {shards:,} shards in {lanes} lanes, and now has "
                f"{stream.shards:,} in {stream.lanes}; give the same shards, or start anew from the trained weights "
                "with another experiment_id"
            )
        self.stream, self.plan, self.start_step, self.state = stream, plan, start_step, state
        self.states: deque[StreamState] = deque()

    def __iter__(self) -> Iterator[list[StreamedItem]]:
        plan, reader = self.plan, _Reader(self.stream, self.plan, self.state)
        first = self.state.data["step"] if self.state is not None else 0
        numbers = [micro * plan.num_processes + plan.process_index for micro in range(plan.grad_accum_steps)]
        for step in itertools.count(first):
            # All micro-batches of the step, and then the state that they leave.
            micros = [reader.micro_batch(number) for number in numbers]
            if step < self.start_step:
                continue
            after = reader.state(step + 1)
            for micro in micros:
                self.states.append(after)
                yield micro


class _Reader:
    """One process's lanes, and the buckets that their samples fill."""

    def __init__(self, stream: SampleStream, plan: Plan, state: StreamState | None):
        self.stream, self.plan = stream, plan
        self.parts = plan.grad_accum_steps * plan.num_processes
        self.size = plan.batch_size // self.parts
        empty: dict[str, Any] = {"lanes": {}, "waiting": [], "ready": [], "parts": self.parts}
        saved = state.data if state is not None else empty
        watches = stream.watches()
        mine = range(plan.process_index, stream.lanes, plan.num_processes)
        self.lanes = {lane: _Lane(stream, plan.seed, lane, watches, saved["lanes"].get(lane)) for lane in mine}
        # Full buckets per micro-batch number, and what waits in the others.
        self.ready: dict[int, deque[_Full]] = {}
        self.waiting: dict[tuple[int, int], list[tuple[int, StreamedRow]]] = {}
        pairs = list(saved["waiting"])
        if saved["parts"] == self.parts:
            for number, *full in saved["ready"]:
                if number % plan.num_processes == plan.process_index:
                    self.ready.setdefault(number, deque()).append(_Full(*full))
        else:  # with other parts of a step, full buckets are dealt out anew
            pairs = sorted(pairs + [pair for _, _, rows, _ in saved["ready"] for pair in rows])
        for position, row in pairs:
            if position % plan.num_processes == plan.process_index:
                self._add(position, row)

    def micro_batch(self, number: int) -> list[StreamedItem]:
        """The next micro-batch of a number; reads until one of its buckets is full."""
        ready = self.ready.setdefault(number, deque())
        while not ready:
            lane = min(self.lanes.values(), key=lambda lane: lane.position)
            position = lane.position
            self._add(position, lane.next())
        full = ready.popleft()
        rows, items = [row for _, row in full.rows], []
        for place, (position, row) in enumerate(full.rows):
            others = [*rows[place + 1 :], *rows[:place], *full.spare][:_FALLBACKS]
            items.append(StreamedItem(position, full.bucket, row, tuple(map(_light, others))))
        return items

    def _add(self, position: int, row: StreamedRow) -> None:
        """Puts a sample into its bucket, the same as in an index."""
        plan, where = self.plan, np.array([position])
        nearest = plan.buckets.nearest(np.array([row.width]), np.array([row.height]))
        drawn = with_random_buckets(nearest, where, plan.buckets, seed=plan.seed, share=plan.random_bucket_share)
        number, bucket = position % self.parts, int(drawn[0])
        rows = self.waiting.setdefault((number, bucket), [])
        rows.append((position, row))
        if len(rows) == self.size:
            # What its lane holds stands in for a broken one; now, so that it depends on the position alone.
            spare = tuple(self.lanes[position % self.stream.lanes].rows[:_FALLBACKS])
            del self.waiting[number, bucket]
            self.ready.setdefault(number, deque()).append(_Full(bucket, tuple(rows), spare))

    def state(self, step: int) -> StreamState:
        """Where this process goes on with a step."""
        return StreamState({
            "step": step,
            "parts": self.parts,
            "set": (self.stream.shards, self.stream.lanes),
            "lanes": {lane.number: lane.state() for lane in self.lanes.values()},
            "waiting": sorted(pair for rows in self.waiting.values() for pair in rows),
            "ready": [(number, *full) for number, ready in self.ready.items() for full in ready],
        })  # fmt: skip


class _Full(NamedTuple):
    """A full bucket: its rows with their positions, and what may replace a broken one."""

    bucket: int
    rows: tuple[tuple[int, StreamedRow], ...]
    spare: tuple[StreamedRow, ...]


def _light(row: StreamedRow) -> StreamedRow:
    """The row without its files, where a worker can read them again if it ever needs them."""
    return row._replace(files=()) if row.location else row


def hash_of_row(image: int, mask: int) -> int:
    """A sample's content hash as an index has it, from those of its image and its mask (0: none)."""
    return int(with_masks(np.array([image], np.uint64), np.array([mask], np.uint64))[0])


class StreamedImages(Dataset):
    """Decodes a `StreamedItem`; a broken row is replaced by its neighbours in the micro-batch, or by what waits."""

    def __init__(self, buckets: Buckets, decoder: Decoder):
        self.buckets, self.decoder, self.reader = buckets, decoder, ByteReader()

    def __getitem__(self, item: StreamedItem) -> Decoded | Undecodable:
        candidates = (
            Candidate(
                row.key,
                row.content_hash,
                functools.partial(self._content, row),
                functools.partial(self._mask, row),
            )
            for row in (item.row, *item.fallbacks)
        )
        return self.decoder.first_decodable(candidates, Place(item.position, self.buckets.sizes[item.bucket]))

    def _content(self, row: StreamedRow) -> tuple[bytes, str]:
        return row.files[0] if row.files else self.reader.read(row.location, row.spans[:1])[0], row.caption

    def _mask(self, row: StreamedRow) -> bytes | None:
        if row.files:
            return row.files[1] if len(row.files) > 1 else None
        return self.reader.read(row.location, row.spans[1:])[0] if len(row.spans) > 1 else None

    def undecoded(self, item: StreamedItem) -> Decoded:
        """The row without its image."""
        known = self.decoder.known_broken
        rows = (item.row, *item.fallbacks)
        shown = next((row for row in rows if row.key not in known), None)
        if shown is None:
            raise ValueError(f"{len(rows)} samples in a row are broken, the last is {rows[-1].key}; check the data")
        where, choice = np.array([item.position]), self.decoder.choice
        identity = identity_of(shown.key, shown.content_hash, self.buckets.sizes[item.bucket], choice.names(where)[0])
        passed = tuple(row.key for row in rows[: rows.index(shown)])
        seed = int(sample_seeds(choice.seed, where)[0])
        return Decoded(None, shown.caption, shown.key, seed, item.position, passed, identity=identity)


@dataclass(frozen=True)
class HubColumns:
    """The columns' names; `mask` is None where masks are not asked for."""

    image: str
    caption: str
    allow_missing_captions: bool = False
    mask: str | None = None

    def image_file(self, row: Mapping[str, Any]) -> bytes:
        """The image file in a row.

        Raises:
            ValueError: the row has none.
        """
        found = _file(row[self.image])
        if found is None:
            raise ValueError(f"the column {self.image!r} holds no image")
        return found

    def mask_file(self, row: Mapping[str, Any]) -> bytes | None:
        """The mask in a row; None when there is none, or masks are not asked for."""
        return None if self.mask is None else _file(row.get(self.mask))

    def text(self, row: Mapping[str, Any]) -> str | None:
        """The caption in a row, the first one of a list; None when there is none."""
        value = row.get(self.caption)
        if isinstance(value, Sequence) and not isinstance(value, str):
            value = value[0] if value else None
        return value.strip() if isinstance(value, str) else None


def _file(value: Any) -> bytes | None:
    """The bytes of an image, given as such, as a path, or as the pair of both that `datasets` stores."""
    if isinstance(value, Mapping):
        if value.get("bytes"):
            return value["bytes"]
        value = value.get("path")
    if isinstance(value, bytes):
        return value
    if isinstance(value, str) and os.path.isfile(value):
        return read_file(value, at_most=bounds.IMAGE_FILE, what="image")
    return None
