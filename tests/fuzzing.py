"""Damaged input by the thousand: what runs a case in a bounded child process and says what came of it.

A surface is a way into the package: `make(rng, folder)` writes a damaged file and names what was done to it,
`use(path)` reads it. A case is (surface, number) and nothing else, so that `run_cases('lora', 17, 1)` is again what
failed. The mutators are in fuzzing_headers, fuzzing_lora, fuzzing_images and fuzzing_folders.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import random
import resource
import shutil
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

CPU_SECONDS = 5.0
HANG_SECONDS = 60.0
"""A case may take the first of the processor; after the second on the clock its process is ended as hanging."""
MEMORY = 512 * 2**20
"""How far a batch's peak may rise above what its process had at the start."""
LONGEST_MESSAGE = 500


@dataclass(frozen=True)
class Surface:
    """A way into the package.

    A refusal has to contain the file's name where `names_file`, or one of `subjects`. `address_space` is what a
    process may reserve beyond what it has, so that the memory that a header claims is an error and not taken; building
    a large network without weights reserves some gigabytes and uses none of them.
    """

    name: str
    make: Callable[[random.Random, Path], tuple[str, Path]]
    use: Callable[[Path], Any]
    prepare: Callable[[], Any] = lambda: None
    names_file: bool = True
    subjects: tuple[str, ...] = ()
    address_space: int = 4 * MEMORY


@dataclass
class Outcome:
    """What came of one case: `read`, `refused` (a ValueError in one line), `missing` (OSError), or a defect."""

    surface: str
    number: int
    kind: str
    outcome: str
    message: str = ""
    seconds: float = 0.0
    trace: str = ""

    @property
    def is_defect(self) -> bool:
        return self.outcome.startswith("DEFECT")


@dataclass
class Report:
    """The outcomes of a run, and by how much the memory of its hungriest process grew."""

    outcomes: list[Outcome] = field(default_factory=list)
    peak_growth: int = 0

    def add(self, other: Report) -> None:
        self.outcomes += other.outcomes
        self.peak_growth = max(self.peak_growth, other.peak_growth)

    @property
    def defects(self) -> list[Outcome]:
        return [outcome for outcome in self.outcomes if outcome.is_defect]

    def counts(self) -> dict[str, dict[str, int]]:
        """Number of cases by surface and outcome."""
        table: dict[str, Counter] = {}
        for one in self.outcomes:
            table.setdefault(one.surface, Counter())[one.outcome] += 1
        return {name: dict(sorted(counter.items())) for name, counter in sorted(table.items())}

    def told(self, limit: int = 10) -> str:
        """The first defects, for an assertion's message."""
        lines = [
            f"{one.surface} {one.number} [{one.kind}] {one.outcome}: {one.message[:300]}\n{one.trace[-1500:]}"
            for one in self.defects[:limit]
        ]
        return f"{len(self.defects)} defects\n" + "\n".join(lines)


def run_case(surface: Surface, number: int, folder: Path) -> Outcome:
    """One case in this process."""
    rng = random.Random(f"{surface.name}/{number}")
    kind, path = surface.make(rng, folder)
    started = time.process_time()
    outcome, message, trace = "read", "", ""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            surface.use(path)
    except ValueError as error:
        message = str(error)
        outcome = _judged(message, (path.name, *surface.subjects) if surface.names_file else ())
        trace = "" if outcome == "refused" else traceback.format_exc()
    except OSError as error:
        outcome, message = "missing", str(error)
    except Exception as error:
        outcome, message, trace = f"DEFECT {type(error).__name__}", str(error), traceback.format_exc()
    seconds = time.process_time() - started
    if seconds > CPU_SECONDS:
        outcome, message = f"DEFECT slow ({seconds:.1f} s)", message
    return Outcome(surface.name, number, kind, outcome, message[:2000], seconds, trace)


def _judged(message: str, subjects: Sequence[str]) -> str:
    """`refused` for a message as the rules want it, or what is wrong with it."""
    if not message or len(message.splitlines()) != 1 or not message.isprintable():
        return "DEFECT message is not one printable line"
    if len(message) >= LONGEST_MESSAGE:
        return f"DEFECT message of {len(message)} characters"
    if subjects and not any(subject in message for subject in subjects):
        return "DEFECT message does not name the file"
    return "refused"


def run_cases(surface: Surface, first: int, count: int) -> Report:
    """Cases `first` to `first + count - 1`, in child processes with bounded memory that are ended when they hang."""
    report, number = Report(), first
    surface.prepare()
    while number < first + count:
        part = _in_child(surface, number, first + count - number)
        report.add(part)
        number = part.outcomes[-1].number + 1
    return report


def _in_child(surface: Surface, first: int, count: int) -> Report:
    """As many of the cases as a child process survives; the one that it does not survive is the last."""
    with tempfile.TemporaryDirectory() as name:
        log = Path(name) / "log"
        sys.stdout.flush()
        child = os.fork()
        if not child:
            try:
                _work(surface, range(first, first + count), Path(name), log)
                os._exit(0)
            except BaseException:
                Path(name, "trace").write_text(traceback.format_exc())
            finally:
                os._exit(1)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        lines = [json.loads(line) for line in log.read_text().splitlines()] if log.exists() else []
        report = Report([Outcome(**line) for line in lines if "outcome" in line])
        report.peak_growth = max((line["growth"] for line in lines if "growth" in line), default=0)
        if status:
            number = lines[-1]["begun"] if lines and "begun" in lines[-1] else first
            trace = Path(name, "trace").read_text(errors="replace") if Path(name, "trace").exists() else ""
            what = "DEFECT hang" if "Timeout" in trace else f"DEFECT crash (status {status})"
            report.outcomes.append(Outcome(surface.name, number, "?", what, trace=trace))
        return report


def _work(surface: Surface, numbers: Sequence[int], folder: Path, log: Path) -> None:
    """The child's part. Every case is written down before it runs."""
    import torch

    torch.set_num_threads(1)  # a forked process has no other threads than its own
    before = _resident()
    limit = _virtual() + surface.address_space
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    devnull = open(os.devnull, "w")
    with open(folder / "trace", "w") as trace, open(log, "w") as written, contextlib.redirect_stdout(devnull):
        os.dup2(devnull.fileno(), 2)
        faulthandler.enable(trace)
        for number in numbers:
            written.write(json.dumps({"begun": number}) + "\n")
            written.flush()
            faulthandler.dump_traceback_later(HANG_SECONDS, exit=True, file=trace)
            place = folder / "case"
            place.mkdir()
            outcome = run_case(surface, number, place)
            faulthandler.cancel_dump_traceback_later()
            shutil.rmtree(place)
            written.write(json.dumps(outcome.__dict__) + "\n")
        growth = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
        written.write(json.dumps({"growth": growth}) + "\n")


def _resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def _virtual() -> int:
    return int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
