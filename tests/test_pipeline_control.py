"""ControlNets as a component of the pipelines: scale, start and end, sizes, several of them, folders."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from stable_cascade import (
    StableCascadeMultiControlNet,
    StableCascadePipeline,
    StableCascadePriorPipeline,
)
from stable_cascade.pipelines.call import seen_size, semantic_size
from tests.tiny_pipelines import (
    FAST,
    FOUR,
    PARTS,
    cascade,
    edges,
    quiet,
    seeds,
    tiny_controlnet,
)


def test_a_controlnet_changes_the_image_as_much_as_its_scale_says(controlled, pipeline):
    latent = FAST | {"output_type": "latent"}
    plain = pipeline("red dog", generator=seeds(1), **latent).images
    call = {"prompt": "red dog", "control_image": edges(), **latent}
    assert torch.equal(controlled("red dog", generator=seeds(1), **latent).images, plain)
    assert torch.equal(controlled(**call, controlnet_conditioning_scale=0, generator=seeds(1)).images, plain)
    full, weak = (controlled(**call, controlnet_conditioning_scale=scale, generator=seeds(1)).images
                  for scale in (1, 0.1))  # fmt: skip
    assert (full - plain).abs().max() > 0.01
    assert (weak - plain).norm() < (full - plain).norm()
    in_numpy = edges()[0, 0].numpy()
    assert torch.equal(controlled(**call | {"control_image": in_numpy}, generator=seeds(1)).images, full)
    in_pil = Image.fromarray((in_numpy * 255).astype(np.uint8))
    assert torch.equal(controlled(**call | {"control_image": in_pil}, generator=seeds(1)).images, full)
    in_pil = in_pil.convert("1")
    assert torch.equal(controlled(**call | {"control_image": in_pil}, generator=seeds(1)).images, full)


def test_several_controlnets_add_their_residuals():
    nets = [tiny_controlnet(), tiny_controlnet(3, seed=1, blocks=[1, 2])]
    images = [edges(), edges(channels=3, seed=2)]
    seen = []
    hook = PARTS["prior"].register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["control"]), with_kwargs=True
    )
    cascade(controlnet=nets)(
        "red dog", control_image=images, controlnet_conditioning_scale=[0.5, 2], generator=seeds(1), **FAST
    )
    hook.remove()
    one, two = (net(image) for net, image in zip(nets, images, strict=True))
    expected = [0.5 * one[0], 0.5 * one[1] + 2 * two[1], 2 * two[2], 0.5 * one[3]]
    assert len(seen[0]) == len(expected)
    for found, value in zip(seen[0], expected, strict=True):
        torch.testing.assert_close(found, torch.cat([value, value]))


def test_residuals_of_different_sizes_meet_on_the_priors_grid():
    """A ControlNet that keeps the size of its input beside a strided one: the prior would resize each the same way."""
    nets = [tiny_controlnet(), tiny_controlnet(2, seed=1, bottleneck="simple", backbone_config=None)]
    images = [edges(1, 72, 64), edges(1, 5, 9, channels=2)]
    both = cascade(controlnet=nets)("red dog", control_image=images, height=72, generator=seeds(1), **FAST).images
    apart = [cascade(controlnet=net)("red dog", control_image=image, height=72, generator=seeds(1), **FAST).images
             for net, image in zip(nets, images, strict=True)]  # fmt: skip
    assert all((both - one).abs().max() > 1e-3 for one in apart)
    off = cascade(controlnet=nets)("red dog", control_image=images, height=72, controlnet_conditioning_scale=[1, 0],
                                   generator=seeds(1), **FAST).images  # fmt: skip
    torch.testing.assert_close(off, apart[0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("start, end, steps", [(0, 1, 4), (0, 0.5, 2), (0.5, 1, 2), (0.3, 0.8, 1)])
def test_start_and_end_of_a_controlnet(controlled, start, end, steps):
    acting = []
    hook = PARTS["prior"].register_forward_pre_hook(
        lambda module, args, kwargs: acting.append("control" in kwargs), with_kwargs=True
    )
    controlled("red dog", control_image=edges(), control_guidance_start=start, control_guidance_end=end,
               generator=seeds(1), **FOUR)  # fmt: skip
    hook.remove()
    expected = [start <= i / 4 and (i + 1) / 4 <= end for i in range(4)]
    assert acting == expected
    assert sum(acting) == steps


def test_control_images_of_any_size_and_shape(controlled):
    """They are brought to the size at which the ControlNet saw images in training."""
    assert controlled.control_size(64, 64) == (48, 48)
    assert controlled.control_size() == (48, 48)
    assert controlled.control_size(72, 104) == (54, 78)
    for height, width in ((64, 64), (88, 72), (104, 200)):
        seen = controlled.control_size(height, width)
        call = {"height": height, "width": width, "prompt": "red dog", **FAST}
        exact = controlled(**call, control_image=edges(1, *seen), generator=seeds(1)).images
        assert exact.shape == (1, 3, height, width)
        doubled = edges(1, *seen).repeat_interleave(2, 2).repeat_interleave(2, 3)
        torch.testing.assert_close(
            controlled(**call, control_image=doubled, generator=seeds(1)).images, exact, atol=0.1, rtol=0.1
        )
    for height, width in ((1, 1), (3, 200), (65, 33)):
        assert controlled("red dog", control_image=edges(1, height, width), **FAST).images.isfinite().all()


@pytest.mark.parametrize("side, multiple, stride", [(1024, 42.67, 32), (2048, 42.67, 32), (64, 10.67, 8)])
def test_seen_size_is_three_quarters(side, multiple, stride):
    assert seen_size(side, side, multiple, stride) == (side * 3 // 4, side * 3 // 4)


def test_seen_size_always_gives_the_priors_number_of_latents():
    for multiple, stride in ((42.67, 32), (10.67, 8), (11.3, 8), (8, 8)):
        for side in range(64, 2049, 8):
            seen = seen_size(side, side, multiple, stride)[0]
            assert -(-seen // stride) == semantic_size(side, side, multiple)[0], (side, multiple)


def test_pipelines_with_controlnets_save_and_load(tmp_path):
    nets = [tiny_controlnet(), tiny_controlnet(seed=1, blocks=[2])]
    for name, given, images in (("one", nets[0], edges()), ("several", nets, [edges(), edges(seed=1)])):
        pipeline = cascade(controlnet=given)
        pipeline.save_pretrained(tmp_path / name)
        expected = pipeline("red dog", control_image=images, generator=seeds(1), **FAST).images
        again = quiet(StableCascadePipeline.from_pretrained(tmp_path / name))
        assert type(again.controlnet) is type(pipeline.controlnet)
        drawn = again("red dog", control_image=images, generator=seeds(1), **FAST).images
        torch.testing.assert_close(drawn, expected, atol=1e-3, rtol=1e-3)
    assert {path.name for path in (tmp_path / "several" / "controlnet").iterdir()} == {"0", "1"}
    assert isinstance(again.controlnet, StableCascadeMultiControlNet)
    half = StableCascadePriorPipeline.from_pretrained(tmp_path / "several", torch_dtype=torch.bfloat16)
    assert half.controlnet.dtype == torch.bfloat16
    with pytest.raises(ValueError, match="no folder '0'"):
        StableCascadeMultiControlNet.from_pretrained(tmp_path)
    with pytest.raises(ValueError, match="controlnets holds nothing"):
        StableCascadeMultiControlNet([])
