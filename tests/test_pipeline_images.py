"""Drawing from an image, around a mask, and after reference images: laws, then values."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from PIL import Image

from stable_cascade.pipelines import outpaint
from stable_cascade.pipelines.prompts import embed_images
from stable_cascade.pipelines.sampling import encode_vq
from stable_cascade.pipelines.source import Source, read_source
from stable_cascade.pipelines.stages import encode_semantic
from tests.tiny_cascade import MULTIPLE
from tests.tiny_pipelines import (
    FAST,
    FOUR,
    PARTS,
    decoder_pipeline,
    embedded,
    emojis,
    images,
    prior_pipeline,
    reconstruction_pipeline,
    right_half,
    seeds,
    times_of,
    to_pil,
)


def test_strength_0_is_the_reconstruction_bit_by_bit(pipeline):
    photos = images(2)
    for generator in (lambda: seeds(1, 2), lambda: seeds(3)[0]):
        drawn = pipeline(["red dog", "snail"], image=photos, strength=0, generator=generator(), **FAST).images
        rebuilt = reconstruction_pipeline()(
            photos, ["red dog", "snail"], num_inference_steps=2, generator=generator(), output_type="pt"
        ).images
        assert torch.equal(drawn, rebuilt)


def test_strength_1_is_text_to_image_bit_by_bit(pipeline):
    for generator in (lambda: seeds(1, 2), lambda: seeds(3)[0]):
        prompts = ["red dog", "snail"]
        drawn = pipeline(prompts, image=images(2), strength=1, generator=generator(), **FAST).images
        assert torch.equal(drawn, pipeline(prompts, height=64, width=64, generator=generator(), **FAST).images)


@pytest.mark.parametrize("strength, times", [
    (0, []), (0.05, [0.05]), (0.5, [0.5, 0.25]), (0.75, [0.75, 0.5, 0.25]), (1, [1.0, 0.75, 0.5, 0.25]),
])  # fmt: skip
def test_strength_is_the_start_and_the_share_of_the_steps(pipeline, strength, times):
    assert times == times_of(lambda told: pipeline(
        "red dog", image=images(), strength=strength, generator=seeds(0), prior_callback_on_step_end=told, **FOUR
    ))  # fmt: skip


def test_the_image_is_noised_with_the_shift_of_the_sampling(pipeline):
    first = []
    hook = PARTS["prior"].register_forward_pre_hook(lambda module, args: first.append(args[0]))
    pipeline("red dog", image=images(), strength=0.5, prior_guidance_scale=1.0, generator=seeds(4)[0], **FOUR)
    hook.remove()
    clean = encode_semantic(PARTS["semantic_encoder"], images(), MULTIPLE)
    noise = torch.randn(clean.shape, generator=seeds(4)[0])
    # The cosine schedule at t = 0.5, in signal and noise, moved by a shift of 2.
    variance = (torch.tensor((0.008 + 0.5) / 1.008 * torch.pi / 2).cos() ** 2
                / torch.tensor(0.008 / 1.008 * torch.pi / 2).cos() ** 2)  # fmt: skip
    share = torch.sigmoid(torch.logit(variance) - 2 * torch.tensor(2.0).log())
    torch.testing.assert_close(first[0], share.sqrt() * clean + (1 - share).sqrt() * noise, atol=1e-5, rtol=1e-5)


def test_an_image_for_all_prompts_or_a_prompt_for_all_images(pipeline):
    photos = images(2)
    drawn = pipeline("red dog", image=photos, generator=seeds(1, 2), **FAST).images
    assert drawn.shape == photos.shape
    one = pipeline(["red dog", "snail"], image=to_pil(photos[0]), generator=seeds(1, 2), **FAST).images
    torch.testing.assert_close(one[0], drawn[0], atol=1e-4, rtol=1e-4)
    assert not torch.allclose(one[1], drawn[1], atol=1e-2)


@pytest.mark.parametrize("image, asked, drawn", [
    ((64, 72), (None, None), (64, 72)),
    ((71, 133), (None, None), (64, 128)),
    ((64, 128), (128, None), (128, 256)),
    ((100, 150), (None, 96), (64, 96)),
    ((64, 64), (72, 104), (72, 104)),
    ((30, 40), (64, 88), (64, 88)),
])  # fmt: skip
def test_the_image_decides_the_size_unless_one_is_given(image, asked, drawn):
    source = read_source(images(1, *image), torch.ones(*image), 0.5, *asked)
    assert (source.height, source.width) == drawn
    assert source.pixels.shape == (1, 3, *drawn)
    assert source.mask.shape == (1, 1, *drawn)
    torch.testing.assert_close(source.mask, torch.ones(1, 1, *drawn))


def test_an_image_is_cropped_around_its_middle_and_otherwise_left_alone():
    image = images(1, 70, 64)
    assert torch.equal(read_source(image, None, 0.5, None, None).pixels, image[..., 3:67, :])
    assert torch.equal(read_source(image[..., :64, :], None, 0.5, 64, 64).pixels, image[..., :64, :])


def distances(pipeline, images: torch.Tensor, strengths, **call) -> list[float]:
    """Of the drawn images, or their semantic latents, to the input, by strength."""
    if call["output_type"] == "latent":
        images, start = encode_semantic(pipeline.semantic_encoder, images, pipeline.config.resolution_multiple), images
    else:
        start = images
    found = []
    for strength in strengths:
        prompts = [f"{name}, noto style" for name in ("snail", "pear", "door", "panda")] * (len(images) // 4)
        drawn = pipeline(prompts, image=start, strength=strength, generator=seeds(*range(len(images))), **call).images
        found.append((drawn - images).square().mean().sqrt().item())
    return found


def test_distance_to_the_input_rises_with_the_strength():
    found = distances(embedded(), emojis(4), (0, 0.1, 0.2, 0.3, 0.5, 1), prior_num_inference_steps=10,
                      preview=True, output_type="latent")  # fmt: skip
    assert found[0] == 0
    assert found == sorted(found), found
    assert found[2] < 0.9 * found[-1]


@pytest.mark.slow
def test_distance_to_the_input_rises_with_every_tenth_of_the_strength():
    """Without fresh noise in the steps: at strengths near 1 nothing is left of the image but the noise's own."""
    pipeline, images, tenths = embedded(sampler="ddim"), emojis(24), [tenth / 10 for tenth in range(11)]
    found = distances(pipeline, images, tenths, preview=True, output_type="latent")
    assert found == sorted(found), found
    found = distances(pipeline, images, (0, 0.1, 0.2, 0.3, 0.5, 1), output_type="pt")
    assert found == sorted(found), found


def test_black_keeps_the_image_and_white_is_image_to_image(pipeline):
    image = images()
    call = {"prompt": "red dog", "image": image, "generator": seeds(1), **FAST}
    assert torch.equal(pipeline(**call, mask_image=torch.zeros(64, 64)).images, image)
    for strength in (0.5, 1):
        call |= {"strength": strength}
        plain = pipeline(**call | {"generator": seeds(1)}).images
        white = Image.new("L", (64, 64), 255)
        assert torch.equal(pipeline(**call | {"generator": seeds(1)}, mask_image=white).images, plain)


def test_kept_pixels_are_the_images_and_the_others_are_not(pipeline):
    image, mask = images(), right_half()
    drawn = pipeline("red dog", image=image, mask_image=mask, generator=seeds(1), **FAST).images
    assert torch.equal(drawn[..., :32], image[..., :32])
    assert (drawn[..., 32:] - image[..., 32:]).abs().mean() > 0.02
    photo = to_pil(image[0])
    pil = pipeline("red dog", image=photo, mask_image=to_pil(mask[0].expand(3, -1, -1)), generator=seeds(1),
                   **FAST | {"output_type": "pil"}).images[0]  # fmt: skip
    assert np.array_equal(np.asarray(pil)[:, :32], np.asarray(photo)[:, :32])


def test_both_stages_keep_the_images_latents(pipeline):
    image, mask = images(1, 64, 96), right_half(64, 96)
    call = {"prompt": "red dog", "image": image, "mask_image": mask, "generator": seeds(1)}
    semantic = prior_pipeline()(**call, num_inference_steps=2).image_embeddings
    clean = encode_semantic(PARTS["semantic_encoder"], image, MULTIPLE)
    touched = Source(64, 96, image, mask).repainted((6, 9), (32 / 3, 32 / 3))
    assert touched[0, 0, 0].tolist() == [False] * 4 + [True] * 5  # pixel 48 lies in the fifth, which begins at 42.67
    assert torch.equal(torch.where(touched, 0, semantic), torch.where(touched, 0, clean))
    assert ((semantic - clean).abs() > 1e-3)[touched.expand_as(clean)].float().mean() > 0.9
    latents = pipeline(**call | {"generator": seeds(1)}, **FAST | {"output_type": "latent"}).images
    clean = encode_vq(PARTS["vqgan"], image, (16, 24))
    assert torch.equal(latents[..., :12], clean[..., :12])
    assert not torch.allclose(latents[..., 12:], clean[..., 12:], atol=1e-2)


def test_kept_latents_are_noised_to_the_time_of_the_next_step():
    states, image = [], images()
    scheduler = PARTS["prior_scheduler"]
    prior_pipeline()(
        "red dog", image=image, mask_image=right_half(), num_inference_steps=4, generator=seeds(5)[0],
        callback_on_step_end=lambda pipe, step, time, tensors: states.append(tensors["latents"]),
    )  # fmt: skip
    clean = encode_semantic(PARTS["semantic_encoder"], image, MULTIPLE)
    noise = torch.randn(clean.shape, generator=seeds(5)[0])
    for state, time in zip(states, (0.75, 0.5, 0.25, 0.0), strict=True):
        expected = scheduler.add_noise(clean, noise, time)
        assert torch.equal(state[..., :3], expected[..., :3])
        assert not torch.allclose(state[..., 3:], expected[..., 3:], atol=1e-2)


@pytest.mark.parametrize("pixels, rows", [
    ((0, 1), [0]), ((10, 11), [0, 1]), ((11, 21), [1]), ((31, 32), [2]), ((32, 33), [3]), ((63, 64), [5])
])  # fmt: skip
def test_every_latent_that_the_mask_touches_is_repainted(pixels, rows):
    mask = torch.zeros(1, 1, 64, 64)
    mask[..., slice(*pixels), 5] = 1
    touched = Source(64, 64, images(), mask).repainted((6, 6), (32 / 3, 32 / 3))[0, 0]
    assert touched.nonzero().tolist() == [[row, 0] for row in rows]


def test_grey_mixes_the_pixels():
    image, drawn = torch.zeros(1, 3, 64, 64), torch.ones(1, 3, 64, 64)
    mask = torch.full((1, 1, 64, 64), 0.25)
    assert torch.equal(Source(64, 64, image, mask).pasted(drawn), mask.expand_as(drawn))


def test_two_stages_apart_keep_the_same(pipeline):
    given = {"image": images(), "mask_image": right_half()}
    generator = seeds(4)
    semantic = prior_pipeline()("red dog", **given, num_inference_steps=2, generator=generator).image_embeddings
    drawn = decoder_pipeline()(semantic, "red dog", 2, **given, generator=generator, output_type="pt").images
    assert torch.equal(drawn, pipeline("red dog", **given, generator=seeds(4), **FAST).images)


def test_outpainting_adds_a_border_to_paint():
    image = to_pil(images(1, 64, 80)[0])
    canvas, mask = outpaint(image, left=8, top=16, bottom=8)
    assert (canvas.size, mask.size, mask.mode) == ((88, 88), (88, 88), "L")
    assert np.array_equal(np.asarray(canvas)[16:80, 8:], np.asarray(image))
    white = np.asarray(mask) == 255
    assert not white[16:80, 8:].any()
    assert white.sum() == 88 * 88 - 64 * 80
    assert np.array_equal(np.asarray(canvas)[:16, 8:], np.repeat(np.asarray(image)[:1], 16, axis=0))


@pytest.mark.parametrize("margins, message", [
    ({}, "are all 0"),
    ({"left": -8}, "left -8 is no number"),
    ({"right": 12}, r"width 76 \(64 of the image, left \+ right 12\) .* nearest: left \+ right = 16"),
    ({"top": 8.0}, "top 8.0"),
])  # fmt: skip
def test_outpainting_refuses(margins, message):
    with pytest.raises(ValueError, match=message):
        outpaint(to_pil(images()[0]), **margins)


def test_weights_of_reference_images(pipeline):
    pair = list(images(2, 40, 48))

    def drawn(**given):
        return pipeline("red dog", generator=seeds(1), **given, **FAST).images

    plain, shown, both = drawn(), drawn(images=pair[:1]), drawn(images=pair)
    assert torch.equal(drawn(images=pair, image_weights=[1, 1.0]), both)
    torch.testing.assert_close(drawn(images=pair[0], image_weights=[0]), plain, atol=1e-5, rtol=1e-5)
    half = drawn(images=pair[:1], image_weights=[0.5])
    assert 0.2 < (half - plain).norm() / (shown - plain).norm() < 0.8
    embeds = embed_images(pair, PARTS["image_encoder"], torch.device("cpu"), count=1)[0]
    weighted = drawn(images=pair, image_weights=[0.3, 1.5])
    assert torch.equal(drawn(image_embeds=embeds, image_weights=[0.3, 1.5]), weighted)
    assert not torch.allclose(drawn(images=pair, image_weights=[1.5, 0.3]), weighted, atol=1e-3)


def test_a_weight_moves_the_image_tokens_from_those_of_no_image_to_their_own():
    prior, generator = PARTS["prior"], seeds(3)[0]
    pooled, text = torch.randn(1, 32, generator=generator), torch.randn(1, 5, 32, generator=generator)
    image = torch.randn(1, 2, 24, generator=generator)
    own = prior.encode_conditions(pooled, text, image).tokens
    none = prior.encode_conditions(pooled, text, torch.zeros_like(image)).tokens
    mixed = prior.encode_conditions(pooled, text, image, torch.tensor([0.25, 2.0])).tokens
    assert torch.equal(mixed[:, :-8], own[:, :-8])
    torch.testing.assert_close(mixed[:, -8:-4], none[:, -8:-4] + 0.25 * (own - none)[:, -8:-4])
    torch.testing.assert_close(mixed[:, -4:], none[:, -4:] + 2.0 * (own - none)[:, -4:])
