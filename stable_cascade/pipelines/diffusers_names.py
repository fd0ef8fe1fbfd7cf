"""diffusers' name of the whole cascade, for code that was written for it."""

from __future__ import annotations

from .text_to_image import StableCascadePipeline as StableCascadeCombinedPipeline

__all__ = ["StableCascadeCombinedPipeline"]
