"""The networks of the cascade, and the configs of their released sizes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from stable_cascade.lazy import lazy_exports

if TYPE_CHECKING:
    from stable_cascade.files.loading import load_single_file
    from stable_cascade.files.presets import PRESETS

    from .controlnet import StableCascadeControlNet, StableCascadeMultiControlNet
    from .decoder import StableCascadeDecoder
    from .diffusers_names import StableCascadeUNet
    from .previewer import StableCascadePreviewer
    from .prior import StableCascadePrior
    from .semantic_encoder import StableCascadeSemanticEncoder
    from .unet import Conditions
    from .vqgan import StableCascadeVQGAN

__all__ = [
    "PRESETS",
    "Conditions",
    "StableCascadeControlNet",
    "StableCascadeDecoder",
    "StableCascadeMultiControlNet",
    "StableCascadePreviewer",
    "StableCascadePrior",
    "StableCascadeSemanticEncoder",
    "StableCascadeUNet",
    "StableCascadeVQGAN",
    "load_single_file",
]

__getattr__, __dir__ = lazy_exports(globals())
