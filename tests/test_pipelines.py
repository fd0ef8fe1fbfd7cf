"""Pipelines on a tiny cascade: laws, round trips, and every refusal."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch
from PIL import Image

from stable_cascade import (
    StableCascadeDecoderPipeline,
    StableCascadePipeline,
    StableCascadePriorPipeline,
    StableCascadeReconstructionPipeline,
    StableCascadeScheduler,
)
from stable_cascade.adapters import add_learned_tokens, add_lora, save_lora
from stable_cascade.models.clip import encode_prompts
from tests.tiny_cascade import MULTIPLE, tiny_parts
from tests.tiny_pipelines import (
    DECODER_PARTS,
    FAST,
    PARTS,
    cascade,
    decoder_pipeline,
    prior_pipeline,
    quiet,
    reconstruction_pipeline,
    seeds,
)


def test_images_in_every_form(pipeline):
    images = {kind: pipeline("red dog", generator=seeds(0)[0], **FAST | {"output_type": kind}).images
              for kind in ("pil", "np", "pt", "latent")}  # fmt: skip
    assert images["pt"].shape == (1, 3, 64, 64)
    assert 0 <= images["pt"].min() <= images["pt"].max() <= 1
    assert images["pt"].std() > 0.01
    assert np.allclose(images["np"], images["pt"].permute(0, 2, 3, 1).numpy())
    assert isinstance(images["pil"][0], Image.Image)
    assert np.abs(np.asarray(images["pil"][0]) / 255 - images["np"][0]).max() <= 0.5 / 255 + 1e-6
    assert images["latent"].shape == (1, 4, 16, 16)
    assert torch.equal(pipeline("red dog", generator=seeds(0)[0], return_dict=False, **FAST), images["pt"])


def test_a_generator_per_image_gives_the_same_image_alone_or_in_a_batch(pipeline):
    prompts = ["red dog", "a photo of snails", ""]
    together = pipeline(prompts, generator=seeds(1, 2, 3), **FAST).images
    for i, prompt in enumerate(prompts):
        alone = pipeline(prompt, generator=seeds(i + 1), **FAST).images
        assert torch.allclose(together[i], alone[0], atol=1e-4)
    copies = pipeline("red dog", num_images_per_prompt=2, generator=seeds(1, 9), **FAST).images
    assert torch.allclose(copies[0], together[0], atol=1e-4)
    assert not torch.allclose(copies[0], copies[1], atol=1e-2)


def test_no_generator_leaves_the_global_one_alone(pipeline):
    state = torch.get_rng_state()
    one, two = (pipeline("red dog", **FAST).images for _ in range(2))
    assert torch.equal(torch.get_rng_state(), state)
    assert not torch.equal(one, two)


@pytest.mark.parametrize("height, width", [(64, 72), (88, 64), (104, 200)])
def test_any_size_in_steps_of_8(pipeline, height, width):
    images = pipeline("red dog", height=height, width=width, generator=seeds(0), **FAST).images
    assert images.shape == (1, 3, height, width)
    assert images.isfinite().all()


@pytest.mark.parametrize("height, width, multiple, semantic, vq", [
    (1024, 1024, 42.67, (24, 24), (256, 256)),
    (64, 64, 10.67, (6, 6), (16, 16)),
    (520, 1000, 42.67, (13, 24), (130, 250)),
    (72, 1544, 42.67, (2, 37), (18, 386)),
    (66, 70, 10.67, (7, 7), (18, 18)),
])  # fmt: skip
def test_latent_sizes(height, width, multiple, semantic, vq):
    from stable_cascade.pipelines.call import semantic_size, vq_size

    assert semantic_size(height, width, multiple) == semantic
    assert vq_size(height, width) == vq


def test_the_two_stages_apart_equal_the_whole(pipeline):
    generators = seeds(4, 5)
    prior, decoder = prior_pipeline(), decoder_pipeline()
    stage_c = prior(["red dog", "snail"], num_inference_steps=2, generator=generators)
    assert stage_c.image_embeddings.shape == (2, 16, 6, 6)
    images = decoder(stage_c.image_embeddings, ["red dog", "snail"], num_inference_steps=2, generator=generators,
                     output_type="pt").images  # fmt: skip
    assert torch.equal(images, pipeline(["red dog", "snail"], generator=seeds(4, 5), **FAST).images)


def test_embeddings_in_place_of_prompts(pipeline):
    hidden, pooled, _ = encode_prompts(PARTS["text_encoder"], PARTS["tokenizer"], ["red dog", "snail"])
    empty, empty_pooled, _ = encode_prompts(PARTS["text_encoder"], PARTS["tokenizer"], ["", ""])
    given = {"prompt_embeds": hidden, "prompt_embeds_pooled": pooled, "negative_prompt_embeds": empty,
             "negative_prompt_embeds_pooled": empty_pooled}  # fmt: skip
    expected = pipeline(["red dog", "snail"], generator=seeds(1, 2), **FAST).images
    assert torch.allclose(pipeline(**given, generator=seeds(1, 2), **FAST).images, expected, atol=1e-5)
    del given["negative_prompt_embeds"], given["negative_prompt_embeds_pooled"]
    given["prompt_embeds_pooled"] = pooled[:, 0]
    assert torch.allclose(pipeline(**given, generator=seeds(1, 2), **FAST).images, expected, atol=1e-5)


def test_negative_prompt_acts_only_with_guidance(pipeline):
    plain = pipeline("red dog", generator=seeds(1), **FAST).images
    assert not torch.allclose(pipeline("red dog", negative_prompt="snail", generator=seeds(1), **FAST).images, plain)
    off = FAST | {"prior_guidance_scale": 1.0, "decoder_guidance_scale": 0.0}
    one = pipeline("red dog", generator=seeds(1), **off).images
    assert torch.equal(pipeline("red dog", negative_prompt="snail", generator=seeds(1), **off).images, one)


def test_no_guidance_runs_half_the_batch(pipeline):
    sizes = []
    hook = PARTS["prior"].register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    pipeline(["red dog", "snail"], generator=seeds(1, 2), **FAST)
    pipeline(["red dog", "snail"], generator=seeds(1, 2), prior_guidance_scale=1.0, **FAST)
    hook.remove()
    assert sizes == [4, 4, 2, 2]


def test_reference_images(pipeline):
    image = Image.fromarray(np.arange(48 * 40 * 3, dtype=np.uint8).reshape(48, 40, 3))
    plain = pipeline("red dog", generator=seeds(1), **FAST).images
    shown = pipeline("red dog", images=[image], generator=seeds(1), **FAST).images
    assert not torch.allclose(shown, plain)
    from stable_cascade.pipelines.prompts import embed_images

    embeds = embed_images([image], PARTS["image_encoder"], torch.device("cpu"), count=1)
    assert torch.equal(pipeline("red dog", image_embeds=embeds[0], generator=seeds(1), **FAST).images, shown)


def test_latents_replace_the_first_noise():
    prior = prior_pipeline()
    noise = torch.randn(1, 16, 6, 6, generator=seeds(3)[0])
    continued = seeds(3)[0]
    torch.randn(1, 16, 6, 6, generator=continued)
    given = prior("red dog", latents=noise, num_inference_steps=2, generator=continued).image_embeddings
    drawn = prior("red dog", num_inference_steps=2, generator=seeds(3)[0]).image_embeddings
    assert torch.equal(given, drawn)


def test_result_is_the_last_clean_prediction_in_float32():
    seen = []
    prior = prior_pipeline()
    output = prior("red dog", num_inference_steps=3, generator=seeds(0), callback_on_step_end_tensor_inputs=["clean"],
                   callback_on_step_end=lambda pipe, step, time, tensors: seen.append(tensors["clean"]))  # fmt: skip
    assert len(seen) == 3
    assert torch.equal(output.image_embeddings, seen[-1])
    assert seen[0].dtype == torch.float32


def test_callbacks_may_change_the_latents(pipeline):
    steps = []

    def zero(pipe, step, time, tensors):
        steps.append((step, float(time)))
        return {"latents": torch.zeros_like(tensors["latents"])}

    one = pipeline("red dog", generator=seeds(0), callback_on_step_end=zero, **FAST).images
    assert [step for step, _ in steps] == [0, 1]
    assert steps[0][1] == 1.0
    assert not torch.equal(one, pipeline("red dog", generator=seeds(0), **FAST).images)


def test_preview_skips_stage_b(pipeline):
    images = pipeline("red dog", preview=True, generator=seeds(0), **FAST).images
    assert images.shape == (1, 3, 48, 48)
    semantic = pipeline("red dog", preview=True, generator=seeds(0), **FAST | {"output_type": "latent"}).images
    assert torch.equal(images, PARTS["previewer"](semantic).clamp(0, 1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_keeps_state_and_times_in_float32(dtype):
    parts = tiny_parts()
    half = {name: part.to(dtype) if isinstance(part, torch.nn.Module) else part for name, part in parts.items()}
    pipeline = cascade(**half)
    types = []
    hook = half["prior"].register_forward_pre_hook(lambda module, args: types.append((args[0].dtype, args[1].dtype)))
    images = pipeline("red dog", generator=seeds(0), **FAST).images
    hook.remove()
    assert set(types) == {(torch.float32, torch.float32)}
    assert images.isfinite().all()
    exact = cascade()("red dog", generator=seeds(0), **FAST).images
    assert (images - exact).abs().mean() < 0.1


def test_reconstruction():
    pipeline = reconstruction_pipeline()
    photos = torch.rand(2, 3, 72, 64, generator=seeds(0)[0])
    assert pipeline.encode(photos).shape == (2, 16, 7, 6)
    images = pipeline(photos, num_inference_steps=2, generator=seeds(1, 2), output_type="pt").images
    assert images.shape == photos.shape
    pil = [Image.fromarray((photo.permute(1, 2, 0).numpy() * 255).round().astype(np.uint8)) for photo in photos]
    again = pipeline(pil, num_inference_steps=2, generator=seeds(1, 2), output_type="pt").images
    assert torch.allclose(again, images, atol=0.05)
    alone = pipeline(photos[1:], num_inference_steps=2, generator=seeds(2), output_type="pt").images
    assert torch.allclose(alone[0], images[1], atol=1e-4)
    assert pipeline(photos, preview=True, output_type="pt").images.shape == (2, 3, 56, 48)


def test_decoder_derives_the_size_from_the_latents():
    pipeline = decoder_pipeline()
    images = pipeline(torch.randn(1, 16, 6, 12, generator=seeds(0)[0]), num_inference_steps=1, output_type="pt").images
    assert images.shape == (1, 3, 64, 128)
    released = StableCascadeDecoderPipeline(**{name: PARTS[name] for name in DECODER_PARTS})
    from stable_cascade.pipelines.decoder import _side

    assert _side(24, 4 * released.config.latent_dim_scale) == 1024


def test_save_and_load(tmp_path, pipeline):
    pipeline.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["_class_name"] == "StableCascadePipeline"
    folders = {path.name for path in tmp_path.iterdir() if path.is_dir()}
    assert folders == set(PARTS)
    expected = pipeline("red dog", generator=seeds(0), **FAST).images

    again = quiet(StableCascadePipeline.from_pretrained(tmp_path))
    assert again.config.resolution_multiple == MULTIPLE
    assert again.prior_scheduler.config.shift == 2.0
    # Rounding may differ: loaded tensors are aligned in another way.
    assert torch.allclose(again("red dog", generator=seeds(0), **FAST).images, expected, atol=1e-3)
    half = StableCascadePipeline.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
    assert {half.prior.dtype, half.decoder.dtype, half.text_encoder.dtype} == {torch.bfloat16}

    prior = StableCascadePriorPipeline.from_pretrained(tmp_path)
    assert prior.scheduler.config.shift == 2.0
    assert StableCascadeDecoderPipeline.from_pretrained(tmp_path).scheduler.config.shift == 1.0
    rebuilt = StableCascadeReconstructionPipeline.from_pretrained(tmp_path)
    assert rebuilt.config.resolution_multiple == MULTIPLE
    without = StableCascadePipeline.from_pretrained(tmp_path, image_encoder=None)
    assert without.image_encoder is None
    with pytest.raises(ValueError, match="no argument 'variants'"):
        StableCascadePipeline.from_pretrained(tmp_path, variants="bf16")


def diffusers_networks() -> dict:
    """The same networks as diffusers' classes."""
    from diffusers.models import StableCascadeUNet
    from diffusers.pipelines.deprecated.wuerstchen.modeling_paella_vq_model import PaellaVQModel

    theirs = {}
    for name, cls in (("prior", StableCascadeUNet), ("decoder", StableCascadeUNet), ("vqgan", PaellaVQModel)):
        theirs[name] = cls.from_config({k: v for k, v in PARTS[name].config.items() if k[0] != "_"}).eval()
        theirs[name].load_state_dict(PARTS[name].state_dict())
    return theirs


def test_diffusers_images_with_diffusers_conventions():
    """Theirs: the network is told t, no shift, no rescaling, and the result is the state after the last step."""
    import diffusers

    theirs = diffusers_networks()
    shared = {"tokenizer": PARTS["tokenizer"], "text_encoder": PARTS["text_encoder"]}
    scheduler = diffusers.DDPMWuerstchenScheduler()
    prior = quiet(diffusers.StableCascadePriorPipeline(
        **shared, prior=theirs["prior"], scheduler=scheduler, resolution_multiple=MULTIPLE
    ))  # fmt: skip
    decoder = quiet(diffusers.StableCascadeDecoderPipeline(
        **shared, decoder=theirs["decoder"], scheduler=scheduler, vqgan=theirs["vqgan"], latent_dim_scale=MULTIPLE / 4
    ))  # fmt: skip
    prompts, negative = ["red dog", "a photo of snails"], ["snail", "a"]
    generator = seeds(5)[0]
    semantic = prior(prompts, height=64, width=64, num_inference_steps=4, guidance_scale=3.0,
                     negative_prompt=negative, generator=generator).image_embeddings  # fmt: skip
    expected = decoder(semantic, prompts, num_inference_steps=3, guidance_scale=1.5, negative_prompt=negative,
                       generator=generator, output_type="pt").images  # fmt: skip

    convention = StableCascadeScheduler(condition="timestep", last_noise=False)
    ours = cascade(prior_scheduler=convention, scheduler=convention)

    def last_state(pipe, step, time, tensors):
        return {"clean": tensors["latents"]}

    images = ours(
        prompts, negative_prompt=negative, prior_num_inference_steps=4, num_inference_steps=3, output_type="pt",
        prior_guidance_scale=3.0, decoder_guidance_scale=1.5, guidance_rescale=0.0, generator=seeds(5)[0],
        prior_callback_on_step_end=last_state, callback_on_step_end=last_state,
    ).images  # fmt: skip
    assert (images - expected).abs().max() <= 1e-4


def test_stabilitys_two_folders(tmp_path):
    """Their layout: Stage C alone in one folder, Stages B and A in the other, diffusers' classes in both indexes."""
    from diffusers import DDPMWuerstchenScheduler

    first, second = tmp_path / "stable-cascade", tmp_path / "stable-cascade-prior"
    shared = {"tokenizer": PARTS["tokenizer"], "text_encoder": PARTS["text_encoder"]}
    theirs = diffusers_networks()
    for folder, names in ((first, ("decoder", "vqgan")), (second, ("prior",))):
        parts = {name: theirs[name] for name in names} | shared | {"scheduler": DDPMWuerstchenScheduler()}
        for name, part in parts.items():
            part.save_pretrained(folder / name)
        index = {name: ["diffusers", type(part).__name__] for name, part in parts.items()}
        (folder / "model_index.json").write_text(json.dumps(index | {"resolution_multiple": MULTIPLE}))

    prior = StableCascadePriorPipeline.from_pretrained(second)
    assert isinstance(prior.scheduler, StableCascadeScheduler)
    assert prior.scheduler.config.shift == 2.0
    assert StableCascadeDecoderPipeline.from_pretrained(first).scheduler.config.shift == 1.0
    whole = quiet(StableCascadePipeline.from_pretrained(first))
    assert (whole.prior_scheduler.config.shift, whole.scheduler.config.shift) == (2.0, 1.0)
    expected = cascade()("red dog", generator=seeds(0), **FAST).images
    assert torch.allclose(whole("red dog", generator=seeds(0), **FAST).images, expected, atol=1e-3)


def trained_lora(folder):
    """A LoRA of prior and text encoder with a new and an existing token, none of it zero; the pipeline that has it."""
    parts = tiny_parts()
    add_learned_tokens(parts["tokenizer"], parts["text_encoder"], [["[fernando]", "^dog</w>"], ["^snail", None]])
    add_lora(parts["prior"], module_filters=[".attn"], rank=2)
    add_lora(parts["text_encoder"], module_filters=["q_proj"], rank=2)
    generator = seeds(7)[0]
    with torch.no_grad():
        for model in (parts["prior"], parts["text_encoder"]):
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    save_lora(folder, prior=parts["prior"], text_encoder=parts["text_encoder"])
    return cascade(**parts)


def fresh() -> StableCascadePipeline:
    return cascade(**tiny_parts())


def test_load_lora_weights_brings_lora_and_tokens_back(tmp_path):
    call = {"prompt": ["a photo of [fernando]", "snails"], **FAST}
    expected = trained_lora(tmp_path)(generator=seeds(1, 2), **call).images
    pipeline = fresh()
    before = pipeline(generator=seeds(1, 2), **call).images
    pipeline.load_lora_weights(tmp_path, adapter_name="mine")
    assert pipeline.get_active_adapters() == ["mine"]
    assert pipeline.get_list_adapters() == {"prior": ["mine"], "text_encoder": ["mine"]}
    assert torch.allclose(pipeline(generator=seeds(1, 2), **call).images, expected, atol=1e-5)
    pipeline.unload_lora_weights()
    assert pipeline.get_list_adapters() == {}
    assert "[fernando]" not in pipeline.tokenizer.get_vocab()
    assert torch.equal(pipeline(generator=seeds(1, 2), **call).images, before)


def test_lora_methods_of_diffusers(tmp_path):
    trained_lora(tmp_path)
    pipeline = fresh()

    def draw():
        return pipeline("red dog", generator=seeds(1), **FAST).images

    before = draw()
    weights = {name: value.clone() for name, value in pipeline.prior.state_dict().items()}
    pipeline.load_lora_weights(tmp_path / "pytorch_lora_weights.safetensors")
    assert pipeline.get_active_adapters() == ["default_0"]
    full = draw()
    pipeline.set_adapters("default_0", 0.0)
    assert torch.allclose(draw(), before, atol=1e-5)
    pipeline.set_adapters("default_0", 1.0)
    pipeline.disable_lora()
    assert torch.equal(draw(), before)
    pipeline.enable_lora()
    assert torch.equal(draw(), full)

    pipeline.fuse_lora(lora_scale=0.5)
    assert not torch.allclose(draw(), before)
    pipeline.unfuse_lora()
    for name, value in pipeline.prior.state_dict().items():
        if ".lora_" not in name:
            assert torch.equal(value, weights[name.replace(".base_layer", "")]), name
    assert torch.equal(draw(), full)

    pipeline.load_lora_weights(tmp_path, adapter_name="other", weight=0.5)
    assert set(pipeline.get_list_adapters()["prior"]) == {"default_0", "other"}
    pipeline.set_adapters(["default_0", "other"], [0.5, 0.5])
    assert torch.allclose(draw(), full, atol=1e-4)
    pipeline.delete_adapters("other")
    assert pipeline.get_list_adapters()["prior"] == ["default_0"]


def test_save_lora_weights_round_trip(tmp_path):
    trained_lora(tmp_path / "one")
    state_dict = StableCascadePipeline.lora_state_dict(tmp_path / "one")
    layers = {part: {key.removeprefix(f"{part}."): value for key, value in state_dict.items() if key.startswith(part)}
              for part in ("prior", "text_encoder")}  # fmt: skip
    StableCascadePipeline.save_lora_weights(tmp_path / "two", layers["prior"], layers["text_encoder"])
    again = StableCascadePipeline.lora_state_dict(tmp_path / "two")
    assert all(torch.equal(again[key], value) for key, value in state_dict.items())


def test_textual_inversion_alone(tmp_path):
    trained_lora(tmp_path)
    pipeline = fresh()
    pipeline.load_textual_inversion(tmp_path)
    assert "[fernando]" in pipeline.tokenizer.get_vocab()
    assert pipeline.get_list_adapters() == {}


def test_a_misfit_leaves_nothing_behind(tmp_path):
    trained_lora(tmp_path)
    pipeline = fresh()
    state_dict = StableCascadePipeline.lora_state_dict(tmp_path)
    key = next(key for key in state_dict if key.startswith("text_encoder"))
    state_dict[key.replace("q_proj", "z_proj")] = state_dict.pop(key)
    with pytest.raises(ValueError, match="lacks"):
        pipeline.load_lora_weights(state_dict)
    assert not any(pipeline.get_list_adapters().values())


def test_offloaded_networks_draw_the_same():
    """Weights leave for the meta device and come back layer by layer; `encode_conditions` must find them too."""
    from accelerate import cpu_offload

    expected = fresh()("red dog", generator=seeds(1), **FAST).images
    pipeline = fresh()
    for name in ("text_encoder", "prior", "decoder", "vqgan"):
        cpu_offload(getattr(pipeline, name), torch.device("cpu"))
    assert pipeline.prior.clf[1].weight.device.type == "meta"
    assert torch.allclose(pipeline("red dog", generator=seeds(1), **FAST).images, expected, atol=1e-4)


def test_offloaded_network_comes_in_before_its_conditions_are_encoded():
    from accelerate.hooks import ModelHook, add_hook_to_module

    class Arrival(ModelHook):
        arrived = False

        def pre_forward(self, module, *args, **kwargs):
            self.arrived = True
            return args, kwargs

    pipeline, hook, order = fresh(), Arrival(), []
    add_hook_to_module(pipeline.prior, hook)
    encode = pipeline.prior.encode_conditions
    pipeline.prior.encode_conditions = lambda *args: order.append(hook.arrived) or encode(*args)
    pipeline("red dog", generator=seeds(1), **FAST)
    assert order == [True]


@pytest.mark.parametrize("name", ["enable_model_cpu_offload", "enable_sequential_cpu_offload"])
def test_offloading_names_every_network(name):
    for build in (cascade, prior_pipeline, decoder_pipeline, reconstruction_pipeline):
        pipeline = build()
        assert callable(getattr(pipeline, name))
        networks = {key for key, part in pipeline.components.items() if isinstance(part, torch.nn.Module)}
        assert networks - {"semantic_encoder"} <= set(pipeline.model_cpu_offload_seq.split("->"))


REFUSALS = [
    ("prompt is an empty list", {"prompt": []}),
    ("prompt is int", {"prompt": 3}),
    ("prompt is missing", {"prompt": None}),
    ("height 65 is not a multiple of 8 from 64 up; nearest: 64", {"height": 65}),
    ("width 0 ", {"width": 0}),
    ("width -8 ", {"width": -8}),
    ("generator is a list of 2 for 1 images", {"generator": seeds(1, 2)}),
    ("prior_guidance_scale nan", {"prior_guidance_scale": math.nan}),
    ("decoder_guidance_scale inf", {"decoder_guidance_scale": math.inf}),
    ("guidance_rescale 2", {"guidance_rescale": 2}),
    ("prior_num_inference_steps 0", {"prior_num_inference_steps": 0}),
    ("num_images_per_prompt 0", {"num_images_per_prompt": 0}),
    ("output_type 'jpg' is not one of pil", {"output_type": "jpg"}),
    ("negative_prompt has 2 entries for 1 prompts", {"negative_prompt": ["a", "b"]}),
    ("prompt and prompt_embeds are both given", {"prompt_embeds": torch.zeros(1, 12, 32)}),
    ("go together", {"prompt": None, "prompt_embeds": torch.zeros(1, 12, 32)}),
    ("latents have shape", {"latents": torch.zeros(1, 16, 5, 5)}),
    ("callback_on_step_end_tensor_inputs 'x'", {"callback_on_step_end_tensor_inputs": ["x"]}),
    ("images and image_embeds are both given", {"images": [1], "image_embeds": torch.zeros(1, 24)}),
    ("images holds str", {"images": ["cat.png"]}),
]


@pytest.mark.parametrize("message, call", REFUSALS)
def test_refusals_are_one_line(pipeline, message, call):
    with pytest.raises(ValueError, match=message) as caught:
        pipeline(**{"prompt": "red dog"} | FAST | call)
    assert "\n" not in str(caught.value)


def test_missing_parts_are_named(tmp_path):
    with pytest.raises(ValueError, match="no folder and no Hub name"):
        StableCascadePipeline.from_pretrained(tmp_path / "nothing")
    with pytest.raises(ValueError, match="needs 'decoder'"):
        StableCascadeDecoderPipeline.from_pretrained(tmp_path)
    bare = cascade(previewer=None, image_encoder=None)
    with pytest.raises(ValueError, match="preview needs a previewer"):
        bare("red dog", preview=True)
    with pytest.raises(ValueError, match="images need an image_encoder"):
        bare("red dog", images=torch.rand(3, 64, 64), **FAST)
    with pytest.raises(ValueError, match="different sizes"):
        reconstruction_pipeline()([torch.rand(3, 64, 64), torch.rand(3, 72, 64)])
    with pytest.raises(ValueError, match="image_embeddings are"):
        decoder_pipeline()(torch.zeros(16, 6, 6))
    with pytest.raises(ValueError, match="prompt has 2 entries for 3 images"):
        decoder_pipeline()(torch.zeros(3, 16, 6, 6), ["a", "b"])
