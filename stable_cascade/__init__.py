"""Stable Cascade: networks, trainings and pipelines.

Importing this package loads nothing heavy: every public name is resolved on first use (a test compares the import
with `import torch`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from stable_cascade.lazy import lazy_exports

__version__ = "0.1.0"

if TYPE_CHECKING:
    from . import (  # noqa: F401
        adapters,
        config,
        controls,
        data,
        diffusion,
        drawing,
        embedded,
        estimate,
        factory,
        files,
        models,
        objectives,
        pipelines,
        schedulers,
        trainers,
        training,
    )
    from .models import (
        StableCascadeControlNet,
        StableCascadeDecoder,
        StableCascadeMultiControlNet,
        StableCascadePreviewer,
        StableCascadePrior,
        StableCascadeSemanticEncoder,
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

__all__ = [
    "StableCascadeCombinedPipeline",
    "StableCascadeControlNet",
    "StableCascadeDecoder",
    "StableCascadeDecoderPipeline",
    "StableCascadeMultiControlNet",
    "StableCascadePipeline",
    "StableCascadePreviewer",
    "StableCascadePrior",
    "StableCascadePriorPipeline",
    "StableCascadeReconstructionPipeline",
    "StableCascadeScheduler",
    "StableCascadeSemanticEncoder",
    "StableCascadeUNet",
    "StableCascadeVQGAN",
    "__version__",
]

__getattr__, __dir__ = lazy_exports(globals())
