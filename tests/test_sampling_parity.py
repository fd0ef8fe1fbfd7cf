"""Text to images equals diffusers' pipelines with the same weights and noise, when its conventions are asked for.

These are: no shift, no rescaled guidance, the network told the time itself, no noise in the last step, and the state
after the last step as the result where ours is its clean prediction.
"""

from __future__ import annotations

import pytest
import torch
from diffusers import (
    DDPMWuerstchenScheduler,
    StableCascadeCombinedPipeline,
    StableCascadeUNet,
)
from diffusers import StableCascadeDecoderPipeline as TheirDecoder
from diffusers import StableCascadePriorPipeline as TheirPrior
from diffusers.pipelines.deprecated.wuerstchen.modeling_paella_vq_model import PaellaVQModel

from stable_cascade import (
    StableCascadeDecoderPipeline,
    StableCascadePipeline,
    StableCascadePriorPipeline,
    StableCascadeScheduler,
)
from stable_cascade.embedded import embedded_path
from tests.tiny_cascade import MULTIPLE, tiny_parts

STEPS = {"prior_num_inference_steps": 6, "num_inference_steps": 5}
CONVENTIONS = {"shift": 1.0, "condition": "timestep", "last_noise": False}
TOLERANCE = 1e-4


def seed(number=0):
    return torch.Generator().manual_seed(number)


def quiet(*pipelines):
    for pipeline in pipelines:
        pipeline.set_progress_bar_config(disable=True)
    return pipelines


def their_network(cls, ours):
    network = cls.from_config(ours.config).eval()
    network.load_state_dict(ours.state_dict())
    return network


def both(parts, multiple):
    """Ours, and diffusers' two pipelines and its combined one, on the same weights."""
    known = {name: parts[name] for name in ("tokenizer", "text_encoder")}
    schedulers = {name: StableCascadeScheduler(**CONVENTIONS) for name in ("prior_scheduler", "scheduler")}
    ours = StableCascadePipeline(**parts | schedulers, resolution_multiple=multiple)
    prior, decoder = (their_network(StableCascadeUNet, parts[name]) for name in ("prior", "decoder"))
    vqgan = their_network(PaellaVQModel, parts["vqgan"])
    first = TheirPrior(prior=prior, scheduler=DDPMWuerstchenScheduler(), resolution_multiple=multiple, **known)
    second = TheirDecoder(
        decoder=decoder, vqgan=vqgan, scheduler=DDPMWuerstchenScheduler(), latent_dim_scale=multiple / 4, **known
    )
    combined = StableCascadeCombinedPipeline(
        decoder=decoder, vqgan=vqgan, scheduler=DDPMWuerstchenScheduler(), prior_prior=prior,
        prior_scheduler=DDPMWuerstchenScheduler(), **known, **{f"prior_{name}": part for name, part in known.items()},
    )  # fmt: skip
    for pipe in (first, combined.prior_pipe):
        pipe.register_to_config(resolution_multiple=multiple)
    combined.decoder_pipe.register_to_config(latent_dim_scale=multiple / 4)
    quiet(ours, first, second, combined.prior_pipe, combined.decoder_pipe)
    return ours, first, second, combined


@pytest.fixture(scope="module")
def tiny():
    return both(tiny_parts(), MULTIPLE)


def last_state(seen):
    """A step callback that takes the state for the result, as diffusers does, and keeps it."""

    def callback(pipeline, step, time, tensors):
        seen.append(tensors["latents"])
        return {"clean": tensors["latents"]}

    return callback


def our_run(pipeline, prompts, *, steps=STEPS, **settings):
    """Stage C's latents, Stage B's and the images."""
    semantic, vq = [], []
    images = pipeline(
        prompts, guidance_rescale=0.0, output_type="pt", **steps, **settings,
        prior_callback_on_step_end=last_state(semantic), callback_on_step_end=last_state(vq),
    ).images  # fmt: skip
    return semantic[-1], vq[-1], images


def their_run(
    first, second, prompts, *, prior_guidance_scale, decoder_guidance_scale, generator, steps=STEPS, **settings
):
    vq = []
    semantic = first(
        prompts, num_inference_steps=steps["prior_num_inference_steps"], guidance_scale=prior_guidance_scale,
        generator=generator, **settings,
    ).image_embeddings  # fmt: skip
    rest = {key: value for key, value in settings.items() if key == "negative_prompt"}
    images = second(
        semantic, prompts, num_inference_steps=steps["num_inference_steps"], guidance_scale=decoder_guidance_scale,
        generator=generator, output_type="pt", **rest,
        callback_on_step_end=lambda pipe, step, time, tensors: vq.append(tensors["latents"]) or {},
    ).images  # fmt: skip
    return semantic, vq[-1], images


def assert_equal(ours, theirs):
    """Latents by their largest value, which untrained networks make large; images as they are."""
    for name, one, two in zip(("semantic latents", "VQ latents"), ours, theirs, strict=False):
        assert (one - two).abs().max() <= TOLERANCE * max(1, two.abs().max()), name
    assert (ours[2] - theirs[2]).abs().max() <= TOLERANCE
    assert theirs[2].std() > 0.05


@pytest.mark.parametrize("prior_scale, scale", [(4.0, 1.1), (4.0, 0.0), (1.0, 0.0)])
@pytest.mark.parametrize("height, width", [(64, 64), (128, 64)])
def test_both_stages_and_images(tiny, prior_scale, scale, height, width):
    ours, first, second, _ = tiny
    prompts, negative = ["red dog", "a photo of snails"], ["snail", ""]
    scales = {"prior_guidance_scale": prior_scale, "decoder_guidance_scale": scale}
    settings = scales | {"negative_prompt": negative, "height": height, "width": width}
    mine = our_run(ours, prompts, generator=seed(), **settings)
    assert_equal(mine, their_run(first, second, prompts, generator=seed(), **settings))


def test_generator_per_image_and_given_latents(tiny):
    ours, first, second, _ = tiny
    latents = torch.randn(2, 16, 6, 6, generator=seed(5))
    settings = {"prior_guidance_scale": 3.0, "decoder_guidance_scale": 1.5, "height": 64, "width": 64}
    mine = our_run(ours, ["snail", "dog"], latents=latents, generator=[seed(1), seed(2)], **settings)
    theirs = their_run(first, second, ["snail", "dog"], latents=latents, generator=[seed(1), seed(2)], **settings)
    assert_equal(mine, theirs)


def test_the_combined_pipeline(tiny):
    ours, *_, combined = tiny
    settings = {"prior_guidance_scale": 4.0, "decoder_guidance_scale": 1.1, "height": 64, "width": 64}
    _, _, images = our_run(ours, "red dog", generator=seed(3), **settings)
    theirs = combined("red dog", generator=seed(3), output_type="pt", **STEPS, **settings).images
    assert (images - theirs).abs().max() <= TOLERANCE


def test_the_two_stages_apart(tiny):
    _, first, second, _ = tiny
    parts = tiny_parts()
    known = {name: parts[name] for name in ("tokenizer", "text_encoder")}
    scheduler = StableCascadeScheduler(**CONVENTIONS)
    prior = StableCascadePriorPipeline(
        prior=parts["prior"], scheduler=scheduler, resolution_multiple=MULTIPLE, **known
    )
    decoder = StableCascadeDecoderPipeline(
        decoder=parts["decoder"], vqgan=parts["vqgan"], scheduler=scheduler, resolution_multiple=MULTIPLE, **known
    )
    quiet(prior, decoder)
    size = {"height": 64, "width": 64}
    end = {"guidance_rescale": 0.0, "callback_on_step_end": last_state([])}
    mine = prior("red dog", num_inference_steps=6, generator=seed(), **size, **end).image_embeddings
    theirs = first("red dog", num_inference_steps=6, generator=seed(), **size).image_embeddings
    assert (mine - theirs).abs().max() <= TOLERANCE * max(1, theirs.abs().max())
    mine = decoder(theirs, "red dog", num_inference_steps=5, generator=seed(), output_type="pt", **end).images
    theirs = second(
        theirs, "red dog", num_inference_steps=5, guidance_scale=1.1, generator=seed(), output_type="pt"
    ).images
    assert (mine - theirs).abs().max() <= TOLERANCE


def test_each_convention_matters(tiny):
    """With any one of ours instead, the images differ by far more than the tolerance."""
    ours, first, second, _ = tiny
    scales = {"prior_guidance_scale": 4.0, "decoder_guidance_scale": 1.1, "height": 64, "width": 64}
    theirs = their_run(first, second, "red dog", generator=seed(), **scales)[0]
    for change in ({"shift": 2.0}, {"condition": "cosine"}, {"last_noise": True}, {"rescale": 0.7}, {"clean": True}):
        rescale, clean = change.pop("rescale", 0.0), change.pop("clean", False)
        ours.prior_scheduler = StableCascadeScheduler(**CONVENTIONS | change)
        seen = []
        result = ours(
            "red dog", preview=True, output_type="latent", guidance_rescale=rescale, generator=seed(), **STEPS,
            **scales, **({} if clean else {"prior_callback_on_step_end": last_state(seen)}),
        ).images  # fmt: skip
        ours.prior_scheduler = StableCascadeScheduler(**CONVENTIONS)
        assert (result - theirs).abs().max() > 10 * TOLERANCE * theirs.abs().max().clamp(max=1), (change, rescale)


def test_the_trained_cascade():
    loaded = StableCascadePipeline.from_pretrained(embedded_path(), torch_dtype=torch.float32)
    multiple = loaded.config["resolution_multiple"]
    ours, first, second, _ = both({**loaded.components}, multiple)
    scales = {"prior_guidance_scale": 4.0, "decoder_guidance_scale": 1.1, "height": 64, "width": 64}
    prompts = ["red apple, flat style", "panda, noto style"]
    steps = {"prior_num_inference_steps": 20, "num_inference_steps": 10}
    mine = our_run(ours, prompts, steps=steps, generator=seed(), **scales)
    theirs = their_run(first, second, prompts, steps=steps, generator=seed(), **scales)
    assert_equal(mine, theirs)
    print("largest difference:", *(f"{(one - two).abs().max():.1e}" for one, two in zip(mine, theirs, strict=True)))
