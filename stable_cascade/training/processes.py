"""The processes of a launch: what they exchange, and what ends them early, a signal or one process's error."""

from __future__ import annotations

import os
import signal
import sys
import threading
from types import FrameType, TracebackType
from typing import Any


def gathered(accelerator: Any, own: Any) -> list[Any]:
    """The objects of all processes, in their order; all of them have to call it together."""
    if accelerator.num_processes == 1:
        return [own]
    from accelerate.utils import gather_object

    return gather_object([own])


def broadcast(accelerator: Any, value: Any) -> Any:
    """The main process's object, on all processes; all of them have to call it together."""
    from accelerate.utils import broadcast_object_list

    values = [value]
    if accelerator.num_processes > 1:
        broadcast_object_list(values)
    return values[0]


class StopRequest:
    """Inside its `with` block SIGTERM, SIGINT and SIGHUP set `wanted`; a second one has its usual effect.

    SIGHUP is what a closed terminal sends; where it is ignored, as under `nohup`, it stays so.
    """

    signals = tuple(getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP") if hasattr(signal, name))

    def __init__(self) -> None:
        self.wanted = False
        self._usual: dict[int, Any] = {}

    def __enter__(self) -> StopRequest:
        if threading.current_thread() is threading.main_thread():
            wanted = [number for number in self.signals if signal.getsignal(number) is not signal.SIG_IGN]
            self._usual = {number: signal.signal(number, self._note) for number in wanted}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._restore()

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.wanted = True
        self._restore()

    def _restore(self) -> None:
        for number, usual in self._usual.items():
            signal.signal(number, usual)
        self._usual = {}


class ProcessFailedError(ValueError):
    """Another process of the training failed; its own error says why."""


class SharedFailure:
    """Inside its `with` block the error of one process ends all processes, and each of them names it.

    Without it the others would wait for the failed one in their next exchange, for as long as the backend's timeout,
    and then report a lost connection. The error goes through the store that the processes met at.
    """

    key, grace = "stable_cascade/failure", 10.0

    def __init__(self, accelerator: Any) -> None:
        """`grace` seconds after it learns of a failure elsewhere, a process that is still stuck ends itself."""
        self.process = accelerator.process_index
        self.over = threading.Event()
        self.store: Any = None
        if accelerator.num_processes > 1:
            import torch.distributed as dist

            self.store = dist.distributed_c10d._get_default_store() if dist.is_initialized() else None

    def __enter__(self) -> SharedFailure:
        if self.store is not None:
            threading.Thread(target=self._watch, daemon=True).start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.over.set()
        if self.store is None or error is None:
            return
        own = " ".join(f"{type(error).__name__}: {error}".split())
        try:
            process, first = self.store.compare_set(self.key, "", f"{self.process}\n{own}").decode().split("\n")
        except (RuntimeError, ValueError):
            return  # whoever kept the store is gone
        if first != own and int(process) != self.process:
            raise ProcessFailedError(f"process {process} failed: {first}") from error

    def _watch(self) -> None:
        """Look for a failure elsewhere every second; end this process if it is stuck afterwards."""
        try:
            while not self.over.wait(1.0):
                if self.store.check([self.key]):
                    break
            if self.over.wait(self.grace):
                return
            process, first = self.store.get(self.key).decode().split("\n")
        except (RuntimeError, ValueError):
            return
        sys.stderr.write(f"error: process {process} failed: {first}\n")
        sys.stderr.flush()
        os._exit(1)  # the main thread waits in a collective that no exception reaches
