"""What the pipelines refuse: in one line, and before any network runs."""

from __future__ import annotations

import pytest
import torch
from PIL import Image

from tests.tiny_pipelines import (
    FAST,
    cascade,
    decoder_pipeline,
    prior_pipeline,
    reconstruction_pipeline,
    seeds,
    tiny_controlnet,
)

IMAGE, GREY = torch.rand(3, 64, 64, generator=seeds(0)[0]), Image.new("L", (64, 64))
REFUSALS = [
    ("mask_image is given without image", {"mask_image": GREY}),
    ("strength is given without image", {"strength": 0.5}),
    ("strength 1.2 is outside", {"image": IMAGE, "strength": 1.2}),
    ("strength nan is outside", {"image": IMAGE, "strength": float("nan")}),
    ("strength half is outside", {"image": IMAGE, "strength": "half"}),
    ("latents are noise to start from", {"image": IMAGE, "strength": 0, "latents": torch.zeros(1, 16, 6, 6)}),
    ("image is empty", {"image": []}),
    ("image holds str", {"image": "dog.png"}),
    (r"image has values from -1 to 1,", {"image": torch.linspace(-1, 1, 3 * 64 * 64).view(3, 64, 64)}),
    ("image has values from nan", {"image": torch.full((3, 64, 64), torch.nan)}),
    (r"image is 40 x 64 \(height x width\); 64 is the smallest", {"image": IMAGE[:, :40]}),
    ("height 65 is not a multiple of 8", {"image": IMAGE, "height": 65}),
    ("width 0 is not a multiple of 8", {"image": IMAGE, "width": 0}),
    ("prompt has 2 entries for 3 images", {"image": IMAGE.expand(3, -1, -1, -1), "prompt": ["a", "dog"]}),
    (r"mask_image is 64 x 32 \(height x width\), image 64 x 64",
     {"image": IMAGE, "mask_image": Image.new("L", (32, 64))}),
    ("mask_image has 2 masks for 1 images", {"image": IMAGE, "mask_image": torch.zeros(2, 1, 64, 64)}),
    (r"mask_image holds Tensor \(3, 64, 64\)", {"image": IMAGE, "mask_image": IMAGE}),
    ("mask_image holds str", {"image": IMAGE, "mask_image": "mask.png"}),
    ("mask_image has values from 0 to 255", {"image": IMAGE, "mask_image": 255 * torch.eye(64)}),
    ("guidance_interval 0.5 is not two numbers", {"guidance_interval": 0.5}),
    (r"guidance_interval \(0.6, 0.4\): the first must not be above the second", {"guidance_interval": (0.6, 0.4)}),
    ("image_weights has 1 entries for 2 images", {"images": IMAGE.expand(2, -1, -1, -1), "image_weights": [1]}),
    ("image_weights has 1 entries for 0 images", {"image_weights": [1]}),
    ("image_weights holds nan", {"images": IMAGE, "image_weights": [float("nan")]}),
    ("image_embeds has 3 rows for 1 images", {"image_embeds": torch.zeros(3, 1, 24)}),
    ("images is empty", {"images": []}),
    ("control_image has 3 channels, the ControlNet takes 1;", {"control_image": IMAGE}),
    (r"control_image has 3 channels \(PIL mode RGB\), the ControlNet takes 1: L or 1",
     {"control_image": Image.new("RGB", (64, 64))}),
    ("control_image has 3 rows for 1 images", {"control_image": torch.zeros(3, 1, 48, 48)}),
    ("control_image is empty", {"control_image": []}),
    ("control_image holds str", {"control_image": "edges.png"}),
    ("control_image has different sizes", {"control_image": [GREY, Image.new("L", (8, 8))]}),
    ("control_image has no pixels, or values", {"control_image": torch.full((1, 48, 48), torch.nan)}),
    ("controlnet_conditioning_scale has 2 entries for 1 ControlNets",
     {"control_image": GREY, "controlnet_conditioning_scale": [1, 1]}),
    ("controlnet_conditioning_scale nan is no finite", {"control_image": GREY,
                                                        "controlnet_conditioning_scale": float("nan")}),
    ("control_guidance_start 0.5 and control_guidance_end 0.5 need",
     {"control_image": GREY, "control_guidance_start": 0.5, "control_guidance_end": 0.5}),
    ("prior_callback_on_step_end_tensor_inputs 'x'", {"prior_callback_on_step_end_tensor_inputs": ["x"]}),
    ("prior_num_inference_steps True", {"prior_num_inference_steps": True}),
]  # fmt: skip


@pytest.mark.parametrize("message, call", REFUSALS)
def test_refusals_are_one_line_and_come_before_any_network(controlled, message, call):
    ran = []
    hooks = [part.register_forward_pre_hook(lambda module, args: ran.append(type(module).__name__))
             for part in controlled.components.values() if isinstance(part, torch.nn.Module)]  # fmt: skip
    with pytest.raises(ValueError, match=message) as caught:
        controlled(**{"prompt": "red dog"} | FAST | call)
    for hook in hooks:
        hook.remove()
    assert "\n" not in str(caught.value)
    assert not ran


def test_refusals_of_parts_that_are_missing_or_do_not_fit():
    bare = cascade(semantic_encoder=None)
    with pytest.raises(ValueError, match="image needs a semantic_encoder"):
        bare("red dog", image=IMAGE)
    with pytest.raises(ValueError, match="control_image needs a controlnet"):
        bare("red dog", control_image=GREY)
    with pytest.raises(ValueError, match="controlnet is for a prior 24 wide, this one is 16 wide"):
        cascade(controlnet=tiny_controlnet(projection_channels=24))("red dog", control_image=GREY)
    several = cascade(controlnet=[tiny_controlnet(), tiny_controlnet()])
    for images, given in ((GREY, "no list"), ([GREY], "1 entries")):
        with pytest.raises(ValueError, match=f"control_image has {given} for 2 ControlNets"):
            several("red dog", control_image=images)
    with pytest.raises(ValueError, match="control_image 1 has 3 channels"):
        several("red dog", control_image=[GREY, Image.new("RGB", (8, 8))])
    prior = prior_pipeline()
    for times in ([1.0], [0.5, 0.7], [1.5, 0.0], [1.0, "a"]):
        with pytest.raises(ValueError, match="are not two or more falling numbers"):
            prior("red dog", timesteps=times)
    with pytest.raises(ValueError, match=r"timesteps and strength 0.5 are both given"):
        prior("red dog", timesteps=[1.0, 0.0], image=IMAGE, strength=0.5)
    decoder = decoder_pipeline()
    with pytest.raises(ValueError, match="image is given without mask_image"):
        decoder(torch.zeros(1, 16, 6, 6), image=IMAGE)
    with pytest.raises(ValueError, match="negative_prompt_embeds needs negative_prompt_embeds_pooled"):
        decoder(torch.zeros(1, 16, 6, 6), negative_prompt_embeds=torch.zeros(1, 12, 32))
    rebuilt = reconstruction_pipeline()
    for compression in (7, 33, float("inf"), "16"):
        with pytest.raises(ValueError, match=f"compression {compression} is not from 8 to 32"):
            rebuilt(IMAGE, compression=compression)
    with pytest.raises(ValueError, match="images is missing"):
        rebuilt(None)
