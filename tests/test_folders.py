"""Pipelines from Stability's two repositories as they are laid out, from single files, and from code for diffusers."""

import logging
import runpy

import pytest
import torch
from safetensors.torch import save_file

from stable_cascade import (
    StableCascadeCombinedPipeline,
    StableCascadeDecoder,
    StableCascadeDecoderPipeline,
    StableCascadePipeline,
    StableCascadePrior,
    StableCascadePriorPipeline,
    StableCascadeReconstructionPipeline,
    StableCascadeSemanticEncoder,
    StableCascadeUNet,
)
from stable_cascade.embedded import embedded_path
from stable_cascade.files.clip import to_openclip
from stable_cascade.files.weight_names import merge_checkpoint
from stable_cascade.pipelines.layout import _weights
from tests.released_layout import file_bytes, released_folders, without
from tests.tiny_cascade import DECODER, MULTIPLE, PRIOR, VQGAN
from tests.tiny_pipelines import quiet

FAST = {"height": 64, "width": 64, "prior_num_inference_steps": 1, "num_inference_steps": 1, "output_type": "pt"}


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    return released_folders(tmp_path_factory.mktemp("released"))


def image(pipeline):
    return quiet(pipeline)("red dog", generator=torch.Generator().manual_seed(0), **FAST).images


def blocks(network):
    return list(network.config.down_num_layers_per_block)


def refused(message, build, *arguments, **keywords):
    with pytest.raises(ValueError, match=message) as caught:
        build(*arguments, **keywords)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 700


def test_released_folders_with_all_that_lies_beside_them(released):
    first, _, parts = released
    whole = StableCascadePipeline.from_pretrained(first)
    assert whole.controlnet is None
    assert isinstance(whole.semantic_encoder, StableCascadeSemanticEncoder)
    assert whole.previewer is not None
    assert whole.image_encoder is not None
    assert (whole.prior_scheduler.config.shift, whole.scheduler.config.shift) == (2.0, 1.0)
    assert whole.config.resolution_multiple == MULTIPLE
    for name in ("prior", "decoder", "vqgan", "text_encoder", "semantic_encoder", "previewer", "image_encoder"):
        theirs, ours = parts[name].state_dict(), getattr(whole, name).state_dict()
        assert theirs.keys() == ours.keys()
        assert all(torch.equal(theirs[key], ours[key]) for key in theirs)
    assert StableCascadeReconstructionPipeline.from_pretrained(first).semantic_encoder is not None


def test_variant(released, caplog):
    first, second, _ = released
    with caplog.at_level(logging.WARNING):
        whole = StableCascadePipeline.from_pretrained(first, variant="bf16")
    said = [record.message for record in caplog.records if "variant" in record.message]
    assert sorted(text.split()[0] for text in said) == ["image_encoder", "vqgan"]
    for name, rounded in (("prior", True), ("decoder", True), ("text_encoder", True), ("vqgan", False)):
        ours, theirs = getattr(whole, name).state_dict(), released[2][name].state_dict()
        # Without torch_dtype diffusers' models are float32, whatever their files are.
        assert all(torch.equal(ours[key], theirs[key].bfloat16().float() if rounded else theirs[key]) for key in ours)
    typed = {"prior": torch.bfloat16, "default": torch.float16}
    mixed = StableCascadePipeline.from_pretrained(first, variant="bf16", torch_dtype=typed)
    assert (mixed.prior.dtype, mixed.vqgan.dtype) == (torch.bfloat16, torch.float16)
    message = "no component in .* has weights of the variant 'fp8'; it has bf16"
    refused(message, StableCascadePriorPipeline.from_pretrained, second, variant="fp8")


@pytest.mark.parametrize(
    ("lite", "expected"),
    [
        (False, ([1, 1], [1, 1])),
        (True, ([1, 2], [2, 1])),
        (("prior",), ([1, 2], [1, 1])),
        ("decoder", ([1, 1], [2, 1])),
    ],
)
def test_lite(released, lite, expected):
    whole = StableCascadePipeline.from_pretrained(released[0], lite=lite, variant="bf16", semantic_encoder=None)
    assert (blocks(whole.prior), blocks(whole.decoder)) == expected


def test_lite_of_one_stage(released):
    first, second, _ = released
    assert blocks(StableCascadePriorPipeline.from_pretrained(second, lite=True).prior) == [1, 2]
    assert blocks(StableCascadeDecoderPipeline.from_pretrained(first, lite=True).decoder) == [2, 1]
    refused("lite names 'vqgan'; only prior and decoder", StableCascadePipeline.from_pretrained, first, lite=["vqgan"])
    bare = without(second, "prior_lite")
    refused(r"needs 'prior' \('prior_lite'\)", StableCascadePriorPipeline.from_pretrained, bare, lite=True)


def test_only_what_is_needed_is_downloaded(released, hub):
    for name, folder in zip(("stable-cascade", "stable-cascade-prior"), released[:2], strict=True):
        hub.files[f"stabilityai/{name}"] = file_bytes(folder)
    prior = StableCascadePriorPipeline.from_pretrained("stabilityai/stable-cascade-prior", variant="bf16", lite=True)
    assert blocks(prior.prior) == [1, 2]
    got = {path.split("/resolve/")[1].partition("/")[2] for path in hub.asked if "/resolve/" in path and "GET" in path}
    assert {path for path in got if path.endswith(".safetensors")} == {
        "prior_lite/diffusion_pytorch_model.bf16.safetensors",
        "text_encoder/model.bf16.safetensors",
        "image_encoder/model.safetensors",
    }
    whole = StableCascadePipeline.from_pretrained("stabilityai/stable-cascade")
    assert (whole.semantic_encoder is not None, whole.controlnet) == (True, None)
    assert not any("controlnet/" in path or "bf16" in path for path in hub.asked[-40:] if "stable-cascade/res" in path)
    hub.broken = "someone"
    refused(
        "'someone/nothing' is no file or folder here and could not be loaded from the Hub",
        StableCascadePipeline.from_pretrained,
        "someone/nothing",
    )


def test_weights_files_of_a_part():
    listed = [
        "prior/config.json", "prior/diffusion_pytorch_model.safetensors", "prior/diffusion_pytorch_model.bin",
        "vqgan/diffusion_pytorch_model.safetensors", "prior/diffusion_pytorch_model.bf16.safetensors",
        "prior_lite/diffusion_pytorch_model.bf16.safetensors",
    ]  # fmt: skip
    assert _weights("prior", "bf16", listed) == ["prior/diffusion_pytorch_model.bf16.safetensors"]
    assert _weights("prior", None, listed) == ["prior/diffusion_pytorch_model.safetensors"]
    assert _weights("vqgan", "bf16", listed) == ["vqgan/diffusion_pytorch_model.safetensors"]
    parts = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors", "model.safetensors.index.json"]
    assert _weights("x", None, [f"x/{name}" for name in parts]) == [f"x/{name}" for name in parts]


CONFIGS = {"prior": PRIOR, "decoder": DECODER, "vqgan": VQGAN}


@pytest.fixture(scope="module")
def files(released, tmp_path_factory):
    """The tiny cascade as ComfyUI's two checkpoints, and as the original's files."""
    folder, parts = tmp_path_factory.mktemp("files"), released[2]
    state = {
        name: part.state_dict() for name, part in parts.items() if name != "tokenizer" and hasattr(part, "state_dict")
    }
    c = {"prior": "prior", "text_encoder": "text_encoder", "semantic_encoder": "semantic_encoder",
         "previewer": "previewer", "image_encoder": "image_encoder"}  # fmt: skip
    save_file(merge_checkpoint({name: state[part] for name, part in c.items()}), folder / "comfy_c.safetensors")
    b = merge_checkpoint({name: state[name] for name in ("decoder", "text_encoder", "vqgan")})
    save_file(b, folder / "comfy_b.safetensors")
    for name in ("prior", "decoder", "vqgan"):
        save_file(parts[name].to_original(), folder / f"{name}.safetensors")
    save_file(to_openclip(state["text_encoder"], "text_encoder"), folder / "openclip.safetensors")
    torch.save(parts["vqgan"].to_original(), folder / "stage_a.pt")
    return folder


@pytest.fixture(scope="module")
def configs(released):
    parts = released[2]
    sizes = {name: dict(parts[name].config) for name in ("semantic_encoder", "previewer")}
    clip = {name: parts[name].config.to_dict() for name in ("text_encoder", "image_encoder")}
    return CONFIGS | sizes | clip


def test_comfyui_checkpoints_become_a_pipeline(released, files, configs):
    expected = image(StableCascadePipeline.from_pretrained(released[0]))
    whole = StableCascadePipeline.from_single_file(
        files / "comfy_c.safetensors", files / "comfy_b.safetensors", tokenizer=released[2]["tokenizer"],
        config=configs, resolution_multiple=MULTIPLE,
    )  # fmt: skip
    missing = [name for name, part in whole.components.items() if part is None]
    assert missing == ["feature_extractor", "controlnet"]
    # Rounding may differ: tensors lie at other places in memory.
    assert torch.allclose(image(whole), expected, atol=1e-3)


def test_original_files_become_a_pipeline(released, files, configs):
    expected = image(StableCascadePipeline.from_pretrained(released[0]))
    with pytest.warns(UserWarning, match=r"stage_a\.pt is a pickle file"):
        whole = StableCascadePipeline.from_single_file(
            stage_b=files / "decoder.safetensors", stage_c=files / "prior.safetensors", vqgan=files / "stage_a.pt",
            text_encoder=files / "openclip.safetensors", tokenizer=released[1] / "tokenizer", config=configs,
            resolution_multiple=MULTIPLE,
        )  # fmt: skip
    # Rounding may differ: tensors lie at other places in memory.
    assert torch.allclose(image(whole), expected, atol=1e-3)
    by_folder = StableCascadePipeline.from_single_file(
        files / "comfy_b.safetensors", stage_c=files / "prior.safetensors", tokenizer=released[1],
        text_encoder=released[0], torch_dtype=torch.bfloat16, config=configs,
    )  # fmt: skip
    assert {by_folder.prior.dtype, by_folder.vqgan.dtype, by_folder.text_encoder.dtype} == {torch.bfloat16}


def test_single_stage_pipelines_of_files(released, files, configs):
    tokenizer = released[2]["tokenizer"]
    prior = StableCascadePriorPipeline.from_single_file(
        files / "comfy_c.safetensors", tokenizer=tokenizer, config=configs
    )
    assert prior.scheduler.config.shift == 2.0
    decoder = StableCascadeDecoderPipeline.from_single_file(
        files / "comfy_b.safetensors", tokenizer=tokenizer, config=configs
    )
    assert decoder.scheduler.config.shift == 1.0
    assert isinstance(decoder.decoder, StableCascadeDecoder)


def test_a_pipeline_folder_gives_configs_and_tokenizer(released, files, tmp_path):
    StableCascadePipeline.from_pretrained(released[0]).save_pretrained(tmp_path)
    whole = StableCascadePipeline.from_single_file(
        files / "comfy_c.safetensors", files / "comfy_b.safetensors", config=tmp_path
    )
    assert whole.config.resolution_multiple == MULTIPLE
    assert whole.tokenizer.model_max_length == 12


def test_embedded_files_need_nothing_else(tmp_path):
    from stable_cascade.files.conversion import convert_networks

    for stage in ("prior", "decoder"):
        convert_networks(embedded_path(), tmp_path / f"{stage}.safetensors", "comfyui", component=stage)
    whole = StableCascadePipeline.from_single_file(tmp_path / "prior.safetensors", tmp_path / "decoder.safetensors")
    assert whole.config.resolution_multiple == pytest.approx(32 / 3)
    assert len(whole.tokenizer) == whole.text_encoder.config.vocab_size


def test_wrong_files_are_named(released, files, configs, tmp_path):
    load, known = StableCascadePipeline.from_single_file, {"config": configs}
    both = (files / "prior.safetensors", files / "decoder.safetensors")
    refused(
        r"needs .*text_encoder, tokenizer, vqgan, which .* pass .*vqgan='stage_a.safetensors'", load, *both, **known
    )
    refused(r"stage_c='.*decoder.safetensors' is the decoder \(Stage B\).* and a prior is needed", load,
            stage_c=both[1], **known)  # fmt: skip
    save_file(
        {"weights.0.lora_down": torch.ones(2, 16), "weights.0.lora_up": torch.ones(16, 2)}, tmp_path / "l.safetensors"
    )
    message = "'.*l.safetensors' is a LoRA in original format.* needs nothing; give it to load_lora_weights"
    refused(message, load, tmp_path / "l.safetensors")
    save_file({"input_blocks.0.0.weight": torch.ones(1)}, tmp_path / "sdxl.safetensors")
    refused("is a Stable Diffusion or SDXL checkpoint; known are", load, tmp_path / "sdxl.safetensors")
    refused("StableCascadePriorPipeline needs nothing", StableCascadePriorPipeline.from_single_file,
            files / "vqgan.safetensors")  # fmt: skip
    refused("has no argument 'vae'; nearest:", load, *both, vae=1)
    refused("tokenizer='nowhere' is no file, no folder and no Hub name", load, files / "comfy_c.safetensors",
            files / "comfy_b.safetensors", tokenizer="nowhere", **known)  # fmt: skip
    big = embedded_path() / "tokenizer"
    refused("the tokenizer has 2048 tokens, the text encoder 69 rows", load, files / "comfy_c.safetensors",
            files / "comfy_b.safetensors", tokenizer=big, **known)  # fmt: skip
    refused("is no folder of a pipeline", load, files / "comfy_c.safetensors", config=tmp_path)


def test_networks_of_wrong_files_are_named(files, tmp_path):
    for source, said in (
        (files / "decoder.safetensors", r"this is the decoder \(Stage B\).*, not the prior \(Stage C\)"),
        (
            files / "comfy_b.safetensors",
            r"this is a ComfyUI checkpoint of decoder, vqgan, text_encoder, not the prior",
        ),
    ):
        refused(said, StableCascadePrior.from_single_file, source, config=PRIOR)
    save_file({"lora_unet_clf_1.lora_down.weight": torch.ones(2, 16)}, tmp_path / "lora.safetensors")
    refused("not the decoder .*; give it to load_lora_weights", StableCascadeDecoder.from_single_file,
            tmp_path / "lora.safetensors")  # fmt: skip
    assert StableCascadePrior.from_single_file(files / "comfy_c.safetensors", config=PRIOR)
    refused(
        "is no file on huggingface.co", StableCascadePrior.from_single_file, "https://example.org/stage_c.safetensors"
    )
    refused(
        "is no file on huggingface.co", StableCascadePipeline.from_single_file, "https://example.org/c.safetensors"
    )
    refused("could not be loaded from the Hub", StableCascadePrior.from_single_file,
            "https://huggingface.co/stabilityai/stable-cascade/blob/main/none.safetensors")  # fmt: skip


TWO_STAGES = """
import torch
from diffusers import StableCascadeDecoderPipeline, StableCascadePriorPipeline

prompt = "an image of a shiba inu, donning a spacesuit and helmet"
negative_prompt = ""

prior = StableCascadePriorPipeline.from_pretrained(
    "stabilityai/stable-cascade-prior", variant="bf16", torch_dtype=torch.bfloat16
)
decoder = StableCascadeDecoderPipeline.from_pretrained(
    "stabilityai/stable-cascade", variant="bf16", torch_dtype=torch.float16
)

prior_output = prior(
    prompt=prompt,
    height=128,
    width=192,
    negative_prompt=negative_prompt,
    guidance_scale=4.0,
    num_images_per_prompt=1,
    num_inference_steps=2,
)
decoder_output = decoder(
    image_embeddings=prior_output.image_embeddings.to(torch.float16),
    prompt=prompt,
    negative_prompt=negative_prompt,
    guidance_scale=0.0,
    output_type="pil",
    num_inference_steps=2,
).images[0]
decoder_output.save("cascade.png")
"""
COMBINED = """
import torch
from diffusers import StableCascadeCombinedPipeline

pipe = StableCascadeCombinedPipeline.from_pretrained(
    "stabilityai/stable-cascade", variant="bf16", torch_dtype=torch.bfloat16
)
prompt = "an image of a shiba inu, donning a spacesuit and helmet"

def seen(pipe, step, timestep, callback_kwargs):
    steps.append((step, sorted(callback_kwargs)))
    return callback_kwargs

steps = []
pipe(
    prompt=prompt,
    negative_prompt="",
    num_inference_steps=2,
    prior_num_inference_steps=3,
    prior_guidance_scale=3.0,
    width=128,
    height=128,
    generator=torch.Generator().manual_seed(1),
    prior_callback_on_step_end=seen,
    prior_callback_on_step_end_tensor_inputs=["latents"],
).images[0].save("cascade.png")
assert steps == [(0, ["latents"]), (1, ["latents"]), (2, ["latents"])]
"""
LITE = """
import torch
from diffusers import StableCascadeDecoderPipeline, StableCascadePriorPipeline, StableCascadeUNet

prior_unet = StableCascadeUNet.from_pretrained("stabilityai/stable-cascade-prior", subfolder="prior_lite")
decoder_unet = StableCascadeUNet.from_pretrained(
    "stabilityai/stable-cascade", subfolder="decoder_lite", torch_dtype=torch.float32
)

prior = StableCascadePriorPipeline.from_pretrained("stabilityai/stable-cascade-prior", prior=prior_unet)
decoder = StableCascadeDecoderPipeline.from_pretrained("stabilityai/stable-cascade", decoder=decoder_unet)
prior_output = prior(prompt="red dog", height=128, width=128, num_inference_steps=1)
images = decoder(image_embeddings=prior_output.image_embeddings, prompt="red dog", num_inference_steps=1).images
images[0].save("cascade.png")
"""
SINGLE_FILES = """
import torch
from diffusers import StableCascadeDecoderPipeline, StableCascadePriorPipeline, StableCascadeUNet

prior_unet = StableCascadeUNet.from_single_file(
    "stabilityai/stage_c.safetensors",
    config="stabilityai/stable-cascade-prior",
    subfolder="prior",
    dtype=torch.bfloat16,
)
decoder_unet = StableCascadeUNet.from_single_file(
    "stabilityai/stage_b.safetensors", config="stabilityai/stable-cascade", subfolder="decoder", dtype=torch.bfloat16
)

prior = StableCascadePriorPipeline.from_pretrained(
    "stabilityai/stable-cascade-prior", prior=prior_unet, dtype=torch.bfloat16
)
decoder = StableCascadeDecoderPipeline.from_pretrained(
    "stabilityai/stable-cascade", decoder=decoder_unet, dtype=torch.bfloat16
)
assert {prior.prior.dtype, prior.text_encoder.dtype, decoder.decoder.dtype} == {torch.bfloat16}
prior_output = prior(prompt="red dog", height=128, width=128, negative_prompt="", num_inference_steps=1)
decoder(
    image_embeddings=prior_output.image_embeddings, prompt="red dog", negative_prompt="", num_inference_steps=1
).images[0].save("cascade.png")
"""


@pytest.mark.parametrize(
    "snippet",
    [TWO_STAGES, TWO_STAGES.replace("torch_dtype", "dtype"), COMBINED, LITE, SINGLE_FILES],
    ids=["two stages", "newer name of the type", "combined", "lite", "single files"],
)
def test_code_for_diffusers_changes_its_import_line_only(snippet, released, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    changed = [
        f"{line}\n".replace("from diffusers import", "from stable_cascade import") for line in snippet.split("\n")
    ]
    moved = "".join(changed).replace("stabilityai/", f"{released[0].parent}/")
    if snippet == SINGLE_FILES:
        for name, stage in (("prior", "stage_c"), ("decoder", "stage_b")):
            save_file(released[2][name].to_original(), tmp_path / f"{stage}.safetensors")
        moved = moved.replace(f"{released[0].parent}/stage_", f"{tmp_path}/stage_")
    (tmp_path / "script.py").write_text(moved)
    runpy.run_path(str(tmp_path / "script.py"))
    assert (tmp_path / "cascade.png").stat().st_size > 500


def test_networks_of_diffusers_become_ours(released):
    import diffusers

    theirs = diffusers.StableCascadeUNet.from_pretrained(released[1], subfolder="prior")
    pipeline = StableCascadePriorPipeline.from_pretrained(released[1], prior=theirs, low_cpu_mem_usage=True)
    assert isinstance(pipeline.prior, StableCascadePrior)
    assert pipeline.prior.clf[1].weight.data_ptr() == theirs.clf[1].weight.data_ptr()
    assert StableCascadeCombinedPipeline is StableCascadePipeline


def test_one_name_for_both_networks(released, files):
    assert isinstance(StableCascadeUNet.from_pretrained(released[0], subfolder="decoder"), StableCascadeDecoder)
    assert isinstance(StableCascadeUNet.from_pretrained(released[1] / "prior"), StableCascadePrior)
    assert isinstance(StableCascadeUNet(**PRIOR), StableCascadePrior)
    assert isinstance(StableCascadeUNet.from_config(DECODER), StableCascadeDecoder)
    loaded = StableCascadeUNet.from_single_file(
        files / "comfy_b.safetensors", config=DECODER, torch_dtype=torch.bfloat16
    )
    assert (type(loaded), loaded.dtype) == (StableCascadeDecoder, torch.bfloat16)
    refused("not the prior", StableCascadeUNet.from_single_file, files / "vqgan.safetensors")
