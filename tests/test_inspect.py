"""What a file is, told from its header: every kind, in every tool's names; a clear line for all else."""

import json
import struct

import pytest
import torch
from safetensors.torch import save, save_file

from stable_cascade.cli.main import main
from stable_cascade.components import NETWORKS as PARTS_OF
from stable_cascade.embedded import embedded_path
from stable_cascade.files import describe, read_header, to_original
from stable_cascade.files.clip import to_openclip
from stable_cascade.files.detection import describe_tensors
from stable_cascade.files.headers import MAX_HEADER, TensorInfo
from stable_cascade.files.loading import clip_on_meta, on_meta
from stable_cascade.files.presets import CLIP_CONFIGS
from stable_cascade.files.signatures import SIZES, component_of, measures, naming_of, size_of
from stable_cascade.files.weight_names import NETWORK, merge_checkpoint
from stable_cascade.models import PRESETS
from tests.released_keys import released_keys
from tests.tiny_cascade import tiny_parts, tiny_prior

PARTS = tiny_parts()
NETWORKS = {
    "prior": "prior", "decoder": "decoder", "vqgan": "vqgan", "semantic_encoder": "semantic_encoder",
    "previewer": "previewer", "text_encoder": "text_encoder", "image_encoder": "image_encoder",
}  # fmt: skip


def state(component):
    return PARTS[NETWORKS[component]].state_dict()


def preset_shapes(component, size):

    weights = on_meta(PARTS_OF[component].load_class(), PRESETS[component][size]).state_dict()
    return {name: tuple(value.shape) for name, value in weights.items()}


def written(tmp_path, tensors, metadata=None, name="file.safetensors"):
    save_file({key: value.contiguous() for key, value in tensors.items()}, tmp_path / name, metadata)
    return tmp_path / name


def refused(path, message):
    with pytest.raises(ValueError, match=message) as caught:
        describe(path)
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 500


@pytest.mark.parametrize(("component", "size"), [(c, size) for c in PRESETS for size in PRESETS[c]])
def test_the_table_of_sizes_is_that_of_the_presets(component, size):
    shapes = preset_shapes(component, size)
    meta = {name: torch.empty(shape, device="meta") for name, shape in shapes.items()}
    original = {name: tuple(value.shape) for name, value in to_original(meta, component).items()}
    for names in (shapes, original):
        assert component_of(names) == component
        assert size_of(names, component) == size
    differ = component in ("prior", "decoder", "vqgan")
    assert (naming_of(shapes, component), naming_of(original, component)) == (
        "diffusers" if differ else "original",
        "original",
    )
    assert set(SIZES[component]) == set(PRESETS[component])
    assert len(set(SIZES[component].values())) == len(SIZES[component])


def test_the_table_of_sizes_of_clip():
    for component, sizes in CLIP_CONFIGS.items():
        for size, config in sizes.items():
            shapes = {name: tuple(value.shape) for name, value in clip_on_meta(component, config).state_dict().items()}
            assert (component_of(shapes), size_of(shapes, component)) == (component, size)


@pytest.mark.parametrize(
    ("section", "component", "size"),
    [
        ("vqgan", "vqgan", "released"),
        ("semantic_encoder", "semantic_encoder", "released"),
        ("previewer", "previewer", "released"),
        ("controlnet identity", "controlnet", "identity"),
        ("controlnet super_resolution", "controlnet", "super_resolution"),
    ],
)
def test_key_lists_of_the_released_files(section, component, size):
    shapes = released_keys(section)
    found = describe_tensors({name: TensorInfo("bfloat16", shape) for name, shape in shapes.items()}, "released")
    assert (found.kind, found.component, found.size, found.format) == ("network", component, size, "original")


@pytest.mark.parametrize("component", NETWORKS)
def test_a_network_alone(component, tmp_path):
    weights = state(component)
    found = describe(written(tmp_path, weights, {"format": "pt", "step": "7"}))
    assert (found.kind, found.component, found.size) == ("network", component, None)
    assert found.metadata == {"step": "7"}
    trained = [value for name, value in weights.items() if "running_" not in name and "num_batches" not in name]
    assert found.parameters == sum(value.numel() for value in trained)
    assert found.tensors == len(weights)
    assert found.bytes == (tmp_path / "file.safetensors").stat().st_size
    assert json.loads(json.dumps(found.as_dict()))["component"] == component


@pytest.mark.parametrize("component", ["prior", "decoder"])
def test_whose_names_a_network_has(component, tmp_path):
    ours = state(component)
    original = to_original(ours, component)
    renamed = {name: name.replace(".attention.to_out.0.", ".attention.attn.out_proj.") for name in ours}
    split = {renamed[name].replace(".attention.to_", ".attention.attn.to_"): value for name, value in ours.items()}
    for weights, naming in (
        (ours, "diffusers"),
        (original, "original"),
        (split, "comfyui"),
        ({NETWORK + name: value for name, value in original.items()}, "comfyui"),
    ):
        found = describe(written(tmp_path, weights))
        assert (found.component, found.format) == (component, naming)
    mixed = {name: value.half() if name.startswith("clf") else value.bfloat16() for name, value in ours.items()}
    assert describe(written(tmp_path, mixed)).dtypes == {"bfloat16": len(ours) - 2, "float16": 2}


def test_a_comfyui_checkpoint_and_its_parts(tmp_path):
    stage_c = ("prior", "text_encoder", "semantic_encoder", "previewer", "image_encoder")
    merged = merge_checkpoint({name: state(name) for name in stage_c})
    found = describe(written(tmp_path, merged | {"something.else": torch.zeros(2)}))
    assert (found.kind, found.format) == ("checkpoint", "comfyui")
    assert {part.component for part in found.parts} == set(stage_c)
    assert "1 tensors belong to none of these, first: 'something.else'" in found.notes
    assert "a ComfyUI checkpoint of prior, semantic_encoder" in str(found)
    vae = {name.removeprefix("vae."): value for name, value in merged.items() if name.startswith("vae.")}
    assert [part.component for part in describe(written(tmp_path, vae)).parts] == ["semantic_encoder", "previewer"]


@pytest.mark.parametrize("component", ["text_encoder", "image_encoder"])
def test_openclip_names(component, tmp_path):
    found = describe(written(tmp_path, to_openclip(state(component), component)))
    assert (found.component, found.format) == (component, "openclip")


def pair(layer, down, up, width, rank=4):
    return {f"{layer}{down}": torch.zeros(rank, width), f"{layer}{up}": torch.zeros(width, rank)}


PEFT = (".lora_A.weight", ".lora_B.weight")
KOHYA = (".lora_down.weight", ".lora_up.weight")


@pytest.mark.parametrize(
    ("tensors", "layout", "size", "target"),
    [
        (pair("prior.down_blocks.0.2.attention.to_q", *PEFT, 2048), "peft", "3.6B", "to_q"),
        (pair("lora_unet_down_blocks_0_2_attention_attn_to_k", *KOHYA, 1536), "kohya", "1B", "to_k"),
        (pair("lora_prior_unet_down_blocks_0_2_attention_attn_to_v", *KOHYA, 2048), "onetrainer", "3.6B", "to_v"),
        (pair("diffusion_model.down_blocks.0.2.attention.attn.out_proj", *KOHYA, 2048), "comfyui", "3.6B", "out_proj"),
        (pair("weights.0", ".lora_down", ".lora_up", 2048), "original", "3.6B", "positional"),
        (pair("prior.down_blocks.0.2.attention.to_q", *PEFT, 16), "peft", None, "to_q"),
    ],
)
def test_a_lora(tensors, layout, size, target, tmp_path):
    found = describe(written(tmp_path, tensors))
    assert (found.kind, found.format) == ("lora", layout)
    assert (found.lora.ranks, found.lora.targets, found.lora.size) == ({4: 1}, {target: 1}, size)
    assert found.lora.components == ("prior",)
    assert "rank 4" in found.short()
    width = next(iter(tensors.values())).shape[1]
    assert ("for the prior " + size if size else f"for a prior of width {width}") in found.short()


def test_a_lora_with_more_in_it(tmp_path):
    layers = pair("prior.down_blocks.0.2.attention.to_q", *PEFT, 2048) | {
        "prior.down_blocks.0.2.attention.to_q.lora_magnitude_vector": torch.zeros(2048)
    }
    text = pair("text_encoder.text_model.encoder.layers.0.self_attn.q_proj", *PEFT, 1280, rank=8)
    config = json.dumps({"prior.r": 4, "prior.lora_alpha": 2, "prior.rank_pattern": {}})
    found = describe(written(tmp_path, layers | text, {"lora_adapter_metadata": config}))
    assert found.lora.dora
    assert found.lora.components == ("prior", "text_encoder")
    assert found.lora.ranks == {4: 1, 8: 1}
    assert "prior.r=4, prior.lora_alpha=2" in str(found)
    original = pair("weights.0", ".lora_down", ".lora_up", 2048) | {
        "embeddings.indices": torch.arange(3), "embeddings.embeddings": torch.zeros(3, 1280)
    }  # fmt: skip
    assert describe(written(tmp_path, original)).lora.tokens == 3
    refused(written(tmp_path, {"lora_unet_clf_1.lokr_w1": torch.zeros(2, 2)}), r"'file.safetensors' is a LoKr adapter")


@pytest.mark.parametrize(
    ("tensors", "layout"),
    [
        ({"[fernando]": torch.zeros(1280), "<owl>": torch.zeros(2, 1280)}, "diffusers"),
        ({"clip_g": torch.zeros(1, 1280)}, "comfyui"),
        ({"emb_params": torch.zeros(3, 1280)}, "automatic1111"),
    ],
)
def test_learned_tokens(tensors, layout, tmp_path):
    found = describe(written(tmp_path, tensors))
    assert (found.kind, found.format) == ("tokens", layout)


def test_folders(tmp_path):
    whole = describe(embedded_path())
    assert whole.kind == "pipeline"
    assert {part.name: part.size for part in whole.parts} == dict.fromkeys(
        ("prior", "decoder", "vqgan", "text_encoder", "image_encoder", "semantic_encoder", "previewer"), "embedded"
    )
    alone = describe(embedded_path() / "decoder")
    assert (alone.component, alone.size, alone.format) == ("decoder", "embedded", "diffusers")
    PARTS["prior"].save_pretrained(tmp_path / "parts", max_shard_size="50kB")
    assert len(list((tmp_path / "parts").glob("*.safetensors"))) > 1
    assert describe(tmp_path / "parts").parameters == describe(written(tmp_path, state("prior"))).parameters
    (tmp_path / "parts" / "diffusion_pytorch_model-00002-of-00005.safetensors").unlink(missing_ok=True)
    next((tmp_path / "parts").glob("*.safetensors")).unlink()
    refused(tmp_path / "parts", "which is not there; download the folder again")
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "is a folder without model_index.json and .safetensors files")


def test_a_training_and_its_export(tmp_path):
    step = tmp_path / "my_run" / "step-00000008"
    tiny_prior().save_pretrained(step / "export")
    (step / "run.json").write_text(json.dumps({"step": 8, "samples_seen": 64}))
    secret = "hf_" + "a" * 30
    (step / "config.yaml").write_text(
        f"lr: 0.0001\nbatch_size: 8\nwebdataset_path: [a.tar]\nnote: {secret}\nrules: {{a: 1}}\n"
    )
    for place in (tmp_path / "my_run", step):
        found = describe(place)
        assert found.kind == "training"
        assert "checkpoint of step 8, 64 samples seen" in found.notes
        assert found.training == {"lr": 0.0001, "batch_size": 8, "webdataset_path": ["a.tar"], "note": "***"}
        assert found.parts[0].component == "prior"
    assert describe(step / "export").training["batch_size"] == 8
    (step / "config.yaml").write_text("a: [")
    refused(step, "config.yaml' is no YAML")


def test_pickles_and_shards(tmp_path):
    torch.save({"state_dict": to_original(state("prior"), "prior")}, tmp_path / "stage_c.ckpt")
    found = describe(tmp_path / "stage_c.ckpt")
    assert (found.component, found.format) == ("prior", "original")
    assert any("pickle" in note for note in found.notes)
    torch.save([1, 2], tmp_path / "list.pt")
    refused(tmp_path / "list.pt", "holds no state dict")
    import tarfile

    with tarfile.open(tmp_path / "shard.tar", "w") as tar:
        tar.add(tmp_path / "list.pt", "0.png")
    assert describe(tmp_path / "shard.tar").kind == "shard"


def crafted(entries, data=b"", length=None):
    text = entries if isinstance(entries, bytes) else json.dumps(entries).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


ONE = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
DAMAGED = {
    "cut short": (save({"a": torch.zeros(9)})[:-4], "is damaged, cut short"),
    "goes on": (save({"a": torch.zeros(9)}) + b"more", "goes on behind its last tensor"),
    "a lie": (crafted({"a": ONE}, bytes(8), 2**60), "is damaged or no safetensors file: its header would have"),
    "a long header": (crafted({}, bytes(99), MAX_HEADER + 1), "its header would have"),
    "no JSON": (crafted(b"{]", bytes(9)), "is damaged in its header"),
    "no object": (crafted([1, 2], bytes(9)), "no JSON object"),
    "too deep": (crafted(b"[" * 200_000, bytes(9)), "is damaged in its header"),
    "a type": (crafted({"a": ONE | {"dtype": "F99"}}, bytes(8)), "'a' is not described by a known dtype"),
    "a shape": (crafted({"a": ONE | {"shape": [-2]}}, bytes(8)), "is not described"),
    "a size": (crafted({"a": ONE | {"shape": [2**40]}}, bytes(8)), "takes 8 bytes"),
    "a gap": (crafted({"a": ONE | {"data_offsets": [8, 16]}}, bytes(16)), "overlap or leave gaps"),
    "metadata": (crafted({"a": ONE, "__metadata__": {"a": 1}}, bytes(8)), "metadata is no table of texts"),
    "an image": (b"\x89PNG\r\n" + bytes(99), "is a PNG image"),
    "a pointer": (b"version https://git-lfs.github.com/spec/v1\noid", "is a Git LFS pointer"),
    "a page": (b"<!DOCTYPE html><html>", "is a web page"),
    "nothing": (b"", "has 0 bytes"),
}


@pytest.mark.parametrize("kind", DAMAGED)
def test_damaged_files(kind, tmp_path):
    content, message = DAMAGED[kind]
    (tmp_path / "stage_c.safetensors").write_bytes(content)
    refused(tmp_path / "stage_c.safetensors", f"'.*stage_c.safetensors' .*{message}|{message}")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("model.diffusion_model.input_blocks.0.0.weight", "is a Stable Diffusion or SDXL checkpoint"),
        ("conditioner.embedders.0.transformer.weight", "is a Stable Diffusion or SDXL checkpoint"),
        ("down_blocks.0.resnets.0.conv1.weight", "is a UNet of Stable Diffusion or SDXL"),
        ("double_blocks.0.img_attn.qkv.weight", "is a diffusion transformer"),
        ("my\n.weird key", "is nothing that is known here .its first key is 'my .weird key'.; known are networks"),
    ],
)
def test_files_of_other_models(name, message, tmp_path):
    refused(written(tmp_path, {name: torch.zeros(2)}), message)


def test_no_tensor_is_read(tmp_path):
    """A file whose data is a hole on the disk, larger than memory: its header is all that is looked at."""
    shapes = preset_shapes("prior", "3.6B")
    entries, place = {}, 0
    for name, shape in shapes.items():
        size = 4 * torch.Size(shape).numel()
        entries[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [place, place + size]}
        place += size
    text = json.dumps(entries).encode()
    with (tmp_path / "prior.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        file.truncate(8 + len(text) + place)
    found = describe(tmp_path / "prior.safetensors")
    assert (found.size, found.parameters, found.format) == ("3.6B", 3_589_103_632, "diffusers")
    assert read_header(tmp_path / "prior.safetensors").size == 8 + len(text) + place
    assert measures(shapes, "decoder") == measures(shapes, "prior")


def test_the_command(tmp_path, capsys):
    assert main(["inspect", str(embedded_path() / "prior")]) == 0
    assert "prior: the prior (Stage C), embedded, diffusers names" in capsys.readouterr().out
    assert main(["inspect", "--json", str(embedded_path() / "prior")]) == 0
    assert json.loads(capsys.readouterr().out)["parameters"] == 3_449_360
    assert main(["inspect", "--json", str(embedded_path()), str(embedded_path() / "vqgan")]) == 0
    assert [one["kind"] for one in json.loads(capsys.readouterr().out)] == ["pipeline", "network"]
    assert main(["inspect", str(tmp_path / "none")]) == 2
    assert "does not exist" in capsys.readouterr().err
