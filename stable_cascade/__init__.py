"""Stable Cascade: networks, trainings and pipelines.

Importing this package loads nothing heavy: every public name is resolved on first use (a test compares the import
with `import torch`).
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

# Public name -> the module that defines it. The layer test reads this table too.
_EXPORTS = {
    "StableCascadePipeline": "stable_cascade.pipelines",
    "StableCascadeCombinedPipeline": "stable_cascade.pipelines",
    "StableCascadePriorPipeline": "stable_cascade.pipelines",
    "StableCascadeDecoderPipeline": "stable_cascade.pipelines",
    "StableCascadeReconstructionPipeline": "stable_cascade.pipelines",
    "StableCascadePrior": "stable_cascade.models",
    "StableCascadeDecoder": "stable_cascade.models",
    "StableCascadeVQGAN": "stable_cascade.models",
    "StableCascadeUNet": "stable_cascade.models",
    "StableCascadeImageEncoder": "stable_cascade.models",
    "StableCascadePreviewer": "stable_cascade.models",
    "StableCascadeControlNet": "stable_cascade.models",
    "StableCascadeMultiControlNet": "stable_cascade.models",
    "StableCascadeScheduler": "stable_cascade.schedulers",
}
_SUBMODULES = (
    "adapters",
    "config",
    "controls",
    "data",
    "diffusion",
    "drawing",
    "embedded",
    "estimate",
    "factory",
    "formats",
    "models",
    "objectives",
    "pipelines",
    "schedulers",
    "trainers",
    "training",
)

__all__ = [
    "StableCascadeCombinedPipeline",
    "StableCascadeControlNet",
    "StableCascadeDecoder",
    "StableCascadeDecoderPipeline",
    "StableCascadeImageEncoder",
    "StableCascadeMultiControlNet",
    "StableCascadePipeline",
    "StableCascadePreviewer",
    "StableCascadePrior",
    "StableCascadePriorPipeline",
    "StableCascadeReconstructionPipeline",
    "StableCascadeScheduler",
    "StableCascadeUNet",
    "StableCascadeVQGAN",
    "__version__",
]

if TYPE_CHECKING:
    from .models import (
        StableCascadeControlNet,
        StableCascadeDecoder,
        StableCascadeImageEncoder,
        StableCascadeMultiControlNet,
        StableCascadePreviewer,
        StableCascadePrior,
        StableCascadeUNet,
        StableCascadeVQGAN,
    )
    from .pipelines import (
        StableCascadeCombinedPipeline,
        StableCascadeDecoderPipeline,
        StableCascadePipeline,
        StableCascadePriorPipeline,
        StableCascadeReconstructionPipeline,
    )
    from .schedulers import StableCascadeScheduler


def __getattr__(name: str) -> Any:
    """The public name or subpackage `name`, imported now and kept."""
    if name in _EXPORTS:
        value = getattr(importlib.import_module(_EXPORTS[name]), name)
    elif name in _SUBMODULES:
        value = importlib.import_module(f"{__name__}.{name}")
    else:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_SUBMODULES})
