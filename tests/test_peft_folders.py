"""PEFT's own folders act here as in the PeftModel that wrote them; DoRA of depthwise convolutions as OneTrainer's."""

import copy
import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from stable_cascade.adapters import load_lora
from stable_cascade.adapters.load import placed
from stable_cascade.adapters.peft_layers import InputDora, OneTrainerConv2d, OutputDora, add_input_magnitude
from stable_cascade.files import lora as files
from tests.tiny_cascade import tiny_prior
from tests.tiny_pipelines import cascade

LAYERS = ["to_q", "to_k", "to_v", "to_out.0", "mapper"]
CONFIGS = {
    "alpha": {"lora_alpha": 8},
    "alpha below rank": {"lora_alpha": 1},
    "rslora": {"lora_alpha": 8, "use_rslora": True},
    "dora": {"lora_alpha": 8, "use_dora": True},
    "alpha pattern": {"lora_alpha": 8, "alpha_pattern": {"to_q": 32, "to_k": 2}},
    "rank pattern": {"lora_alpha": 8, "rank_pattern": {"to_v": 2, "mapper": 8}},
    "both patterns": {"lora_alpha": 3, "alpha_pattern": {"to_v": 16}, "rank_pattern": {"to_v": 2}, "use_rslora": True},
    "lora bias": {"lora_alpha": 8, "lora_bias": True},
    "gaussian": {"lora_alpha": 8, "init_lora_weights": "gaussian"},
}


def inputs():
    generator = torch.Generator().manual_seed(3)
    values = {
        "sample": torch.randn(1, 16, 8, 8, generator=generator),
        "timestep_ratio": torch.tensor([0.4]),
        "clip_text_pooled": torch.randn(1, 1, 1280, generator=generator),
        "clip_text": torch.randn(1, 77, 1280, generator=generator),
    }
    return values


def output(model):
    prior = getattr(model, "base_model", model)
    prior = getattr(prior, "model", prior)
    config, values = prior.config, inputs()
    for name, width in (
        ("clip_text_pooled", config.clip_text_pooled_in_channels),
        ("clip_text", config.clip_text_in_channels),
    ):
        values[name] = values[name][..., :width]
    with torch.no_grad():
        return model.eval()(**values, return_dict=False)[0]


def peft_folder(path, base, safe=True, **options):
    """What PEFT writes of a random adapter, and what it computes with it."""
    model = get_peft_model(copy.deepcopy(base), LoraConfig(**{"r": 4, "target_modules": LAYERS, **options}))
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
            elif "magnitude" in name:
                parameter.mul_(1 + 0.5 * torch.rand(parameter.shape, generator=generator))
    model.save_pretrained(path, safe_serialization=safe)
    return output(model)


def difference(one, other, base):
    return float((one - other).norm() / (other - base).norm())


@pytest.mark.parametrize("name", CONFIGS)
def test_a_peft_folder_acts_at_its_own_strength(tmp_path, name):
    base = tiny_prior()
    expected = peft_folder(tmp_path, base, **CONFIGS[name])
    plain = output(base)
    load_lora(base, tmp_path)
    assert difference(output(base), expected, plain) < 1e-5


def test_the_files_name_and_a_pickle_mean_the_same(tmp_path):
    base = tiny_prior()
    expected, plain = peft_folder(tmp_path, base, safe=False, lora_alpha=8), output(base)
    assert (tmp_path / "adapter_model.bin").is_file()
    load_lora(base, tmp_path / "adapter_model.bin")
    assert difference(output(base), expected, plain) < 1e-5


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"peft_type": "LOHA"}, "peft_type: 'LOHA', which is no LoRA"),
        ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights: 'pissa_niter_4', which changes the weights"),
        ({"init_lora_weights": "olora"}, "changes the weights beneath"),
        ({"bias": "all"}, "bias: 'all', which trains biases"),
        ({"modules_to_save": ["clf"]}, "modules_to_save: .*, which is not read here"),
        ({"layer_replication": [[0, 1]]}, "layer_replication"),
        ({"fan_in_fan_out": True}, "fan_in_fan_out"),
        ({"something_new": 3}, "something_new: '3', which is not read here"),
        ({"two\nlines": 3}, "two.*lines: '3', which is not read here"),
        ({"r": None}, "names no r or no lora_alpha"),
        ({"lora_alpha": None}, "names no r or no lora_alpha"),
        ({"lora_alpha": "8"}, "as lora_alpha; mend it"),
        ({"use_dora": True}, "has no DoRA magnitudes"),
    ],
)
def test_what_cannot_be_honoured_is_refused_by_name(tmp_path, changes, words):
    base = tiny_prior()
    peft_folder(tmp_path, base, lora_alpha=8)
    config = tmp_path / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), **changes}))
    with pytest.raises(ValueError, match=words) as caught:
        load_lora(base, tmp_path)
    assert "\n" not in str(caught.value)


def test_a_config_that_is_none_is_an_error_and_not_a_guess(tmp_path):
    base = tiny_prior()
    peft_folder(tmp_path, base, lora_alpha=8)
    (tmp_path / "adapter_config.json").write_text("{")
    with pytest.raises(ValueError, match=r"adapter_config.json' is no JSON"):
        load_lora(base, tmp_path)


@pytest.mark.parametrize(
    ("down_end", "up_end"),
    [
        (".lora_down.weight", ".lora_up.weight"),
        ("_lora.down.weight", "_lora.up.weight"),
        (".lora_A.weight", ".lora_B.weight"),
        (".lora.down.weight", ".lora.up.weight"),
        (".lora_A", ".lora_B"),
        (".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight"),
        (".lora_A.default.weight", ".lora_B.default.weight"),
    ],
)
def test_every_ending_of_a_lora_that_comfyui_reads(down_end, up_end):
    down, up = torch.randn(2, 8), torch.randn(8, 2)
    layer = "diffusion_model.down_blocks.0.attn.to_out"
    (part,) = files.read({layer + down_end: down, layer + up_end: up}).parts.values()
    name = layer.removeprefix("diffusion_model.")
    assert part.keys() == {f"{name}.lora_A.weight", f"{name}.lora_B.weight"}
    assert torch.equal(part[f"{name}.lora_A.weight"], down)


@pytest.mark.parametrize(
    "end",
    [
        *(f"hada_{part}" for part in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")),
        *(f"lokr_{part}" for part in ("w1", "w2", "w1_a", "w1_b", "w2_a", "w2_b", "t2")),
        "a1.weight", "a2.weight", "b1.weight", "b2.weight", "oft_blocks", "lora_mid.weight", "reshape_weight",
        "w_norm", "b_norm", "diff", "diff_b", "set_weight",
    ],
)  # fmt: skip
def test_every_other_ending_that_comfyui_reads_is_refused_by_its_kind(end):
    layer = "diffusion_model.down_blocks.0.attn.to_out"
    sound = {f"{layer}.lora_down.weight": torch.ones(2, 8), f"{layer}.lora_up.weight": torch.ones(8, 2)}
    with pytest.raises(ValueError, match=rf"is an? .*, by its key '{layer}.{end}', and only LoRA and DoRA are read"):
        files.read({**sound, f"{layer}.{end}": torch.ones(2, 2)})


@pytest.mark.parametrize("over", ["inputs", "outputs"])
def test_dora_of_a_depthwise_convolution_is_onetrainers(over):
    """It adds (B A).view(C, 1, 3, 3) to the weight, and sets the lengths of the whole or of every output."""
    torch.manual_seed(0)
    base = nn.Conv2d(6, 6, 3, padding=1, groups=6)
    weight, bias = base.weight.detach().clone(), base.bias.detach().clone()
    config = LoraConfig(r=2, lora_alpha=3, use_dora=over == "outputs")
    layer = OneTrainerConv2d(base, "default", config, r=2, lora_alpha=3)
    down, up = torch.randn(2, 6, 3, 3), torch.randn(1, 2, 1, 1)
    magnitude = torch.rand(1) * 3 if over == "inputs" else torch.rand(6) * 3
    with torch.no_grad():
        layer.lora_A["default"].weight.copy_(down)
        layer.lora_B["default"].weight.copy_(up)
    whole = weight + 1.5 * (up.flatten(1) @ down.flatten(1)).view(6, 1, 3, 3)
    if over == "inputs":
        add_input_magnitude(layer, "default", magnitude)
        assert isinstance(layer.lora_variant["default"], InputDora)
        merged = whole * magnitude / whole.norm()
    else:
        assert isinstance(layer.lora_variant["default"], OutputDora)
        layer.lora_magnitude_vector["default"].weight.data = magnitude.view(1, 6, 1, 1)
        merged = whole * (magnitude / whole.flatten(1).norm(dim=1)).view(6, 1, 1, 1)
    x = torch.randn(2, 6, 8, 8)
    expected = nn.functional.conv2d(x, merged, bias, padding=1, groups=6)
    with torch.no_grad():
        assert float((layer.eval()(x) - expected).norm() / expected.norm()) < 1e-6


def test_pickled_tokens_are_read_by_every_command(tmp_path, capsys):
    from stable_cascade.adapters import read_learned_embeds
    from stable_cascade.cli.main import main

    row = torch.randn(128)
    torch.save({"<fox>": row}, tmp_path / "t.pt")
    torch.save({"string_to_param": {"*": row[None]}, "name": "fox"}, tmp_path / "a1111.pt")
    assert read_learned_embeds(tmp_path / "t.pt")["<fox>"].equal(row)
    assert read_learned_embeds(tmp_path / "a1111.pt")["fox"].equal(row)
    for name in ("t.pt", "a1111.pt"):
        assert main(["inspect", str(tmp_path / name)]) in (0, None)
        assert main(["convert", str(tmp_path / name), str(tmp_path / f"{name}.safetensors"), "--to", "comfyui"]) in (
            0,
            None,
        )
    assert (tmp_path / "a1111.pt.safetensors").is_file()
    capsys.readouterr()


def test_pickles_that_claim_more_than_they_hold_are_refused(tmp_path):
    torch.save({"<fox>": torch.zeros(1).expand(10**12)}, tmp_path / "t.pt")
    with pytest.raises(ValueError, match=r"'<fox>' claims more values than the file has"):
        files.read(tmp_path / "t.pt")


def test_files_of_very_many_tensors_are_refused(tmp_path):
    from safetensors.torch import save_file

    save_file({f"t{number}": torch.zeros(0) for number in range(20_001)}, tmp_path / "many.safetensors")
    with pytest.raises(ValueError, match=r"has 20,001 tensors; at most 20,000 are read"):
        files.read(tmp_path / "many.safetensors")


def test_a_folder_of_the_decoder_is_the_decoders(tmp_path):
    """Its keys are those of a prior's; the config beside them notes the network's class."""
    pipeline = copy.deepcopy(cascade())
    chosen = LoraConfig(r=4, lora_alpha=8, target_modules=["to_q", "mapper"])
    get_peft_model(copy.deepcopy(pipeline.decoder), chosen).save_pretrained(tmp_path)
    pipeline.load_lora_weights(tmp_path, adapter_name="style")
    assert pipeline.get_list_adapters() == {"decoder": ["style"]}
    pipeline.decoder_pipe.unload_lora_weights()
    with pytest.raises(ValueError, match="has decoder; this StableCascadePriorPipeline has none of them"):
        pipeline.prior_pipe.load_lora_weights(tmp_path)


def test_a_folder_that_notes_no_network_goes_where_it_fits(tmp_path):
    """PEFT notes no class where a task type is given; the shapes of the layers tell the networks apart."""
    pipeline = copy.deepcopy(cascade())
    chosen = LoraConfig(r=4, lora_alpha=8, target_modules=["to_q", "mapper"])
    get_peft_model(copy.deepcopy(pipeline.decoder), chosen).save_pretrained(tmp_path)
    config = tmp_path / "adapter_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "auto_mapping": None}))
    pipeline.load_lora_weights(tmp_path, adapter_name="style")
    assert pipeline.get_list_adapters() == {"decoder": ["style"]}
    alone = copy.deepcopy(cascade().decoder)
    assert load_lora(alone, tmp_path)
    read = files.read(tmp_path / "adapter_model.safetensors")
    with pytest.raises(ValueError, match="fits the prior and the decoder alike, and adapter_config"):
        placed(read, {"prior": cascade().decoder, "decoder": cascade().decoder})
    with pytest.raises(ValueError, match=r"adapter_model[.]safetensors") as caught:
        load_lora(tiny_prior(), tmp_path)
    assert len(str(caught.value).splitlines()) == 1
