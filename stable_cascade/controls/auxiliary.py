"""Any processor of the package controlnet_aux (depth, pose, lines, …) as a filter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Generator, Tensor

from .arguments import checked_count, nearest, needed_module, per_sample
from .kernels import resized

REMEDY = "pip install 'stable-cascade[controlnet_aux]'"


class ControlNetAuxFilter:
    """What a `controlnet_aux` processor draws of the image, enlarged to the image's size.

    Args:
        processor: the name of a class of controlnet_aux, as "MidasDetector", or an object: called with a PIL image
            it returns one, or an array.
        checkpoint: where the class's `from_pretrained` finds its weights: a folder or a repository on the Hub.
        channels: 3 keeps colours (pose, normals), 1 takes their mean (depth, lines).
        resolution: the shorter side that the processor works at; None leaves it to the processor.
        options: further keyword arguments of each call.

    Source: controlnet_aux 0.0.10, whose processors take `detect_resolution` and `output_type`.
    """

    def __init__(
        self,
        processor: Any,
        checkpoint: str | None = "lllyasviel/Annotators",
        channels: int = 3,
        resolution: int | None = 512,
        options: Mapping[str, Any] | None = None,
    ) -> None:
        if channels not in (1, 3):
            raise ValueError(f"channels is {channels!r}; allowed: 1, 3")
        if not isinstance(processor, str) and not callable(processor):
            raise ValueError(f"processor is {processor!r}; give a class's name, as 'MidasDetector', or a processor")
        self.channels = channels
        self.checkpoint = checkpoint
        self.resolution = checked_count("resolution", resolution, lowest=32, optional=True)
        self.options = dict(options or {})
        self._processor = processor

    def __call__(self, pixels: Tensor, generators: Sequence[Generator] | None = None) -> Tensor:
        """Shapes: (B, 3, H, W) in [0, 1] -> (B, channels, H, W) in [0, 1]; nothing is drawn by this class.

        Raises:
            ValueError: controlnet_aux is not installed, has no such class, or its result is no image.
        """
        processor = self._loaded(pixels.device)
        drawn = [self._drawn(processor, image) for image, _ in per_sample(pixels, generators)]
        return torch.stack(drawn).to(pixels.device)

    def _loaded(self, device: torch.device) -> Any:
        if isinstance(self._processor, str):
            self._processor = _processor(self._processor, self.checkpoint)
        if hasattr(self._processor, "to"):
            self._processor.to(device)
        return self._processor

    def _drawn(self, processor: Any, image: Tensor) -> Tensor:
        import numpy as np
        from PIL import Image

        levels = (image.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).contiguous().numpy()
        sizes = {"detect_resolution": self.resolution, "image_resolution": self.resolution} if self.resolution else {}
        result = processor(Image.fromarray(levels), **{"output_type": "pil", **sizes, **self.options})
        name = type(processor).__name__
        array = np.asarray(result.convert("RGB") if isinstance(result, Image.Image) else result)
        if array.ndim == 2:
            array = np.repeat(array[:, :, None], 3, axis=2)
        if array.ndim != 3 or array.shape[2] != 3 or array.dtype != np.uint8:
            raise ValueError(f"{name} returned {array.shape} {array.dtype}; expected an image of 8-bit levels")
        control = torch.from_numpy(array.copy()).permute(2, 0, 1).float() / 255
        control = resized(control, image.shape[-2:]).clamp(0, 1)
        return control.mean(dim=0, keepdim=True) if self.channels == 1 else control


def _processor(name: str, checkpoint: str | None) -> Any:
    """The processor of that name, with its weights."""
    module = needed_module("controlnet_aux", "ControlNetAuxFilter", REMEDY)
    cls = getattr(module, name, None)
    if not isinstance(cls, type):
        classes = sorted(key for key, value in vars(module).items() if isinstance(value, type))
        raise ValueError(f"processor {name!r} is unknown to controlnet_aux;{nearest(name, classes)}")
    if not hasattr(cls, "from_pretrained"):
        return cls()
    if checkpoint is None:
        raise ValueError(f"processor {name!r} has weights; give checkpoint, as 'lllyasviel/Annotators'")
    return cls.from_pretrained(checkpoint)
