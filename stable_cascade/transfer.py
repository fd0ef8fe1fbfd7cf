"""Small tensors between host and device, without either waiting for the other."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def to_device(tensor: Tensor, device: torch.device | str) -> Tensor:
    """The tensor on the device; on its way to a CUDA device the host goes on.

    A copy from ordinary memory makes the host wait until the device has done all that it was given before; one from
    page-locked memory does not. torch keeps page-locked blocks for reuse, so this allocates nothing after the first
    steps, and gives none away before its copy is done.
    """
    if torch.device(device).type != "cuda" or tensor.is_cuda:
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)


def to_host(values: Tensor) -> Callable[[], list[float]]:
    """A function that returns the numbers; it waits for them alone, not for what the device was given after this call.

    Shapes: (N,) -> N numbers.
    """
    if not values.is_cuda:
        return values.tolist
    arriving = values.to("cpu", non_blocking=True)  # in page-locked memory, which torch chooses for such a copy
    copied = torch.cuda.Event()
    copied.record()

    def read() -> list[float]:
        copied.synchronize()
        return arriving.tolist()

    return read
