"""The networks of the cascade, and the configs of their released sizes."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

_EXPORTS = {
    "PRESETS": "presets",
    "Conditions": "unet",
    "StableCascadeControlNet": "controlnet",
    "StableCascadeDecoder": "decoder",
    "StableCascadeImageEncoder": "image_encoder",
    "StableCascadeMultiControlNet": "controlnet",
    "StableCascadePreviewer": "previewer",
    "StableCascadePrior": "prior",
    "StableCascadeUNet": "diffusers_names",
    "StableCascadeVQGAN": "vqgan",
    "load_single_file": "loading",
}

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


def __getattr__(name: str) -> Any:
    """The public name or module `name`, imported on first use."""
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_EXPORTS[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
