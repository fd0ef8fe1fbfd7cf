"""Ways of running the cascade: text to images, each stage alone, and images rebuilt."""

from __future__ import annotations

from typing import TYPE_CHECKING

from stable_cascade.lazy import lazy_exports

if TYPE_CHECKING:
    from .call import StableCascadePriorPipelineOutput
    from .decoder import StableCascadeDecoderPipeline
    from .prior import StableCascadePriorPipeline
    from .reconstruction import StableCascadeReconstructionPipeline
    from .source import outpaint
    from .text_to_image import StableCascadeCombinedPipeline, StableCascadePipeline

__all__ = [
    "StableCascadeCombinedPipeline",
    "StableCascadeDecoderPipeline",
    "StableCascadePipeline",
    "StableCascadePriorPipeline",
    "StableCascadePriorPipelineOutput",
    "StableCascadeReconstructionPipeline",
    "outpaint",
]

__getattr__, __dir__ = lazy_exports(globals())
