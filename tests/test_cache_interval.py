"""Half-depth caching: which steps run what, and that nothing else of a drawing changes."""

from __future__ import annotations

import pytest
import torch

from stable_cascade.models.unet import DeepCache
from stable_cascade.objectives.vqgan import psnr
from tests.tiny_cascade import RESIDUAL, TIMESTEP, tiny_decoder, tiny_parts, tiny_prior
from tests.tiny_pipelines import (
    FAST,
    FOUR,
    PARTS,
    cascade,
    decoder_pipeline,
    edges,
    embedded,
    images,
    prior_pipeline,
    reconstruction_pipeline,
    right_half,
    seeds,
    tiny_controlnet,
)

FOUR_LEVELS = {
    "block_out_channels": [8, 8, 16, 16], "num_attention_heads": [0] * 4, "down_num_layers_per_block": [1, 2, 2, 1],
    "up_num_layers_per_block": [1, 2, 2, 1], "down_blocks_repeat_mappers": [1, 1, 2, 1],
    "up_blocks_repeat_mappers": [3, 3, 2, 2], "block_types_per_layer": [[RESIDUAL, TIMESTEP]] * 4, "dropout": 0.0,
}  # fmt: skip
SIX = FAST | {"prior_num_inference_steps": 6, "num_inference_steps": 6}


def same_depths(network):
    """The network, its deeper half made to see neither sample nor noise level, only the conditions."""
    next(network.down_downscalers[1].parameters()).zero_()
    for block in (*network.down_blocks[1], *network.up_blocks[0]):
        for mapper in block.mappers() if block.kind == "timestep" else ():
            mapper.weight.zero_()
    return network


@pytest.fixture(scope="module")
def steady():
    """A cascade that caching does not change."""
    parts = tiny_parts()
    own = {name: same_depths(parts[name]) for name in ("prior", "decoder")}
    return cascade(**parts | own, controlnet=tiny_controlnet())


def calls(network, run) -> dict[str, int]:
    """How often each level ran in `run()`, by its first residual block."""
    counts: dict[str, int] = {}
    hooks = []
    for side in ("down", "up"):
        for level, blocks in enumerate(getattr(network, f"{side}_blocks")):
            name = f"{side} {level}"
            counts[name] = 0
            hooks.append(
                blocks[0].register_forward_pre_hook(
                    lambda module, args, name=name: counts.__setitem__(name, counts[name] + 1)
                )
            )
    run()
    for hook in hooks:
        hook.remove()
    return counts


def test_one_is_the_plain_run_and_a_cached_run_leaves_no_trace(pipeline):
    plain, once, cached, after = (
        pipeline("red dog", generator=seeds(1), **more, **FOUR).images
        for more in ({}, {"cache_interval": 1}, {"cache_interval": 2}, {})
    )
    assert torch.equal(plain, once)
    assert torch.equal(plain, after)
    assert not torch.allclose(plain, cached, atol=1e-3)


@pytest.mark.parametrize("interval", [2, 3, 100])
@pytest.mark.parametrize(
    "given",
    [
        {},
        {"prior_guidance_scale": 1.0, "decoder_guidance_scale": 1.0},
        {"guidance_interval": (0.3, 0.7)},  # rows are added, and taken away
        {"image": images(), "strength": 0.7},
        {"image": images(), "mask_image": right_half()},
        {"control_image": edges()},
        {"control_image": edges(), "control_guidance_start": 0.2, "control_guidance_end": 0.6},
        {"num_images_per_prompt": 2, "guidance_interval": (0.5, 1.0), "control_image": edges()},
    ],
    ids=["text", "unguided", "interval", "image", "mask", "control", "part of control", "two"],
)
def test_where_the_deeper_half_knows_no_time_nothing_changes(steady, given, interval):
    plain, cached = (
        steady("red dog", generator=torch.Generator().manual_seed(3), cache_interval=every, **given, **SIX).images
        for every in (1, interval)
    )
    torch.testing.assert_close(cached, plain, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("given", [{}, {"image": images(), "strength": 0.8}, {"control_image": edges()}])
def test_an_image_is_the_same_alone_or_in_a_batch(given):
    pipeline = cascade(controlnet=tiny_controlnet())
    call = {**given, **FOUR, "cache_interval": 2}
    together = pipeline(["red dog", "snail"], generator=seeds(1, 2), **call).images
    alone = pipeline("snail", generator=seeds(2), **call).images
    torch.testing.assert_close(together[1], alone[0], atol=1e-4, rtol=1e-4)


def test_the_steps_between_run_the_outer_half(pipeline):
    call = {"prompt": "red dog", **SIX, "prior_num_inference_steps": 5, "generator": seeds(1)[0]}
    for name, steps in (("prior", 5), ("decoder", 6)):
        network = getattr(pipeline, name)
        assert set(calls(network, lambda: pipeline(**call)).values()) == {steps}
        outer = {"down 0": steps, "up 1": steps}
        assert calls(network, lambda: pipeline(cache_interval=2, **call)) == outer | {"down 1": 3, "up 0": 3}
        assert calls(network, lambda: pipeline(cache_interval=3, **call)) == outer | {"down 1": 2, "up 0": 2}


def test_a_controlnet_that_begins_or_ends_to_act_asks_for_a_whole_step():
    pipeline = cascade(controlnet=tiny_controlnet())
    call = {"prompt": "red dog", "control_image": edges(), "cache_interval": 100, **FAST, "generator": seeds(1)[0]}
    call |= {"prior_num_inference_steps": 10, "control_guidance_start": 0.3, "control_guidance_end": 0.8}
    assert calls(pipeline.prior, lambda: pipeline(**call))["down 1"] == 3


def noised(channels: int, rows: int = 2):
    return torch.randn(rows, channels, 16, 16, generator=seeds(5)[0]), torch.linspace(0.2, 0.9, rows)


@torch.no_grad()
def test_what_the_cache_holds_stands_for_the_deeper_levels_at_any_depth():
    decoder = tiny_decoder(**FOUR_LEVELS)
    sample, times = noised(4)
    pooled, cache = torch.randn(2, 1, 32, generator=seeds(6)[0]), DeepCache()
    known = decoder.encode_conditions(pooled, torch.randn(2, 16, 6, 6, generator=seeds(7)[0]))
    plain = decoder(sample, times, conditions=known).sample

    def step():
        assert torch.equal(decoder(sample, times, conditions=known, cache=cache).sample, plain)

    outer = {"down 0": 1, "down 1": 1, "up 2": 2, "up 3": 2}
    assert calls(decoder, step) == outer | {"down 2": 2, "down 3": 1, "up 0": 3, "up 1": 3}
    assert calls(decoder, step) == outer | {"down 2": 0, "down 3": 0, "up 0": 0, "up 1": 0}


@torch.no_grad()
def test_residuals_of_a_controlnet_stay_with_their_blocks():
    prior = tiny_prior(
        down_num_layers_per_block=[2, 3], up_num_layers_per_block=[2, 1], up_blocks_repeat_mappers=[2, 1]
    )
    blocks = 2 + 3 + 2 * 2 + 1
    control = [torch.randn(2, 16, 8, 8, generator=seeds(number)[0]) for number in range(blocks)]
    sample, times = noised(16)
    pooled, cache = torch.randn(2, 1, 32, generator=seeds(6)[0]), DeepCache()
    plain = prior(sample, times, pooled, control=control).sample
    for _ in range(2):
        assert torch.equal(prior(sample, times, pooled, control=control, cache=cache).sample, plain)
    with pytest.raises(ValueError, match="more residual blocks than the network has"):
        prior(sample, times, pooled, control=[*control, control[0]], cache=cache)


@torch.no_grad()
def test_a_network_of_one_level_has_nothing_to_cache():
    prior = tiny_prior(block_out_channels=[16], num_attention_heads=[4], down_num_layers_per_block=[1],
                       up_num_layers_per_block=[1], block_types_per_layer=[[RESIDUAL]], dropout=[0.0],
                       down_blocks_repeat_mappers=[1], up_blocks_repeat_mappers=[1], switch_level=[])  # fmt: skip
    sample, times = noised(16)
    pooled, cache = torch.randn(2, 1, 32, generator=seeds(6)[0]), DeepCache()
    for ratio in (times, times / 2):
        assert torch.equal(prior(sample, ratio, pooled, cache=cache).sample, prior(sample, ratio, pooled).sample)


@pytest.mark.parametrize("interval", [0, -1, 1.5, True, "2", None])
def test_an_interval_that_means_nothing_is_refused(interval):
    latents = torch.zeros(1, 16, 6, 6)
    for draw in (
        lambda: cascade()("red dog", cache_interval=interval),
        lambda: prior_pipeline()("red dog", cache_interval=interval),
        lambda: decoder_pipeline()(latents, "red dog", cache_interval=interval),
        lambda: reconstruction_pipeline()(images(), cache_interval=interval),
    ):
        with pytest.raises(ValueError, match=f"^cache_interval {interval!r} is not a positive whole number; 1 runs"):
            draw()


def test_the_two_stages_alone_and_a_reconstruction_cache_too(pipeline):
    plain, cached = (
        pipeline("red dog", generator=seeds(1)[0], cache_interval=every, **FOUR).images for every in (1, 2)
    )
    for every, whole in ((1, plain), (2, cached)):
        draw = seeds(1)[0]
        latents = prior_pipeline()("red dog", num_inference_steps=4, generator=draw, cache_interval=every)
        alone = decoder_pipeline()(
            latents.image_embeddings, "red dog", num_inference_steps=2, generator=draw, output_type="pt",
            cache_interval=every,
        ).images  # fmt: skip
        torch.testing.assert_close(alone, whole, atol=1e-5, rtol=1e-5)
    rebuild = reconstruction_pipeline()
    run = {"num_inference_steps": 4, "output_type": "pt", "cache_interval": 2}
    assert calls(PARTS["decoder"], lambda: rebuild(images(), generator=seeds(1), **run))["down 1"] == 2


def test_the_trained_cascade_draws_nearly_the_same():
    """35.6 and 33.8 dB on average; half as many steps instead come to 20.6 dB."""
    pipeline = embedded()
    call = {"prompt": "red apple, flat style", "output_type": "pt"}
    plain, two, three = (pipeline(**call, generator=seeds(1), cache_interval=every).images for every in (1, 2, 3))
    assert psnr(two, plain) > 28
    assert psnr(three, plain) > 26
