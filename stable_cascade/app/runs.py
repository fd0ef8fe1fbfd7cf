"""A drawing at work in its own thread: what it tells while it runs, and how it is stopped."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from queue import Queue
from typing import Any

from PIL import Image


class Stopped(Exception):
    """Raised in the drawing's thread once it is asked to stop."""


@dataclass(frozen=True)
class Step:
    """One sampling step that is done."""

    stage: str
    step: int
    total: int
    preview: Image.Image | None


class Run:
    """Runs `work(on_step)` in a thread; `news()` gives its steps and what it yields.

    Args:
        work: takes an `on_step` to call after every step, and yields results.
    """

    def __init__(self, work: Callable[[Callable[..., None]], Iterable[Any]]) -> None:
        self._work = work
        self._stop = threading.Event()
        self._news: Queue[Any] = Queue()
        self._thread = threading.Thread(target=self._run, name="drawing", daemon=True)

    def stop(self) -> None:
        """Ends the work at its next step."""
        self._stop.set()

    def news(self) -> Iterator[Any]:
        """Steps and results, the steps thinned out to the newest; ends when the work does.

        Leaving it early stops the work and waits for it, so that the next run finds the model free.

        Raises:
            Stopped: it was asked to stop.
            Exception: whatever the work raised.
        """
        self._thread.start()
        try:
            waiting: list[Any] = []
            while True:
                one = waiting.pop(0) if waiting else self._news.get()
                for _ in range(self._news.qsize()):  # not until it is empty: the work may be faster than this
                    waiting.append(self._news.get())
                if isinstance(one, _End):
                    if one.error is not None:
                        raise one.error
                    return
                if isinstance(one, Step) and waiting and isinstance(waiting[0], Step):
                    continue
                yield one
        finally:
            self.stop()
            self._thread.join()

    def _run(self) -> None:
        error: BaseException | None = None
        try:
            for result in self._work(self._on_step):
                self._news.put(result)
        except BaseException as raised:  # whatever it is, the reader gets it; a thread would only print it
            error = raised
        self._news.put(_End(error))

    def _on_step(self, stage: str, step: int, total: int, preview: Image.Image | None = None) -> None:
        if self._stop.is_set():
            raise Stopped
        self._news.put(Step(stage, step, total, preview))


@dataclass(frozen=True)
class _End:
    error: BaseException | None
