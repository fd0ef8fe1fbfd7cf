"""A toy training killed in the middle of writing, at many places: python tests/dying_run.py FOLDER

Every file that is opened, renamed or deleted in the run's folder is an event; the program counts those of a whole
run, then trains anew and kills itself (SIGKILL) at one of them, then resumes, and prints a line of JSON per place.
Children are forked, because starting Python costs more than training.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import torch

from tests.toy_run import saved, toy_config, toy_train

EVENTS = ("open", "os.mkdir", "os.rename", "os.remove", "os.rmdir", "os.link")
CHANGES = {"save_every": 3, "backup_every": 6, "checkpoints_total_limit": 1}


def in_child(work: Callable[[], None]) -> int:
    """Does the work in a forked process; its exit status, negative for a signal."""
    sys.stdout.flush()
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    try:
        with contextlib.redirect_stdout(open(os.devnull, "w")), contextlib.redirect_stderr(open(os.devnull, "w")):
            work()
        os._exit(0)
    except BaseException:
        os.write(2, traceback.format_exc().encode())
    finally:
        os._exit(1)


def count_events(run: Path, last: int) -> list[str]:
    """Begins to count; with event number `last` the process kills itself."""
    seen: list[str] = []

    def note(event: str, arguments: tuple) -> None:
        if (
            event not in EVENTS
            or not isinstance(arguments[0], (str, Path))
            or not str(arguments[0]).startswith(str(run))
        ):
            return
        seen.append(event)
        if len(seen) == last:
            os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(note)
    return seen


def main() -> None:
    root = Path(sys.argv[1])
    places = int(sys.argv[2])

    def whole() -> None:
        seen = count_events(root / "whole/runs", -1)
        toy_train(toy_config(root / "whole", **CHANGES))
        (root / "events").write_text(str(len(seen)))

    assert in_child(whole) == 0
    count = int((root / "events").read_text())
    good = saved(root / "whole/runs/toy/final")
    for place in sorted({round(count * (k + 0.5) / places) for k in range(places)}):
        folder = root / str(place)

        def die(folder: Path = folder, place: int = place) -> None:
            count_events(folder / "runs", place)
            toy_train(toy_config(folder, **CHANGES))

        status = in_child(die)
        left = sorted(path.name for path in (folder / "runs").glob("*/*"))
        again = in_child(lambda folder=folder: toy_train(toy_config(folder, **CHANGES)))
        end = saved(folder / "runs/toy/final")
        same = all(torch.equal(end[kind][name], good[kind][name]) for kind in good for name in good[kind])
        rest = sorted(path.name for path in (folder / "runs/toy").glob(".tmp*"))
        print(json.dumps({"place": place, "of": count, "status": status, "left": left, "again": again, "same": same,
                          "rest": rest}))  # fmt: skip


if __name__ == "__main__":
    main()
