"""Which shard a lane reads when: integers alone, the same for any number of processes and workers.

The shards of epoch after epoch form one endless sequence, a permutation of all of them per epoch; shard g of it
belongs to lane g % lanes. Position p of a training shows the next sample of lane p % lanes, and process q of P reads
the lanes q, q + P, q + 2 P, …, so that every process reads its own shards and no others.

Source: the canonical nodes of MosaicML Streaming, which also keep the order apart from the number of machines.
"""

from __future__ import annotations

import functools

import numpy as np

from .draws import permutation


def lane_count(wanted: int, shards: int) -> int:
    """The largest divisor of `wanted` that is not above the number of shards, so that no lane is without one."""
    return max(number for number in range(1, min(wanted, shards) + 1) if wanted % number == 0)


def check_lanes(lanes: int, wanted: int, shards: int, num_processes: int) -> None:
    """Passes when the processes can share out the lanes.

    Raises:
        ValueError: they cannot.
    """
    if lanes % num_processes == 0:
        return
    if shards < num_processes:
        raise ValueError(
            f"{num_processes} processes cannot stream {shards:,} shards, each process needs one of its own; "
            "make more shards, or set streaming: false"
        )
    above = -(-wanted // num_processes) * num_processes
    nearest = above if above <= shards else shards // num_processes * num_processes
    raise ValueError(
        f"{num_processes} processes cannot share {lanes} lanes (stream_lanes {wanted}, {shards:,} shards); set "
        f"stream_lanes to a multiple of {num_processes} that is not above the number of shards, nearest: {nearest}"
    )


def shard_of(seed: int, shards: int, lanes: int, lane: int, turn: int) -> int:
    """The number of the shard that a lane reads at its turn 0, 1, 2, … without end."""
    epoch, place = divmod(lane + lanes * turn, shards)
    return int(_shuffled(seed, epoch, shards)[place])


@functools.lru_cache(maxsize=4)
def _shuffled(seed: int, epoch: int, shards: int) -> np.ndarray:
    return permutation(seed, epoch, shards, "shards of epoch")


def buffer_size(full: int, shown: int) -> int:
    """How many samples a lane holds before it shows the next one.

    It grows with what was shown, so that the first step waits for few samples and not for a full buffer. At least one
    stays behind to stand in for a broken sample.
    """
    return max(2, min(full, shown + 2))
