"""Training: the one loop and what it needs. Imports nothing that knows a network."""

from __future__ import annotations

from typing import TYPE_CHECKING

from stable_cascade.lazy import lazy_exports

if TYPE_CHECKING:
    from .loop import NonFiniteError, seeded, train
    from .optimizers import MovingAverage, averaged, build_optimizer, learning_rate_share
    from .run import TrainResult
    from .sheets import preview_sheet
    from .tracking import check_launch, image_folder, make_accelerator

__all__ = [
    "MovingAverage",
    "NonFiniteError",
    "TrainResult",
    "averaged",
    "build_optimizer",
    "check_launch",
    "image_folder",
    "learning_rate_share",
    "make_accelerator",
    "preview_sheet",
    "seeded",
    "train",
]

__getattr__, __dir__ = lazy_exports(globals())
