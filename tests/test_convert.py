"""Networks, LoRA files and learned tokens from one tool's format into another's, bit for bit and back."""

import json
import os

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from stable_cascade import StableCascadeControlNet, StableCascadePrior
from stable_cascade.adapters import add_lora, save_lora
from stable_cascade.cli.main import main
from stable_cascade.components import NETWORKS as PARTS_OF
from stable_cascade.embedded import embedded_path
from stable_cascade.files import describe, from_original, merge_checkpoint, split_checkpoint, to_original
from stable_cascade.files.clip import from_any, to_openclip
from stable_cascade.files.controlnet import read_description, save_controlnet
from stable_cascade.files.conversion import convert_networks
from stable_cascade.files.json_files import KEY, write_configs
from stable_cascade.files.loading import clip_on_meta, on_meta
from stable_cascade.files.presets import CLIP_CONFIGS
from stable_cascade.files.tensor_files import whole
from stable_cascade.files.weight_names import NETWORK, STAGES, to_ours
from stable_cascade.models import PRESETS
from stable_cascade.pipelines import StableCascadePipeline
from tests.tiny_cascade import ENCODER, PRIOR, tiny_parts

PARTS = tiny_parts()
NETWORKS = {
    "prior": "prior", "decoder": "decoder", "vqgan": "vqgan", "semantic_encoder": "semantic_encoder",
    "previewer": "previewer",
}  # fmt: skip
CLIP = {"text_encoder": "text_encoder", "image_encoder": "image_encoder"}


def state(component):
    return PARTS[(NETWORKS | CLIP)[component]].state_dict()


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) and a[key].dtype == b[key].dtype for key in a)


def shapes(weights):
    return {name: value.shape for name, value in weights.items()}


def metadata(path):
    with safe_open(path, "pt") as file:
        return file.metadata()


def refused(message, *arguments, **keywords):
    with pytest.raises(ValueError, match=message) as caught:
        convert_networks(*arguments, **keywords)
    assert "\n" not in str(caught.value)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The whole tiny cascade in diffusers' layout."""
    place = tmp_path_factory.mktemp("cascade")
    StableCascadePipeline(**PARTS).save_pretrained(place)
    return place


@pytest.mark.parametrize("component", NETWORKS)
def test_original_to_diffusers_to_original(component, folder, tmp_path):
    first, second, back = tmp_path / "a.safetensors", tmp_path / "b", tmp_path / "c.safetensors"
    report = convert_networks(folder / NETWORKS[component], first, "original")
    assert (report.components, report.bitwise, report.left) == ((component,), True, ())
    assert same(load_file(first), to_original(state(component), component))
    convert_networks(first, second, "diffusers")
    assert same(load_file(second / "diffusion_pytorch_model.safetensors"), state(component))
    convert_networks(second, back, "original")
    assert same(load_file(first), load_file(back))
    assert metadata(first) == metadata(back)
    again = type(PARTS[NETWORKS[component]]).from_pretrained(second)
    mine = {key: value for key, value in PARTS[NETWORKS[component]].config.items() if not key.startswith("_")}
    assert json.dumps({key: again.config[key] for key in mine}) == json.dumps(mine)


@pytest.mark.parametrize("component", NETWORKS)
def test_comfyui_and_back(component, folder, tmp_path):
    original, comfy, back = (tmp_path / f"{name}.safetensors" for name in "abc")
    convert_networks(folder / NETWORKS[component], original, "original")
    convert_networks(original, comfy, "comfyui")
    prefix = NETWORK if component in STAGES else ""
    assert same(load_file(comfy), {prefix + name: value for name, value in load_file(original).items()})
    convert_networks(comfy, back, "original")
    assert same(load_file(original), load_file(back))
    assert metadata(original) == metadata(comfy) == metadata(back)


@pytest.mark.parametrize("component", CLIP)
def test_clip_in_three_formats(component, folder, tmp_path):
    open_file, comfy, back = tmp_path / "open.safetensors", tmp_path / "comfy.safetensors", tmp_path / "back"
    convert_networks(folder / CLIP[component], open_file, "openclip")
    assert describe(open_file).format == "openclip"
    convert_networks(open_file, comfy, "comfyui")
    assert same(load_file(comfy), state(component))
    convert_networks(comfy, back, "diffusers")
    assert same(load_file(back / "model.safetensors"), state(component))
    again = type(PARTS[CLIP[component]]).from_pretrained(back)
    assert again.config.hidden_act == PARTS[CLIP[component]].config.hidden_act
    assert again.config.num_attention_heads == PARTS[CLIP[component]].config.num_attention_heads


def test_openclip_by_its_rules():
    """Values against the layout's definition: q, k, v in one matrix, a projection that multiplies from the right."""
    ours = state("text_encoder")
    theirs = to_openclip(ours, "text_encoder")
    layer = "text_model.encoder.layers.1.self_attn."
    joined = torch.cat([ours[f"{layer}{part}_proj.bias"] for part in "qkv"])
    assert torch.equal(theirs["transformer.resblocks.1.attn.in_proj_bias"], joined)
    hidden = torch.randn(3, 32)
    assert torch.allclose(hidden @ theirs["text_projection"], hidden @ ours["text_projection.weight"].t(), atol=1e-6)
    assert torch.equal(theirs["positional_embedding"], ours["text_model.embeddings.position_embedding.weight"])
    assert "visual.proj" in to_openclip(state("image_encoder"), "image_encoder")
    weights, constants = from_any(theirs | {"logit_scale": torch.ones(())}, "text_encoder")
    assert same(weights, ours)
    assert list(constants) == ["logit_scale"]
    with pytest.raises(ValueError, match=r"v_proj\.bias is missing: OpenCLIP keeps it"):
        to_openclip(
            {key: value for key, value in ours.items() if "1.self_attn.v_proj.bias" not in key}, "text_encoder"
        )


def test_merged_checkpoints_of_both_stages(folder, tmp_path):
    for stage in STAGES:
        file, out = tmp_path / f"{stage}.safetensors", tmp_path / stage
        report = convert_networks(folder, file, "comfyui", component=stage)
        assert report.components == STAGES[stage]
        tensors = load_file(file)
        assert all(name.startswith((NETWORK, "vae.", "text_encoder.clip_g.", "clip_l_vision.")) for name in tensors)
        projection = state("text_encoder")["text_projection.weight"]
        assert torch.equal(tensors["text_encoder.clip_g.text_projection"], projection.t())
        convert_networks(file, out, "diffusers")
        for component in STAGES[stage]:
            written = next((out / (NETWORKS | CLIP)[component]).glob("*.safetensors"))
            assert same(load_file(written), state(component))
        again = tmp_path / f"{stage}2.safetensors"
        convert_networks(out, again, "comfyui")
        assert same(load_file(again), tensors)
    assert "vae.encoder.mean" in load_file(tmp_path / "prior.safetensors")  # ComfyUI keeps these beside the weights
    assert "vae.vquantizer.codebook.weight" in load_file(tmp_path / "decoder.safetensors")


def test_checkpoints_as_comfyui_saves_them(tmp_path):
    """Its own saves: attention split, the projection as a layer, the VAE's parts under their own names."""
    merged = {}
    for name, value in state("prior").items():
        name = name.replace(".attention.to_out.0.", ".attention.attn.out_proj.")
        merged[NETWORK + name.replace(".attention.to_", ".attention.attn.to_")] = value
    merged |= {f"text_encoder.clip_g.transformer.{name}": value for name, value in state("text_encoder").items()}
    merged |= {"text_encoder.clip_g.logit_scale": torch.tensor(4.6)}
    merged |= {f"vae.encoder.{name}": value for name, value in state("semantic_encoder").items()}
    merged |= {"vae.encoder.mean": torch.tensor([0.485, 0.456, 0.406]).half()}
    header = write_configs({"text_encoder": PARTS["text_encoder"].config.to_dict()})
    save_file(merged, tmp_path / "c.safetensors", {"prompt": "{}"} | header)
    report = convert_networks(tmp_path / "c.safetensors", tmp_path / "out", "original")
    assert same(load_file(tmp_path / "out" / "stage_c.safetensors"), to_original(state("prior"), "prior"))
    assert same(load_file(tmp_path / "out" / "effnet_encoder.safetensors"), state("semantic_encoder"))
    assert set(report.left) == {"semantic_encoder mean", "text_encoder logit_scale"}
    assert "not carried over: semantic_encoder mean, text_encoder logit_scale" in str(report)
    assert metadata(tmp_path / "out" / "stage_c.safetensors")["prompt"] == "{}"
    vae = {name.removeprefix("vae."): value for name, value in merged.items() if name.startswith("vae.")}
    assert list(split_checkpoint(vae).parts) == ["semantic_encoder"]
    with pytest.raises(ValueError, match="the image encoder's pixel mean is"):
        to_ours(state("semantic_encoder") | {"mean": torch.zeros(3)}, "semantic_encoder")


@pytest.mark.parametrize(
    ("component", "size"), [("prior", "3.6B"), ("prior", "1B"), ("decoder", "3B"), ("decoder", "700M")]
)
def test_key_lists_of_the_released_sizes(component, size):
    """Names and shapes of whole checkpoints as large as the released ones, without their values."""

    sizes = {component: size}
    parts = {
        name: on_meta(PARTS_OF[name].load_class(), PRESETS[name][sizes.get(name, "released")]).state_dict()
        for name in STAGES[component]
        if name in PARTS_OF
    }
    clip = [name for name in CLIP_CONFIGS if name in STAGES[component]]
    parts |= {name: clip_on_meta(name, next(iter(CLIP_CONFIGS[name].values()))).state_dict() for name in clip}
    back = {
        name: to_ours(part, name).weights for name, part in split_checkpoint(merge_checkpoint(parts)).parts.items()
    }
    assert back.keys() == parts.keys()
    for name, weights in parts.items():
        assert shapes(back[name]) == shapes(weights)
        if name in PARTS_OF:
            original = to_original(weights, name)
            assert shapes(to_original(from_original(original, name), name)) == shapes(original)


def test_a_whole_folder_in_another_type_keeps_the_rest(folder, tmp_path):
    report = convert_networks(folder, tmp_path / "half", "diffusers", dtype="bfloat16")
    assert not report.bitwise
    assert report.rounded == sum(
        value.is_floating_point() for name in NETWORKS | CLIP for value in state(name).values()
    )
    assert "tensors rounded" in str(report)
    assert {path.name for path in (tmp_path / "half").iterdir()} == {path.name for path in folder.iterdir()}
    loaded = StableCascadePipeline.from_pretrained(tmp_path / "half")
    assert loaded.config.resolution_multiple == 42.67
    assert torch.equal(loaded.prior.clf[1].weight, state("prior")["clf.1.weight"].bfloat16().float())
    wide = convert_networks(tmp_path / "half" / "prior", tmp_path / "wide.safetensors", "original", dtype="float32")
    assert wide.bitwise
    counted = load_file(tmp_path / "half" / "semantic_encoder" / "diffusion_pytorch_model.safetensors")
    assert counted["backbone.0.1.num_batches_tracked"].dtype == torch.int64


def test_values_that_a_type_cannot_hold(tmp_path):
    save_file({name: value * 1e6 for name, value in state("prior").items()}, tmp_path / "big.safetensors")
    refused("has values beyond float16's 65504; use --dtype bfloat16", tmp_path / "big.safetensors",
            tmp_path / "out.safetensors", "original", dtype="float16", config=None)  # fmt: skip
    assert os.listdir(tmp_path) == ["big.safetensors"]


def test_configs_of_own_sizes_travel_in_the_header(folder, tmp_path):
    file = tmp_path / "prior.safetensors"
    convert_networks(folder / "prior", file, "original")
    assert json.loads(metadata(file)[KEY])["prior"]["block_out_channels"] == [16, 16]
    assert same(StableCascadePrior.from_single_file(file).state_dict(), state("prior"))
    convert_networks(embedded_path() / "prior", tmp_path / "known.safetensors", "original")
    assert metadata(tmp_path / "known.safetensors") == {"format": "pt"}
    save_file(to_original(state("prior"), "prior"), tmp_path / "bare.safetensors")
    refused("no prior preset .*; --config names a file or folder with it", tmp_path / "bare.safetensors",
            tmp_path / "out", "diffusers")  # fmt: skip
    convert_networks(tmp_path / "bare.safetensors", tmp_path / "out", "diffusers", config=folder / "prior")
    assert same(load_file(tmp_path / "out" / "diffusion_pytorch_model.safetensors"), state("prior"))
    damaged = {KEY: json.dumps({"prior": PRIOR | {"down_num_layers_per_block": [10**9, 1]}})}
    save_file(to_original(state("prior"), "prior"), tmp_path / "bomb.safetensors", damaged)
    with pytest.raises(ValueError, match=KEY):
        StableCascadePrior.from_single_file(tmp_path / "bomb.safetensors")


def test_a_controlnet_keeps_its_description(tmp_path):
    config = {
        "in_channels": 1,
        "projection_channels": 16,
        "blocks": [0],
        "bottleneck": "effnet",
        "backbone_config": ENCODER,
    }
    network = StableCascadeControlNet(**config)
    description = {"config": config, "filter": "canny", "filter_params": {"resize": 32}, "model_version": "1B"}
    save_controlnet(tmp_path / "c.safetensors", network.to_original(), description)
    convert_networks(tmp_path / "c.safetensors", tmp_path / "out", "diffusers")
    assert read_description(tmp_path / "out") == description
    assert same(StableCascadeControlNet.from_pretrained(tmp_path / "out").state_dict(), network.state_dict())
    convert_networks(tmp_path / "out", tmp_path / "back.safetensors", "comfyui")
    assert read_description(tmp_path / "back.safetensors") == description


def test_refusals(folder, tmp_path):
    prior, out = folder / "prior", tmp_path / "out.safetensors"
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "letter.txt").write_text("not ours")
    save_file({"input_blocks.0.0.weight": torch.zeros(1)}, tmp_path / "sdxl.safetensors")
    cases = [
        ("format 'onnx' is none of original, diffusers, comfyui, openclip", prior, out, "onnx", {}),
        ("dtype 'int8' is none of float32", prior, out, "original", {"dtype": "int8"}),
        ("component 'unet' is none of prior, decoder", folder, out, "original", {"component": "unet"}),
        ("'.*prior': there is no decoder in it; it has prior", prior, out, "original", {"component": "stage_b"}),
        ("has the prior and the decoder, .* add --component", folder, out, "comfyui", {}),
        ("is one file; give a name with .safetensors", prior, tmp_path / "folder", "original", {}),
        ("is a folder; name it without .safetensors", folder, out, "original", {}),
        ("openclip is for one of CLIP's encoders", prior, out, "openclip", {}),
        ("keeps the text_encoder in transformers' format", folder / "text_encoder", out, "original", {}),
        ("exists; name another place, or add --overwrite", prior, tmp_path / "sdxl.safetensors", "original", {}),
        ("folder of other things and is not replaced", prior, tmp_path / "other", "diffusers", {"overwrite": True}),
        ("is what is read, or holds it", prior, folder, "diffusers", {"overwrite": True}),
        ("is a Stable Diffusion or SDXL checkpoint, no network", tmp_path / "sdxl.safetensors", out, "original", {}),
        ("holds no network: no model_index.json", tmp_path / "other", out, "original", {}),
        ("'.*none' does not exist", tmp_path / "none", out, "original", {}),
    ]
    for message, source, target, to, options in cases:
        refused(message, source, target, to, **options)
    assert not out.exists()
    with pytest.raises(ValueError, match="neither; name one of them"):
        merge_checkpoint({"vqgan": {}})
    with pytest.raises(ValueError, match="a ComfyUI checkpoint of the prior has no vqgan"):
        merge_checkpoint({"prior": {}, "vqgan": {}})


def test_a_target_is_whole_or_as_it_was(folder, tmp_path):
    target = tmp_path / "stage_c.safetensors"
    target.write_text("before")

    def interrupted():
        with whole(target) as temporary:
            temporary.write_text("half of it")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert (os.listdir(tmp_path), target.read_text()) == ([target.name], "before")
    convert_networks(folder / "prior", target, "original", overwrite=True)
    assert describe(target).component == "prior"
    (tmp_path / "plain").touch()
    assert target.stat().st_mode == (tmp_path / "plain").stat().st_mode
    (tmp_path / "plain").unlink()
    convert_networks(folder / "prior", tmp_path / "again", "diffusers")
    (tmp_path / "again" / "old.txt").write_text("replaced")
    convert_networks(folder / "vqgan", tmp_path / "again", "diffusers", overwrite=True)
    assert sorted(os.listdir(tmp_path / "again")) == ["config.json", "diffusion_pytorch_model.safetensors"]
    assert sorted(os.listdir(tmp_path)) == ["again", target.name]


def test_what_lies_beside_is_named(folder, tmp_path):
    convert_networks(folder / "prior", tmp_path / "prior", "diffusers")
    (tmp_path / "prior" / "README.md").write_text("a card")
    report = convert_networks(tmp_path / "prior", tmp_path / "a.safetensors", "original")
    assert report.left == ("README.md",)
    whole_folder = convert_networks(folder, tmp_path / "original", "original")
    assert set(whole_folder.left) == {"tokenizer", "scheduler", "prior_scheduler"}
    convert_networks(tmp_path / "original", tmp_path / "b.safetensors", "comfyui", component="decoder")
    assert [part.component for part in describe(tmp_path / "b.safetensors").parts] == [
        "decoder",
        "vqgan",
        "text_encoder",
    ]
    assert {part.name for part in describe(tmp_path / "original").parts} >= {"stage_c.safetensors", "text_encoder"}
    convert_networks(folder / "prior", tmp_path / "original" / "other.safetensors", "original")
    refused("has the prior twice, in other.safetensors and stage_c.safetensors", tmp_path / "original",
            tmp_path / "c.safetensors", "comfyui", component="prior")  # fmt: skip
    (tmp_path / "original" / "other.safetensors").unlink()
    assert sorted(os.listdir(tmp_path / "original")) == [
        "effnet_encoder.safetensors", "image_encoder", "previewer.safetensors", "stage_a.safetensors",
        "stage_b.safetensors", "stage_c.safetensors", "text_encoder",
    ]  # fmt: skip


def test_the_command_for_networks(folder, tmp_path, capsys):
    out = str(tmp_path / "stage_c.safetensors")
    assert main(["convert", str(embedded_path()), out, "--to", "comfyui", "--component", "prior"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0].endswith(
        "a pipeline folder of decoder, image_encoder, previewer, prior, semantic_encoder, text_encoder, vqgan"
    )
    assert said[1].endswith(f"-> {out} (comfyui), every value as it was")
    assert len(said) == 2
    assert main(["convert", out, out, "--to", "original", "--overwrite"]) == 2
    assert "is what is read" in capsys.readouterr().err
    arguments = [
        "convert",
        str(embedded_path() / "vqgan"),
        str(tmp_path / "a.safetensors"),
        "--to",
        "original",
        "--json",
    ]
    assert main([*arguments, "--dtype", "float32"]) == 0
    written = json.loads(capsys.readouterr().out)["written"]
    assert (written["bitwise"], written["components"]) == (True, ["vqgan"])
    assert main([*arguments, "--base", "x", "--overwrite"]) == 2
    assert "--base is not for networks" in capsys.readouterr().err


def test_the_command_for_a_lora(tmp_path, capsys):
    prior = StableCascadePrior.from_pretrained(embedded_path(), subfolder="prior")
    add_lora(prior, module_filters=[".attn"], rank=2)
    save_lora(tmp_path / "lora", prior=prior)
    out = str(tmp_path / "kohya.safetensors")
    assert main(["convert", str(tmp_path / "lora"), out, "--to", "kohya"]) == 0
    assert "bitwise" in capsys.readouterr().out
    assert describe(out).format == "kohya"
    based = str(tmp_path / "based.safetensors")
    assert main(["convert", str(tmp_path / "lora"), based, "--to", "kohya", "--base", "embedded"]) == 0
    assert same(load_file(out), load_file(based))
    assert main(["convert", str(tmp_path / "lora"), out, "--to", "comfyui"]) == 2
    assert "exists; name another place" in capsys.readouterr().err
    assert main(["convert", str(tmp_path / "lora"), out, "--to", "peft", "--dtype", "float16"]) == 2
    assert "--dtype is not for a LoRA" in capsys.readouterr().err


def test_the_command_for_learned_tokens(tmp_path, capsys):
    rows = {"[fernando]": torch.randn(32), "<owl>": torch.randn(2, 32)}
    save_file(rows, tmp_path / "learned_embeds.safetensors")
    source, one = str(tmp_path / "learned_embeds.safetensors"), str(tmp_path / "fernando.safetensors")
    assert main(["convert", source, one, "--to", "comfyui"]) == 2
    assert "has 2 tokens, and a comfyui file holds one" in capsys.readouterr().err
    assert main(["convert", source, one, "--to", "onetrainer", "--token", "[fernando]"]) == 0
    assert torch.equal(load_file(one)["clip_g"][0], rows["[fernando]"])
    back = str(tmp_path / "back.safetensors")
    assert main(["convert", one, back, "--to", "diffusers"]) == 0
    assert same(load_file(back), {"[fernando]": rows["[fernando]"]})
    save_file({"clip_g": torch.zeros(1, 32), "clip_l": torch.zeros(1, 24)}, one)
    assert main(["convert", one, back, "--to", "diffusers", "--overwrite"]) == 2
    assert "does not name its token; add --token" in capsys.readouterr().err
    assert main(["convert", one, back, "--to", "diffusers", "--overwrite", "--token", "<x>"]) == 0
    assert "not carried over: clip_l (rows of another text encoder)" in capsys.readouterr().out
    for wrong, said in (
        (["--to", "kohya"], "none of diffusers"),
        (["--to", "peft", "--token", "a"], "has no token 'a'"),
    ):
        assert main(["convert", source, str(tmp_path / "no.safetensors"), *wrong]) == 2
        assert said in capsys.readouterr().err
