"""Names of weights, single files and folders: what the original and diffusers wrote loads, and goes back bitwise."""

import pytest
import torch
from diffusers import StableCascadeUNet
from diffusers.loaders.single_file_utils import convert_stable_cascade_unet_single_file_to_diffusers
from safetensors.torch import save_file

from stable_cascade.files import KEY_MAPS, from_original, to_original
from stable_cascade.files.loading import on_meta
from stable_cascade.models import PRESETS, StableCascadeDecoder, StableCascadePrior
from tests.golden import entry, fill
from tests.golden_networks import CLASSES, golden_inputs, golden_network, our_config

EXAMPLES = {"prior": "io_stage_c_conds", "decoder": "io_stage_b_pixels"}
networks = pytest.mark.parametrize("component", ["prior", "decoder"])


def released(component):
    """A state dict as the original release has it, and the config it needs."""
    info = entry(EXAMPLES[component])
    model, _ = golden_network(EXAMPLES[component])
    shapes = {key: value.shape for key, value in to_original(model.state_dict(), component).items()}
    return fill(shapes, info["fill"]), our_config(info["config"], component)


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) and a[key].dtype == b[key].dtype for key in a)


@networks
def test_round_trip_is_bitwise(component):
    original, _ = released(component)
    ours = from_original(original, component)
    assert not same(ours, original)
    assert same(to_original(ours, component), original)
    assert same(from_original(ours, component), ours)
    assert same(to_original(original, component), original)


def test_round_trip_of_stage_a():
    original = {"vquantizer.codebook.weight": torch.randn(8, 4), "in_block.1.bias": torch.randn(3)}
    ours = from_original(original, "vqgan")
    assert ours.keys() == {"vquantizer.embedding.weight", "in_block.1.bias"}
    assert same(to_original(ours, "vqgan"), original)


@networks
def test_names_are_those_of_diffusers_own_converter(component):
    original, _ = released(component)
    theirs = convert_stable_cascade_unet_single_file_to_diffusers(dict(original))
    assert same(from_original(original, component), theirs)


def test_components_with_the_same_names():
    state = {"backbone.0.0.weight": torch.zeros(2), "projections.0.2.weight": torch.zeros(3)}
    for component in ("semantic_encoder", "previewer", "controlnet"):
        assert same(from_original(state, component), state)
        assert same(to_original(state, component), state)
    assert set(KEY_MAPS) == set(PRESETS)


ORIGINAL_KEYS = {("prior", "3.6B"): 1294, ("prior", "1B"): 654, ("decoder", "3B"): 1454, ("decoder", "700M"): 826}


@pytest.mark.parametrize(("component", "version"), ORIGINAL_KEYS)
def test_released_key_counts(component, version):
    state = on_meta(CLASSES[component], PRESETS[component][version]).state_dict()
    original = to_original(state, component)
    assert len(original) == ORIGINAL_KEYS[component, version]
    assert from_original(original, component).keys() == state.keys()
    width = PRESETS[component][version]["block_out_channels"][-1]
    assert original["up_blocks.0.2.attention.attn.in_proj_weight"].shape == (3 * width, width)
    assert ("clip_mapper.weight" in original) == (component == "decoder")


@networks
def test_single_file_of_the_original(component, tmp_path):
    weights, config = released(component)
    save_file(weights, tmp_path / "stage.safetensors")
    model = CLASSES[component].from_single_file(tmp_path / "stage.safetensors", config=config)
    assert not model.training
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert same(model.to_original(), weights)
    expected, _ = golden_network(EXAMPLES[component])
    inputs = golden_inputs(EXAMPLES[component])
    with torch.no_grad():
        assert torch.equal(model(**inputs).sample, expected(**inputs).sample)


@networks
def test_single_file_finds_its_preset(component, tmp_path):
    cls = CLASSES[component]
    source = cls(**PRESETS[component]["embedded"])
    for index, state in enumerate((source.to_original(), source.state_dict())):
        file = tmp_path / f"{index}.safetensors"
        save_file(state, file)
        for config in (None, "embedded"):
            model = cls.from_single_file(file, config=config)
            assert same(model.state_dict(), source.state_dict())
            assert model.config.block_out_channels == PRESETS[component]["embedded"]["block_out_channels"]


@networks
def test_single_file_holds_one_copy(component):
    weights, config = released(component)
    model = CLASSES[component].from_single_file(weights, config=config)
    assert model.clf[1].weight.data_ptr() == weights["clf.1.weight"].data_ptr()
    rows = weights["up_blocks.0.2.attention.attn.in_proj_weight"]
    assert model.up_blocks[0][2].attention.to_q.weight.data_ptr() == rows.data_ptr()
    half = CLASSES[component].from_single_file(weights, config=config, torch_dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in half.parameters()} == {torch.bfloat16}
    assert not any(parameter.is_meta for parameter in half.parameters())


def test_single_file_that_is_pickled(tmp_path):
    weights, config = released("prior")
    for content in (weights, {"state_dict": weights}):
        torch.save(content, tmp_path / "stage_c.pt")
        with pytest.warns(UserWarning, match=r"stage_c\.pt is a pickle file"):
            model = StableCascadePrior.from_single_file(tmp_path / "stage_c.pt", config=config)
        assert same(model.to_original(), weights)


@networks
def test_folders_cross_over_to_diffusers_and_back(component, tmp_path):
    model, _ = golden_network(EXAMPLES[component])
    inputs = golden_inputs(EXAMPLES[component])
    inputs = {key: value for key, value in inputs.items() if key not in ("sca", "crp", "control")}
    with torch.no_grad():
        expected = model(**inputs).sample
        model.save_pretrained(tmp_path / "ours")
        theirs = StableCascadeUNet.from_pretrained(tmp_path / "ours").eval()
        torch.testing.assert_close(theirs(**inputs).sample, expected, rtol=1e-4, atol=2e-5)
        theirs.save_pretrained(tmp_path / "theirs")
        back = CLASSES[component].from_pretrained(tmp_path / "theirs")
        assert torch.equal(back(**inputs).sample, expected)
        fresh = CLASSES[component].from_config(theirs.config)
    assert {key: value.shape for key, value in fresh.state_dict().items()} == {
        key: value.shape for key, value in theirs.state_dict().items()
    }
    assert same(back.state_dict(), model.state_dict())
    half = CLASSES[component].from_pretrained(tmp_path / "theirs", torch_dtype=torch.float16)
    assert half.dtype == torch.float16


def test_diffusers_defaults_are_not_replaced_by_ours():
    theirs = StableCascadeUNet(
        in_channels=4, out_channels=4, conditioning_dim=8, block_out_channels=(8, 8), num_attention_heads=(2, 2),
        down_num_layers_per_block=(1, 1), up_num_layers_per_block=(1, 1), clip_text_pooled_in_channels=8,
        effnet_in_channels=4, pixel_mapper_in_channels=3,
    )  # fmt: skip
    ours = StableCascadeDecoder.from_config(theirs.config)
    ours.load_state_dict(theirs.state_dict())
    assert ours.config.patch_size == 1
    back = StableCascadeUNet.from_config(ours.config)
    back.load_state_dict(ours.state_dict())


def test_a_file_loaded_in_place_can_be_saved(tmp_path):
    weights, config = released("prior")
    model = StableCascadePrior.from_single_file(weights, config=config)
    model.save_pretrained(tmp_path)
    assert same(StableCascadePrior.from_pretrained(tmp_path).to_original(), weights)


def test_refusals(tmp_path):
    weights, config = released("prior")
    save_file(weights, tmp_path / "whole.safetensors")
    (tmp_path / "cut.safetensors").write_bytes((tmp_path / "whole.safetensors").read_bytes()[:5000])
    torch.save([1, 2], tmp_path / "list.pt")
    cases = [
        (tmp_path / "none.safetensors", config, "does not exist"),
        (tmp_path / "cut.safetensors", config, "is damaged"),
        (weights, None, r"no prior preset \(3.6B, 1B, embedded\); pass config="),
        (weights, "3.7B", "config '3.7B' is neither a preset .*nearest: '3.6B'"),
        (weights, "embedded", "check config"),
        (weights | {"clf.1.bias": torch.zeros(7)}, config, r"clf.1.bias is \(7,\) in the file, \(16,\) by the config"),
        (weights | {"odd": torch.zeros(7)}, config, "the file has odd"),
        ({key: value for key, value in weights.items() if key != "clf.1.bias"}, config, "clf.1.bias is missing"),
    ]
    for source, given, message in cases:
        with pytest.raises(ValueError, match=message) as refused:
            StableCascadePrior.from_single_file(source, config=given)
        assert "\n" not in str(refused.value)
    with pytest.warns(UserWarning, match="pickle"), pytest.raises(ValueError, match="holds no state dict"):
        StableCascadePrior.from_single_file(tmp_path / "list.pt", config=config)


def test_refused_names():
    with pytest.raises(ValueError, match=r"component 'priors' is none of prior, .*; nearest: 'prior'"):
        from_original({}, "priors")
    with pytest.raises(ValueError, match=r"a\.attention\.to_k\.weight is missing"):
        to_original({"a.attention.to_q.weight": torch.zeros(2, 2)}, "prior")
    with pytest.raises(ValueError, match="has 4 rows, which 3 groups do not divide"):
        from_original({"a.attention.attn.in_proj_bias": torch.zeros(4)}, "prior")
