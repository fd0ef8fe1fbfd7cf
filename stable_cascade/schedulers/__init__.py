"""Samplers. Imported on first use, since diffusers comes with them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from stable_cascade.schedulers.stable_cascade_scheduler import StableCascadeScheduler, StableCascadeSchedulerOutput

__all__ = ["StableCascadeScheduler", "StableCascadeSchedulerOutput"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from stable_cascade.schedulers import stable_cascade_scheduler

        return getattr(stable_cascade_scheduler, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
