"""Ways of running the cascade: text to pictures, each stage alone, and pictures rebuilt."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

_EXPORTS = {
    "StableCascadeCombinedPipeline": "diffusers_names",
    "StableCascadeDecoderPipeline": "decoder",
    "StableCascadePipeline": "text_to_image",
    "StableCascadePriorPipeline": "prior",
    "StableCascadePriorPipelineOutput": "outputs",
    "StableCascadeReconstructionPipeline": "reconstruction",
    "outpaint": "outpainting",
}

__all__ = [
    "StableCascadeCombinedPipeline",
    "StableCascadeDecoderPipeline",
    "StableCascadePipeline",
    "StableCascadePriorPipeline",
    "StableCascadePriorPipelineOutput",
    "StableCascadeReconstructionPipeline",
    "outpaint",
]

if TYPE_CHECKING:
    from .decoder import StableCascadeDecoderPipeline
    from .diffusers_names import StableCascadeCombinedPipeline
    from .outpainting import outpaint
    from .outputs import StableCascadePriorPipelineOutput
    from .prior import StableCascadePriorPipeline
    from .reconstruction import StableCascadeReconstructionPipeline
    from .text_to_image import StableCascadePipeline


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_EXPORTS[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
