"""Training: the one loop and what it needs. Imports nothing that knows a network."""

from __future__ import annotations

from importlib import import_module
from typing import Any

_HOMES = {
    "train": "loop",
    "TrainResult": "run",
    "NonFiniteError": "loop",
    "MovingAverage": "ema",
    "averaged": "ema",
    "build_optimizer": "optimizers",
    "learning_rate_share": "optimizers",
    "make_accelerator": "tracking",
    "check_launch": "tracking",
    "picture_folder": "tracking",
    "run_folder": "run_folder",
    "preview_sheet": "sheets",
    "seeded": "randomness",
}

__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    """Import a name's module when it is first asked for, so that `import stable_cascade` stays cheap."""
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
