"""Code that was written for diffusers: `from_pipe`, replaced schedulers, callbacks that steer, numpy's numbers."""

import copy

import numpy as np
import pytest
import torch
from diffusers import DDPMWuerstchenScheduler
from safetensors.torch import save_file

from stable_cascade import (
    StableCascadeDecoderPipeline,
    StableCascadePipeline,
    StableCascadePrior,
    StableCascadePriorPipeline,
)
from stable_cascade.models.clip import clip_pixels
from stable_cascade.schedulers import StableCascadeScheduler
from tests.tiny_cascade import MULTIPLE, PRIOR
from tests.tiny_pipelines import cascade, images, prior_pipeline

SMALL = {"height": 64, "width": 64}
WIDE = torch.zeros(1, 1, 5)
FEW = {"prior_num_inference_steps": 3, "num_inference_steps": 2, "height": 64, "width": 64}


@pytest.fixture(scope="module")
def folder(tmp_path_factory, pipeline):
    place = tmp_path_factory.mktemp("whole")
    pipeline.save_pretrained(place)
    return place


def copied():
    """A cascade of its own, since the fixture's is shared."""
    return copy.deepcopy(cascade())


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def test_from_pipe_shares_the_components(pipeline):
    for cls in (StableCascadePipeline, StableCascadePriorPipeline, StableCascadeDecoderPipeline):
        made = cls.from_pipe(pipeline)
        assert type(made) is cls
        assert all(part is getattr(pipeline, name) for name, part in made.components.items() if name != "scheduler")
    prior, decoder = pipeline.prior_pipe, pipeline.decoder_pipe
    assert prior.scheduler is pipeline.prior_scheduler
    assert decoder.scheduler is pipeline.scheduler
    semantic = prior("a", height=64, width=64, num_inference_steps=2, generator=seeded())
    assert len(decoder(semantic.image_embeddings, "a", num_inference_steps=1).images) == 1
    with pytest.raises(ValueError, match=r"from_pipe needs 'decoder', which a StableCascadePriorPipeline"):
        StableCascadePipeline.from_pipe(prior)


def test_a_scheduler_of_diffusers_becomes_ours(pipeline):
    made = StableCascadePipeline.from_pipe(pipeline)
    made.prior_scheduler = DDPMWuerstchenScheduler()
    assert isinstance(made.prior_scheduler, StableCascadeScheduler)
    assert made.prior_scheduler.config.shift == 2.0
    made.scheduler = DDPMWuerstchenScheduler()
    assert made.scheduler.config.get("shift", 1.0) == 1.0
    from diffusers import DDIMScheduler

    with pytest.raises(ValueError, match="scheduler DDIMScheduler does not know Stable Cascade's noise"):
        made.scheduler = DDIMScheduler()


def test_a_callback_changes_the_guidance_and_ends_a_stage(pipeline):
    seen = []

    def callback(pipe, step, time, tensors):
        seen.append((step, pipe.guidance_scale, pipe.num_timesteps, pipe.do_classifier_free_guidance))
        if step == 0:
            pipe._guidance_scale = 0.0
        return tensors

    def semantic(**options):
        prior = pipeline.prior_pipe
        return prior("a", height=64, width=64, num_inference_steps=3, generator=seeded(), **options).image_embeddings

    guided, steered = semantic(), semantic(callback_on_step_end=callback)
    assert seen == [(0, 4.0, 3, True), (1, 0.0, 3, False), (2, 0.0, 3, False)]
    assert not torch.equal(guided, steered)

    def stop(pipe, step, time, tensors):
        pipe._interrupt = True
        seen.append("stopped")
        return {}

    semantic(callback_on_step_end=stop)
    assert seen.count("stopped") == 1


def test_guidance_cannot_begin_in_the_middle(pipeline):
    def callback(pipe, step, time, tensors):
        pipe._guidance_scale = 5.0

    with pytest.raises(ValueError, match="cannot begin in the middle of a run"):
        pipeline.prior_pipe(
            "a", height=64, width=64, num_inference_steps=2, guidance_scale=1, callback_on_step_end=callback
        )


def test_return_dict_false_is_diffusers(pipeline):
    images = pipeline("a", **FEW, return_dict=False, generator=seeded())
    assert isinstance(images, list)
    latents = pipeline.prior_pipe(
        "a", height=64, width=64, num_inference_steps=1, output_type="latent"
    ).image_embeddings
    assert isinstance(pipeline.decoder_pipe(latents, "a", num_inference_steps=1, return_dict=False), list)


def test_whole_numbers_of_numpy_and_torch_are_whole_numbers(pipeline):
    plain = pipeline("a", **FEW, output_type="np", generator=seeded()).images
    others = {
        "prior_num_inference_steps": np.int32(3), "num_inference_steps": torch.tensor(2), "height": np.int64(64),
        "width": torch.tensor(64), "num_images_per_prompt": np.int16(1), "cache_interval": np.int8(1),
    }  # fmt: skip
    assert np.array_equal(pipeline("a", **others, output_type="np", generator=seeded()).images, plain)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"generator": 42}, r"generator is int 42; give torch.Generator\(\).manual_seed"),
        ({"prior_num_inference_steps": 10**9}, "up to 10,000"),
        ({"height": 10**7}, "up to 16,384"),
        ({"num_images_per_prompt": 10**6}, "up to 10,000"),
        ({"num_inference_steps": np.float32(2)}, "not a positive whole number"),
        ({"num_inference_steps": True}, "not a positive whole number"),
        (
            {"prompt": None, "prompt_embeds": torch.zeros(1, 7, 5), "prompt_embeds_pooled": torch.zeros(1, 1, 5)},
            "5 wide",
        ),
    ],
)
def test_what_cannot_be_is_one_line(pipeline, arguments, words):
    with pytest.raises(ValueError, match=words) as caught:
        pipeline(**{"prompt": "a", **FEW, **arguments})
    assert "\n" not in str(caught.value)


def test_float64_is_refused():
    with pytest.raises(ValueError, match="the networks are float64"):
        copied().to(torch.float64)("a", **FEW)


@pytest.mark.parametrize(
    ("dtype", "expected"), [("float16", torch.float16), ("torch.bfloat16", torch.bfloat16), ("auto", torch.float32)]
)
def test_types_by_name(folder, dtype, expected):
    made = StableCascadePipeline.from_pretrained(folder, torch_dtype=dtype)
    assert {made.prior.dtype, made.decoder.dtype, made.text_encoder.dtype} == {expected}


def test_auto_is_what_the_files_hold(tmp_path, pipeline):
    half = copied().to(torch.bfloat16)
    half.save_pretrained(tmp_path)
    assert StableCascadePipeline.from_pretrained(tmp_path, torch_dtype="auto").prior.dtype == torch.bfloat16
    with pytest.raises(ValueError, match="torch_dtype 'floaty' is none of"):
        StableCascadePipeline.from_pretrained(tmp_path, torch_dtype="floaty")


def test_arguments_of_other_pipelines_and_a_device_map(folder):
    made = StableCascadePipeline.from_pretrained(
        folder, safety_checker=None, requires_safety_checker=False, device_map="cpu"
    )
    assert made.device.type == "cpu"
    with pytest.raises(ValueError, match=r"device_map 'balanced' is no device; .* enable_model_cpu_offload"):
        StableCascadePipeline.from_pretrained(folder, device_map="balanced")
    with pytest.raises(ValueError, match="safety_checker is of other pipelines"):
        StableCascadePipeline.from_pretrained(folder, safety_checker=object())


def test_components_of_different_types_are_told(folder, caplog):
    from stable_cascade import StableCascadePrior

    half = StableCascadePrior.from_pretrained(folder / "prior", torch_dtype=torch.float16)
    StableCascadePipeline.from_pretrained(folder, prior=half)
    assert "components of different types" in caplog.text


def test_a_save_with_a_lora_loaded_is_refused_and_possible_after_unloading(tmp_path):
    from stable_cascade.adapters import add_lora

    pipeline = copied()
    add_lora(pipeline.prior, module_filters=[".attn"], rank=2)
    for save in (pipeline.save_pretrained, pipeline.prior.save_pretrained):
        with pytest.raises(ValueError, match=r"carries the adapter 'default'; .*unload_lora_weights\(\)"):
            save(tmp_path / "whole")
    pipeline.unload_lora_weights()
    pipeline.save_pretrained(tmp_path / "whole")
    StableCascadePipeline.from_pretrained(tmp_path / "whole")


def test_names_of_adapters_have_no_dots(tmp_path):
    from stable_cascade.adapters import add_lora, save_lora

    trained = copied()
    add_lora(trained.prior, module_filters=[".attn"], rank=2)
    save_lora(tmp_path, prior=trained.prior)
    with pytest.raises(ValueError, match=r"adapter_name 'style.v1' has a dot"):
        copied().load_lora_weights(tmp_path, adapter_name="style.v1")


def networks_of(folder):
    return {path.relative_to(folder).as_posix() for path in folder.rglob("diffusion_pytorch_model*")}


def test_a_variant_and_the_size_of_shards_reach_every_network(pipeline, tmp_path):
    """A pipeline passes on what it finds among the arguments of a network's own `save_pretrained`."""
    pipeline.save_pretrained(tmp_path / "a", variant="bf16")
    assert {name.split("/")[1] for name in networks_of(tmp_path / "a")} == {"diffusion_pytorch_model.bf16.safetensors"}
    StableCascadePipeline.from_pretrained(tmp_path / "a", variant="bf16")
    pipeline.save_pretrained(tmp_path / "b", max_shard_size="20KB")
    assert "prior/diffusion_pytorch_model.safetensors.index.json" in networks_of(tmp_path / "b")


def test_the_combined_pipeline_takes_diffusers_names(pipeline):
    parts = dict(pipeline.components)
    theirs = {name: parts[name] for name in ("text_encoder", "tokenizer", "decoder", "scheduler", "vqgan")}
    theirs |= {f"prior_{name}": parts[name] for name in ("prior", "text_encoder", "tokenizer")}
    theirs |= {
        "prior_scheduler": parts["prior_scheduler"],
        "prior_image_encoder": None,
        "prior_feature_extractor": None,
    }
    made = StableCascadePipeline(**theirs, resolution_multiple=MULTIPLE)
    assert made.prior is made.prior_prior is parts["prior"]
    assert made.prior_text_encoder is parts["text_encoder"]
    made.prior_prior = other = copy.deepcopy(parts["prior"])
    assert made.prior is made.components["prior"] is other
    mine = StableCascadePipeline(**parts, resolution_multiple=MULTIPLE)
    assert made.config.keys() == mine.config.keys()


def test_two_text_encoders_that_differ_are_refused(pipeline):
    parts = dict(pipeline.components)
    other = copy.deepcopy(parts["text_encoder"])
    assert StableCascadePipeline(**parts, prior_text_encoder=other).text_encoder is parts["text_encoder"]
    with torch.no_grad():
        next(other.parameters()).add_(1)
    with pytest.raises(ValueError, match="prior_text_encoder and text_encoder differ; one serves both stages here"):
        StableCascadePipeline(**parts, prior_text_encoder=other)


def test_diffusers_names_of_components_are_read_by_from_pretrained(pipeline, tmp_path):
    pipeline.save_pretrained(tmp_path)
    other = copy.deepcopy(pipeline.prior)
    assert StableCascadePipeline.from_pretrained(tmp_path, prior_prior=other).prior is other


@pytest.mark.parametrize("kind", ["whole", "prior", "decoder"])
def test_encode_prompt_as_diffusers_calls_it(pipeline, kind):
    pipe = {"whole": pipeline, "prior": pipeline.prior_pipe, "decoder": pipeline.decoder_pipe}[kind]
    named = pipe.encode_prompt(
        prompt="red dog", device=torch.device("cpu"), batch_size=1, num_images_per_prompt=2,
        do_classifier_free_guidance=True, negative_prompt="snail", prompt_embeds=None, prompt_embeds_pooled=None,
        negative_prompt_embeds=None, negative_prompt_embeds_pooled=None,
    )  # fmt: skip
    assert [one.shape[:2] for one in named] == [(2, 12), (2, 1)] * 2
    in_order = pipe.encode_prompt("cpu", 1, 2, True, "red dog", "snail")
    assert all(torch.equal(one, other) for one, other in zip(named, in_order, strict=True))
    alone = pipe.encode_prompt("cpu", 3, 1, False, "red dog")
    assert alone[0].shape[0] == 3
    assert alone[2:] == (None, None)
    again = pipe.encode_prompt("cpu", 3, 1, False, prompt_embeds=alone[0], prompt_embeds_pooled=alone[1])
    assert torch.equal(again[0], alone[0])


def test_a_text_in_place_of_the_device_is_told(pipeline):
    with pytest.raises(
        ValueError, match="begins with device and batch_size, as in diffusers; name the prompt: prompt=…"
    ):
        pipeline.encode_prompt("red dog")


def test_networks_of_diffusers_share_their_parameters_with_ours():
    from diffusers.models import StableCascadeUNet

    theirs = StableCascadeUNet(**PRIOR)
    ours = StableCascadePriorPipeline(tokenizer=None, text_encoder=None, prior=theirs, scheduler=None).to(
        torch.bfloat16
    )
    assert type(ours.prior) is StableCascadePrior
    assert theirs.dtype is torch.bfloat16


def test_a_type_under_its_newer_name(tmp_path):
    """diffusers calls `torch_dtype` `dtype` as well; so does everything here that takes it."""
    pipeline = copied()
    stage = tmp_path / "stage_c.safetensors"
    save_file(pipeline.prior.to_original(), stage)
    config = dict(pipeline.prior.config)
    assert StableCascadePrior.from_single_file(stage, config=config, dtype=torch.bfloat16).dtype == torch.bfloat16
    made = StableCascadePriorPipeline.from_single_file(
        stage, config={"prior": config}, dtype=torch.bfloat16, text_encoder=pipeline.text_encoder,
        tokenizer=pipeline.tokenizer,
    )  # fmt: skip
    assert made.prior.dtype == torch.bfloat16
    assert StableCascadePriorPipeline.from_pipe(made, dtype=torch.float16).prior.dtype == torch.float16
    with pytest.raises(ValueError, match="torch_dtype 'bfloat16' is no type of torch"):
        StableCascadePrior.from_single_file(stage, config=config, torch_dtype="bfloat16")
    with pytest.raises(ValueError, match="subfolder 'prior' is one of the folder that config names"):
        StableCascadePrior.from_single_file(stage, config=config, subfolder="prior")


def test_a_stage_without_its_network_is_told(pipeline):
    parts = {**pipeline.prior_pipe.components, "prior": None}
    with pytest.raises(ValueError, match="this StableCascadePriorPipeline has no prior"):
        StableCascadePriorPipeline(**parts)("red dog")


def test_encode_image_as_diffusers_calls_it():
    prior = prior_pipeline()
    shown, absent = prior.encode_image(list(images(2)), "cpu", torch.float32, 1, 2)
    assert shown.shape[:2] == (2, 2)
    assert not absent.any()
    size = prior.image_encoder.config.image_size
    alone = prior.image_encoder(pixel_values=clip_pixels(images(1), size)).image_embeds
    torch.testing.assert_close(shown[0, 0], alone[0])
    latents = [
        prior("red dog", **SMALL, num_inference_steps=1, num_images_per_prompt=2, generator=seeded(), **given)
        for given in ({"images": list(images(2))}, {"image_embeds": shown})
    ]
    assert torch.equal(latents[0].image_embeddings, latents[1].image_embeddings)


def test_a_folder_of_diffusers_whole_pipeline_loads(pipeline, folder, tmp_path):
    import diffusers

    prior = diffusers.StableCascadeUNet.from_pretrained(folder / "prior")
    decoder = diffusers.StableCascadeUNet.from_pretrained(folder / "decoder")
    text = {"text_encoder": pipeline.text_encoder, "tokenizer": pipeline.tokenizer}
    theirs = diffusers.StableCascadeCombinedPipeline(
        **text, **{f"prior_{name}": part for name, part in text.items()}, decoder=decoder, prior_prior=prior,
        scheduler=DDPMWuerstchenScheduler(), prior_scheduler=DDPMWuerstchenScheduler(), vqgan=pipeline.vqgan,
        prior_feature_extractor=None, prior_image_encoder=None,
    )  # fmt: skip
    theirs.save_pretrained(tmp_path)
    whole = StableCascadePipeline.from_pretrained(tmp_path, resolution_multiple=MULTIPLE)
    alone = StableCascadePriorPipeline.from_pretrained(tmp_path, resolution_multiple=MULTIPLE)
    for made in (whole.prior, alone.prior):
        assert all(torch.equal(value, made.state_dict()[name]) for name, value in prior.state_dict().items())
    assert whole.prior_scheduler.config.shift == alone.scheduler.config.shift == 2.0
    assert len(whole("red dog", **FEW).images) == 1


def test_diffusers_classes_draw_from_the_folders_of_our_stages(pipeline, tmp_path):
    import diffusers

    pipeline.prior_pipe.save_pretrained(tmp_path / "prior")
    pipeline.decoder_pipe.save_pretrained(tmp_path / "decoder")
    # Its loop knows the times of its own scheduler's class alone; with another it divides by the last one, zero.
    own = {"scheduler": DDPMWuerstchenScheduler()}
    prior = diffusers.StableCascadePriorPipeline.from_pretrained(tmp_path / "prior", **own)
    decoder = diffusers.StableCascadeDecoderPipeline.from_pretrained(tmp_path / "decoder", **own)
    semantic = prior("red dog", height=128, width=128, num_inference_steps=2, generator=seeded())
    images = decoder(semantic.image_embeddings, "red dog", num_inference_steps=1, output_type="np").images
    assert np.isfinite(images).all()
