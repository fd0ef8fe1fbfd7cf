"""What holds for every task of the pipelines: batches, guidance, samplers, sizes, diffusers' names, offloading."""

from __future__ import annotations

import inspect

import numpy as np
import pytest
import torch

from stable_cascade import (
    StableCascadeDecoderPipeline,
    StableCascadePipeline,
    StableCascadePriorPipeline,
    StableCascadeScheduler,
)
from tests.tiny_cascade import tiny_parts
from tests.tiny_pipelines import (
    FAST,
    FOUR,
    PARTS,
    cascade,
    decoder_pipeline,
    edges,
    images,
    prior_pipeline,
    reconstruction_pipeline,
    right_half,
    seeds,
    times_of,
    tiny_controlnet,
)


def test_every_task_gives_the_same_image_alone_or_in_a_batch():
    pipeline, photos, control = cascade(controlnet=tiny_controlnet()), images(2), edges(2)
    tasks = {
        "image to image": {"image": photos, "strength": 0.6},
        "inpainting": {"image": photos, "mask_image": right_half().expand(2, -1, -1, -1)},
        "control": {"control_image": control},
        "all": {"image": photos, "mask_image": right_half(), "control_image": control, "images": images(1)[0]},
    }
    for name, given in tasks.items():
        together = pipeline(["red dog", "snail"], **given, generator=seeds(1, 2), **FAST).images
        own = {key: value[1:] if getattr(value, "ndim", 0) == 4 and len(value) == 2 else value
               for key, value in given.items()}  # fmt: skip
        alone = pipeline("snail", **own, generator=seeds(2), **FAST).images
        torch.testing.assert_close(together[1], alone[0], atol=1e-4, rtol=1e-4, msg=name)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_task_in_half_precision(dtype):
    given = {"image": images(), "mask_image": right_half(), "control_image": edges(), "images": images()[0],
             "image_weights": [0.5], "strength": 0.8, "guidance_interval": (0.0, 0.5), **FOUR}  # fmt: skip
    parts = tiny_parts() | {"controlnet": tiny_controlnet()}
    exact = cascade(**parts)("red dog", generator=seeds(1), **given).images
    half = cascade(**{name: part.to(dtype) if isinstance(part, torch.nn.Module) else part
                      for name, part in parts.items()})  # fmt: skip
    drawn = half("red dog", generator=seeds(1), **given).images
    assert torch.equal(drawn[..., :32], images()[..., :32])
    assert (drawn - exact).abs().mean() < 0.1


def test_guidance_acts_within_its_interval(pipeline):
    rows, call = [], FAST | {"prior_num_inference_steps": 5}
    hook = PARTS["prior"].register_forward_pre_hook(lambda module, args: rows.append(len(args[0])))
    drawn = pipeline("red dog", guidance_interval=(0.4, 0.8), generator=seeds(1), **call).images
    hook.remove()
    assert rows == [1, 2, 2, 2, 1]  # times 1, 0.8, 0.6, 0.4, 0.2
    always = pipeline("red dog", generator=seeds(1), **call).images
    assert torch.equal(pipeline("red dog", guidance_interval=(0, 1), generator=seeds(1), **call).images, always)
    assert not torch.allclose(drawn, always, atol=1e-3)
    never = pipeline("red dog", guidance_interval=(0, 0), generator=seeds(1), **call).images
    unguided = pipeline("red dog", prior_guidance_scale=1, decoder_guidance_scale=1, generator=seeds(1), **call).images
    torch.testing.assert_close(never, unguided, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("settings", [{"sampler": "ddim"}, {"sampler": "lcm"}, {"shift": 1.0}])
def test_samplers_and_shift_of_stage_c(pipeline, settings):
    scheduler = StableCascadeScheduler.from_config(PARTS["prior_scheduler"].config, **settings)
    other = cascade(prior_scheduler=scheduler)
    call = {"prompt": ["red dog", "snail"], "image": images(2), "strength": 0.7, **FOUR}
    together = other(**call, generator=seeds(1, 2)).images
    alone = other(**call | {"prompt": "snail", "image": images(2)[1]}, generator=seeds(2)).images
    torch.testing.assert_close(together[1], alone[0], atol=1e-4, rtol=1e-4)
    assert not torch.allclose(together, pipeline(**call, generator=seeds(1, 2)).images, atol=1e-3)


def test_given_times(pipeline):
    prior = prior_pipeline()
    plain = prior("red dog", num_inference_steps=4, generator=seeds(1)).image_embeddings
    for times in ([1.0, 0.75, 0.5, 0.25, 0.0], torch.linspace(1, 0, 5), np.linspace(1, 0, 5)):
        assert torch.equal(prior("red dog", timesteps=times, generator=seeds(1)).image_embeddings, plain)
    uneven = [1.0, 0.9, 0.3, 0.1]
    assert times_of(lambda told: prior("red dog", timesteps=uneven, callback_on_step_end=told)) == [1.0, 0.9, 0.3]


def test_previews_while_it_draws(pipeline):
    shown = []

    def look(pipe, step, time, tensors):
        shown.extend(pipe.preview_images(tensors["clean"]))

    pipeline(["red dog", "snail"], prior_callback_on_step_end=look, generator=seeds(1, 2),
             prior_callback_on_step_end_tensor_inputs=["clean"], **FAST)  # fmt: skip
    assert [image.size for image in shown] == [(48, 48)] * 4
    rough = pipeline(["red dog", "snail"], preview=True, generator=seeds(1, 2), **FAST | {"output_type": "pil"}).images
    assert [np.asarray(one).tobytes() for one in shown[2:]] == [np.asarray(one).tobytes() for one in rough]
    assert len(reconstruction_pipeline().preview_images(torch.zeros(1, 16, 6, 6))) == 1
    with pytest.raises(ValueError, match=r"preview_images takes semantic latents \(B, 16, h, w\), not \(1, 4, 16"):
        pipeline.preview_images(torch.zeros(1, 4, 16, 16))
    with pytest.raises(ValueError, match="preview_images needs a previewer"):
        cascade(previewer=None).preview_images(torch.zeros(1, 16, 6, 6))


@pytest.mark.parametrize("compression, sides", [(None, (7, 6)), (8, (9, 8)), (16, (5, 4)), (32, (3, 2))])
def test_reconstruction_at_any_compression(compression, sides):
    pipeline, photos = reconstruction_pipeline(), images(1, 72, 64)
    assert pipeline.encode(photos, compression).shape == (1, 16, *sides)
    drawn = pipeline(photos, compression=compression, num_inference_steps=1, output_type="pt").images
    assert drawn.shape == photos.shape


def test_reconstruction_of_images_of_any_size():
    pipeline = reconstruction_pipeline()
    assert pipeline(images(1, 70, 97), num_inference_steps=1, output_type="pt").images.shape == (1, 3, 64, 96)
    assert pipeline(images(), height=96, num_inference_steps=1, output_type="pt").images.shape == (1, 3, 96, 96)


def test_keywords_of_diffusers():
    from diffusers.pipelines import stable_cascade as theirs

    pairs = [(theirs.StableCascadeCombinedPipeline, StableCascadePipeline, ["prompt", "images", "height", "width"]),
             (theirs.StableCascadePriorPipeline, StableCascadePriorPipeline,
              ["prompt", "images", "height", "width", "num_inference_steps"]),
             (theirs.StableCascadeDecoderPipeline, StableCascadeDecoderPipeline,
              ["image_embeddings", "prompt", "num_inference_steps", "guidance_scale"])]  # fmt: skip
    for their, our, first in pairs:
        known = list(inspect.signature(our.__call__).parameters.values())
        names = [one.name for one in known]
        assert not set(inspect.signature(their.__call__).parameters) - set(names)
        positional = [one.name for one in known if one.kind is one.POSITIONAL_OR_KEYWORD][1:]
        assert positional == first == list(inspect.signature(their.__call__).parameters)[1 : len(first) + 1]


def test_decoder_takes_the_prior_pipelines_whole_output():
    stage_c = prior_pipeline()("red dog", num_inference_steps=2, generator=seeds(1))
    embeds = {name: stage_c[name] for name in ("prompt_embeds", "prompt_embeds_pooled", "negative_prompt_embeds",
                                               "negative_prompt_embeds_pooled")}  # fmt: skip
    call = {"num_inference_steps": 2, "output_type": "pt"}
    drawn = decoder_pipeline()(stage_c.image_embeddings, **embeds, **call, generator=seeds(1)).images
    expected = decoder_pipeline()(stage_c.image_embeddings, "red dog", **call, generator=seeds(1)).images
    torch.testing.assert_close(drawn, expected, atol=1e-5, rtol=1e-5)


def test_offloading_leaves_no_gap_between_the_networks_that_every_call_runs():
    """A network sends away only the one before it in the list; with an unused one between, two large ones meet."""
    order = StableCascadePipeline.model_cpu_offload_seq
    assert order.endswith("->text_encoder->prior->decoder->vqgan")
    assert {"controlnet", "semantic_encoder", "image_encoder", "previewer"} <= set(order.split("->"))
    assert StableCascadePriorPipeline.model_cpu_offload_seq.endswith("->text_encoder->prior")
    assert reconstruction_pipeline().model_cpu_offload_seq.endswith("->text_encoder->decoder->vqgan")


def test_offloaded_networks_do_every_task():
    from accelerate import cpu_offload

    given = {"image": images(), "mask_image": right_half(), "control_image": [edges(), edges(seed=1)],
             "images": images()[0], **FAST}  # fmt: skip
    nets = [tiny_controlnet(), tiny_controlnet(seed=1)]
    expected = cascade(**tiny_parts(), controlnet=nets)("red dog", generator=seeds(1), **given).images
    pipeline = cascade(**tiny_parts(), controlnet=nets)
    for name in ("text_encoder", "image_encoder", "semantic_encoder", "controlnet", "prior", "decoder", "vqgan"):
        cpu_offload(getattr(pipeline, name), torch.device("cpu"))
    torch.testing.assert_close(pipeline("red dog", generator=seeds(1), **given).images, expected, atol=1e-4, rtol=1e-4)
