"""What the processes of a launch tell each other; every function here is called by all of them together."""

from __future__ import annotations

from typing import Any


def told(accelerator: Any, own: Any) -> list[Any]:
    """What every process has to say, in their order."""
    if accelerator.num_processes == 1:
        return [own]
    from accelerate.utils import gather_object

    return gather_object([own])


def shared(accelerator: Any, value: Any) -> Any:
    """The main process's value, on all of them."""
    from accelerate.utils import broadcast_object_list

    values = [value]
    if accelerator.num_processes > 1:
        broadcast_object_list(values)
    return values[0]
