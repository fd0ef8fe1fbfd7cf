"""Every size from 256 to 2048 in steps of 8, square, 3:2 and 21:9, through all stages of the embedded layout.

The networks are the embedded cascade's at tiny width: levels, patches, strides and attention are where they are there.
With 42.67 pixels a semantic latent, as released, every size; with the embedded cascade's 10.67 those up to 768.
"""

from __future__ import annotations

import pytest
import torch
from PIL import Image

from stable_cascade import StableCascadePipeline, StableCascadeReconstructionPipeline
from tests.tiny_pipelines import DECODER_PARTS, PARTS, quiet, tiny_controlnet

SHAPES = {"square": 1.0, "3:2": 2 / 3, "21:9": 9 / 21}
SIDES = range(256, 2049, 8)
ONE_STEP = {"prior_num_inference_steps": 1, "num_inference_steps": 1, "output_type": "pt"}
UNGUIDED = {"prior_guidance_scale": 1.0, "decoder_guidance_scale": 1.0}
RELEASED, EMBEDDED = 42.67, 10.67

# Both ends, latents of odd number in both spaces, and one side or both of them.
SAMPLE = [
    (256, "square"), (264, "3:2"), (280, "21:9"), (344, "square"), (392, "3:2"), (512, "21:9"), (600, "square"),
    (728, "3:2"), (776, "square"), (904, "21:9"), (1032, "3:2"), (1352, "21:9"),
]  # fmt: skip
FEW = [(264, "square"), (280, "21:9"), (424, "3:2")]


def height_of(width, shape):
    """The multiple of 8 nearest to the shape's height, and no less than what can be drawn."""
    return max(64, round(width * SHAPES[shape] / 8) * 8)


def seed(number=0):
    return torch.Generator().manual_seed(number)


@pytest.fixture(scope="module")
def pipelines():
    controlled = PARTS | {"controlnet": tiny_controlnet()}
    return {multiple: quiet(StableCascadePipeline(**controlled, resolution_multiple=multiple))
            for multiple in (RELEASED, EMBEDDED)}  # fmt: skip


def check(images, height, width):
    assert images.shape == (1, 3, height, width)
    assert images.isfinite().all()
    assert images.std() > 0.01, "a blank image"


def gradient(height, width, mode="RGB"):
    return Image.linear_gradient("L").resize((width, height)).convert(mode)


def draw(pipeline, height, width, **settings):
    images = pipeline("red dog", height=height, width=width, generator=seed(), **ONE_STEP | settings).images
    check(images, height, width)
    return images


@pytest.mark.parametrize("side, shape", SAMPLE)
def test_text_to_image(pipelines, side, shape):
    draw(pipelines[RELEASED], height_of(side, shape), side, **UNGUIDED)
    if side < 500:
        draw(pipelines[EMBEDDED], height_of(side, shape), side)


@pytest.mark.parametrize("side, shape", FEW)
def test_upright(pipelines, side, shape):
    draw(pipelines[RELEASED], side, height_of(side, shape))


@pytest.mark.parametrize("multiple", [RELEASED, EMBEDDED])
@pytest.mark.parametrize("side, shape", FEW)
def test_from_an_image_and_with_control(pipelines, side, shape, multiple):
    height, width = height_of(side, shape), side
    image, mask = gradient(height, width), gradient(height, width, "L")
    pipeline = pipelines[multiple]
    drawn = draw(pipeline, height, width, image=image, strength=0.5)
    assert not torch.equal(drawn, draw(pipeline, height, width, image=image, mask_image=mask))
    plain = draw(pipeline, height, width)
    assert not torch.equal(plain, draw(pipeline, height, width, control_image=gradient(height, width, "L")))


@pytest.mark.parametrize("side, shape", FEW)
def test_rebuilt(side, shape):
    parts = {name: PARTS[name] for name in (*DECODER_PARTS, "semantic_encoder")}
    pipeline = quiet(StableCascadeReconstructionPipeline(**parts, resolution_multiple=RELEASED))
    height, width = height_of(side, shape), side
    images = pipeline(gradient(height, width), num_inference_steps=1, generator=seed(), output_type="pt").images
    check(images, height, width)


@pytest.mark.slow
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("multiple, limit", [(RELEASED, 2048), (EMBEDDED, 768)])
def test_every_size(pipelines, shape, multiple, limit):
    for side in SIDES:
        if side <= limit:
            draw(pipelines[multiple], height_of(side, shape), side, **UNGUIDED)
