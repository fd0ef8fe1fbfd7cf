"""Streams at the size of a cluster, by integers alone: no pixels, no shards, 1,024 processes one after the other.

    python -m benchmarks.scale_simulation

A source whose samples are pure functions of (shard, place) stands in for the tars; lanes, shuffle buffers, buckets,
micro-batches and states are the library's own. The last line printed is JSON: `exact`, whether every process reads
shards of its own alone and all of them together each sample of its first turns once, at its position; `balance`, the
fewest samples that a process has read over the most; `resume_exact`, whether processes stopped in the middle go on as
if they had not been.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from typing import Any

from stable_cascade.data.lanes import shard_of
from stable_cascade.data.plan import Plan
from stable_cascade.data.stream import SampleStream, StreamedRow, StreamedRows, StreamState

PROCESSES, SHARDS, SAMPLES_PER_SHARD, STEPS, PARTS = 1024, 100_000, 4, 24, 2
SIZES = ((1024, 1024), (1536, 768), (768, 1536))


@dataclass(frozen=True)
class Synthetic:
    """Lanes of shards that are not there."""

    shards: int

    def lane(self, lane: int, lanes: int, seed: int, cursor: Any, _watches: Any) -> Iterator[tuple[Any, Any]]:
        """A lane's rows from a cursor on, without end."""
        turn, place = cursor or (0, 0)
        while True:
            shard = shard_of(seed, self.shards, lanes, lane, turn)
            for number in range(place, SAMPLES_PER_SHARD):
                width, height = SIZES[(shard + number) % len(SIZES)]
                yield StreamedRow(f"{shard}/{number}", "", width, height, shard, str(shard)), (turn, number + 1)
            turn, place = turn + 1, 0


def simulate(processes: int = PROCESSES, shards: int = SHARDS, steps: int = STEPS) -> dict[str, Any]:
    """What the last line says, as a dictionary."""
    begun = time.monotonic()
    lanes = processes
    stream = SampleStream(Synthetic(shards), shards, lanes, 8 * lanes, 0.1)
    plans = [
        Plan(1024, processes * PARTS * 2, PARTS, processes, process, seed=7, multi_aspect_ratio=["1/1", "1/2"])
        for process in range(processes)
    ]
    owner: dict[str, int] = {}
    positions: set[int] = set()
    shown, read = 0, []
    exact = resume_exact = True
    for process, plan in enumerate(plans):
        rows = StreamedRows(stream, plan, 0)
        micros = list(islice(iter(rows), steps * PARTS))
        states = list(rows.states)
        # Its shards are its own, every micro-batch has one bucket and lies on its positions.
        for number, micro in enumerate(micros):
            part = number % PARTS * processes + process
            exact &= len({item.bucket for item in micro}) == 1
            exact &= all(item.position % (PARTS * processes) == part for item in micro)
            for item in micro:
                shown += 1
                positions.add(item.position)
                exact &= owner.setdefault(item.row.location, process) == process
        lane = states[-1].data["lanes"][process]
        read.append(lane[0][0] * SAMPLES_PER_SHARD + lane[0][1])
        # Stop it in the middle, and go on.
        middle = steps // 2
        saved = StreamState.of(states[middle * PARTS - 1].plain())
        again = list(islice(iter(StreamedRows(stream, plan, middle, saved)), (steps - middle) * PARTS))
        resume_exact &= again == micros[middle * PARTS :]
    # No position is shown twice, and an epoch holds every shard once.
    exact &= len(positions) == shown
    epoch = sorted(shard_of(7, shards, lanes, g % lanes, g // lanes) for g in range(shards))
    exact &= epoch == list(range(shards))
    return {
        "processes": processes,
        "shards": shards,
        "exact": bool(exact),
        "balance": round(min(read) / max(read), 4),
        "resume_exact": bool(resume_exact),
        "seconds": round(time.monotonic() - begun, 2),
    }


if __name__ == "__main__":
    print(json.dumps(simulate()))
