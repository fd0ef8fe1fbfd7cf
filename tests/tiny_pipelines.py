"""Every pipeline over the tiny cascade, quiet, and what their tests share."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from stable_cascade import (
    StableCascadeControlNet,
    StableCascadeDecoderPipeline,
    StableCascadePipeline,
    StableCascadePriorPipeline,
    StableCascadeReconstructionPipeline,
    StableCascadeScheduler,
)
from tests.tiny_cascade import MULTIPLE, PRIOR, seeded, tiny_parts

ROOT = Path(__file__).resolve().parents[1]
FAST = {"prior_num_inference_steps": 2, "num_inference_steps": 2, "output_type": "pt"}
FOUR = FAST | {"prior_num_inference_steps": 4}
PARTS = tiny_parts()
DECODER_PARTS = ("decoder", "tokenizer", "text_encoder", "scheduler", "vqgan")
BACKBONE = {
    "stem_width": 8, "block_types": ["fused", "fused", "mbconv"], "widths": [8, 8, 16], "depths": [1, 1, 1],
    "strides": [1, 2, 2], "expansions": [1, 2, 2], "head_width": 16, "stochastic_depth": 0.0,
}  # fmt: skip


def seeds(*numbers):
    return [torch.Generator().manual_seed(number) for number in numbers]


def quiet(pipeline):
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def cascade(**parts) -> StableCascadePipeline:
    return quiet(StableCascadePipeline(**{**PARTS, **parts}, resolution_multiple=MULTIPLE))


def prior_pipeline(**parts) -> StableCascadePriorPipeline:
    names = ("tokenizer", "text_encoder", "prior", "image_encoder", "semantic_encoder")
    own = {name: PARTS[name] for name in names} | {"scheduler": PARTS["prior_scheduler"]}
    return quiet(StableCascadePriorPipeline(**own | parts, resolution_multiple=MULTIPLE))


def decoder_pipeline() -> StableCascadeDecoderPipeline:
    parts = {name: PARTS[name] for name in DECODER_PARTS}
    return quiet(StableCascadeDecoderPipeline(**parts, resolution_multiple=MULTIPLE))


def reconstruction_pipeline() -> StableCascadeReconstructionPipeline:
    parts = {name: PARTS[name] for name in (*DECODER_PARTS, "semantic_encoder", "previewer")}
    return quiet(StableCascadeReconstructionPipeline(**parts, resolution_multiple=MULTIPLE))


def tiny_controlnet(in_channels: int = 1, *, seed: int = 0, **changes) -> StableCascadeControlNet:
    """A ControlNet for the tiny prior whose residuals are not zero."""
    settings = {"projection_channels": PRIOR["block_out_channels"][0], "blocks": [0, 1, 3],
                "backbone_config": BACKBONE} | changes  # fmt: skip
    return seeded(lambda: StableCascadeControlNet(in_channels, **settings), seed)


def images(count: int = 1, height: int = 64, width: int = 64, seed: int = 0) -> torch.Tensor:
    """Images with large shapes, in whole levels of 255: (count, 3, height, width)."""
    small = torch.rand(count, 3, 4, 4, generator=seeds(seed)[0])
    smooth = torch.nn.functional.interpolate(small, size=(height, width), mode="bilinear")
    return (smooth * 255).round() / 255


def to_pil(image: torch.Tensor) -> Image.Image:
    return Image.fromarray((image.movedim(0, -1).numpy() * 255).round().astype(np.uint8))


def right_half(height: int = 64, width: int = 64) -> torch.Tensor:
    """A mask: (1, 1, height, width)."""
    mask = torch.zeros(1, 1, height, width)
    mask[..., width // 2 :] = 1
    return mask


def edges(count: int = 1, height: int = 48, width: int = 48, channels: int = 1, seed: int = 0) -> torch.Tensor:
    """Control images: (count, channels, height, width)."""
    return torch.rand(count, channels, height, width, generator=seeds(seed)[0]).round()


def emojis(count: int) -> torch.Tensor:
    """Small images that the embedded cascade has not seen: (count, 3, 64, 64)."""
    sheet = Image.open(ROOT / "examples/embedded/control_120.webp").convert("RGB")
    corners = [(64 * (i % 15), 64 * (i // 15)) for i in range(count)]
    tiles = [sheet.crop((left, top, left + 64, top + 64)) for left, top in corners]
    return torch.stack([torch.from_numpy(np.asarray(tile) / np.float32(255)).movedim(-1, 0) for tile in tiles])


def embedded(**changes) -> StableCascadePipeline:
    """The embedded cascade, whose latents mean something."""
    from stable_cascade.embedded import embedded_path

    pipeline = StableCascadePipeline.from_pretrained(embedded_path())
    scheduler = StableCascadeScheduler.from_config(pipeline.prior_scheduler.config, **changes)
    pipeline.register_modules(prior_scheduler=scheduler)
    return quiet(pipeline)


def times_of(call) -> list[float]:
    """The times of Stage C's steps in `call(callback)`."""
    times: list[float] = []
    call(lambda pipe, step, time, tensors: times.append(round(float(time), 4)))
    return times
