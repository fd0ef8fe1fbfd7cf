"""A drawing at work in its own thread: what it tells while it runs, and how it is stopped."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
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
        self._news: deque[Any] = deque()
        self._told = threading.Condition()
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
            while not isinstance(one := self._next(), _End):
                yield one
            if one.error is not None:
                raise one.error
        finally:
            self.stop()
            self._thread.join()

    def _run(self) -> None:
        error: BaseException | None = None
        try:
            for result in self._work(self._on_step):
                self._tell(result)
        except BaseException as raised:  # whatever it is, the reader gets it; a thread would only print it
            error = raised
        self._tell(_End(error))

    def _on_step(self, stage: str, step: int, total: int, preview: Image.Image | None = None) -> None:
        if self._stop.is_set():
            raise Stopped
        self._tell(Step(stage, step, total, preview))

    def _tell(self, one: Any) -> None:
        with self._told:
            if self._news and isinstance(one, Step) and isinstance(self._news[-1], Step):
                self._news[-1] = one  # nobody looked at the one before
            else:
                self._news.append(one)
            self._told.notify()

    def _next(self) -> Any:
        with self._told:
            self._told.wait_for(lambda: self._news)
            return self._news.popleft()


@dataclass(frozen=True)
class _End:
    error: BaseException | None
