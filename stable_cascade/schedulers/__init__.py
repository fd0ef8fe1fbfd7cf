"""Samplers as a diffusers scheduler. Imported on first use, since diffusers comes with it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from stable_cascade.lazy import lazy_exports

if TYPE_CHECKING:
    from .stable_cascade_scheduler import StableCascadeScheduler, StableCascadeSchedulerOutput

__all__ = ["StableCascadeScheduler", "StableCascadeSchedulerOutput"]

__getattr__, __dir__ = lazy_exports(globals())
