"""The networks of the cascade, and the configs of their released sizes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from stable_cascade.lazy import lazy_exports

if TYPE_CHECKING:
    from .controlnet import StableCascadeControlNet, StableCascadeMultiControlNet
    from .decoder import StableCascadeDecoder
    from .diffusers_names import StableCascadeUNet
    from .image_encoder import StableCascadeImageEncoder
    from .loading import load_single_file
    from .presets import PRESETS
    from .previewer import StableCascadePreviewer
    from .prior import StableCascadePrior
    from .unet import Conditions
    from .vqgan import StableCascadeVQGAN

__all__ = [
    "PRESETS",
    "Conditions",
    "StableCascadeControlNet",
    "StableCascadeDecoder",
    "StableCascadeImageEncoder",
    "StableCascadeMultiControlNet",
    "StableCascadePreviewer",
    "StableCascadePrior",
    "StableCascadeUNet",
    "StableCascadeVQGAN",
    "load_single_file",
]

__getattr__, __dir__ = lazy_exports(globals())
