"""Two callables timed in turns in one process, and the rows that come out."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Row:
    """One line of the results; `ratio` is above 1 where ours is better, `spread` its lowest and highest pair.

    `cpu` is the ratio of the processor's times, of all threads together, which a loaded machine does not distort.
    """

    row: str
    ours: float
    peer: float | None
    unit: str
    ratio: float | None
    spread: tuple[float, float] | None
    peer_name: str
    note: str = ""
    cpu: float | None = None

    def entry(self) -> dict[str, Any]:
        """The row as JSON has it."""
        return asdict(self)


def synchronise() -> None:
    """Waits for the GPU, where there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def seconds(function: Callable[[], Any]) -> float:
    """How long one call takes."""
    return both_times(function)[0]


def both_times(function: Callable[[], Any]) -> tuple[float, float]:
    """How long one call takes, and how long its process computes in that time, in seconds."""
    synchronise()
    start = time.perf_counter(), time.process_time()
    function()
    synchronise()
    return time.perf_counter() - start[0], time.process_time() - start[1]


def memory(device: str = "cpu") -> float:
    """The most memory this program has held so far, in GiB; on a CPU of Linux, where a program's own is told.

    `resource.getrusage` would begin with that of the program that started this one.
    """
    if device == "cuda":
        return torch.cuda.max_memory_allocated() / 2**30
    with open("/proc/self/status", encoding="ascii") as status:
        return next(int(line.split()[1]) for line in status if line.startswith("VmHWM")) / 2**20


def forget_memory(device: str = "cpu") -> None:
    """Lets `memory` begin anew at what is held now."""
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    else:
        with open("/proc/self/clear_refs", "w", encoding="ascii") as reset:
            reset.write("5")


def in_turns(
    row: str,
    ours: Callable[[], Any],
    peer: Callable[[], Any],
    *,
    peer_name: str,
    rounds: int = 7,
    warmup: int = 1,
    amount: float = 1.0,
    unit: str = "s",
    note: str = "",
) -> Row:
    """Both timed `rounds` times, A B B A A B …, so that a machine that slows down slows both.

    The ratio is the median of the ratios of the pairs. With another unit than seconds, `amount` of it is what one call
    does, and the row gives amounts per second.
    """
    for _ in range(warmup):
        ours()
        peer()
    pairs = []
    for number in range(rounds):
        if number % 2:
            theirs, own = both_times(peer), both_times(ours)
        else:
            own, theirs = both_times(ours), both_times(peer)
        pairs.append((own, theirs))
    wall, processor = (sorted(theirs[kind] / own[kind] for own, theirs in pairs) for kind in (0, 1))
    taken = [statistics.median(one[0] for one in column) for column in zip(*pairs, strict=True)]
    own_shown, theirs_shown = taken if unit == "s" else (amount / one for one in taken)
    return Row(
        row, own_shown, theirs_shown, unit, statistics.median(wall), (wall[0], wall[-1]), peer_name, note,
        None if torch.cuda.is_available() else statistics.median(processor),
    )  # fmt: skip
