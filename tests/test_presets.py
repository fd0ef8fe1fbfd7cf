import json

import pytest
import torch
from diffusers import StableCascadeUNet
from diffusers.pipelines.deprecated.wuerstchen import PaellaVQModel
from safetensors.torch import save_file

from stable_cascade.files.loading import single_file_config
from stable_cascade.files.presets import PRESETS, preset
from stable_cascade.models.controlnet import StableCascadeControlNet
from stable_cascade.models.decoder import StableCascadeDecoder
from stable_cascade.models.previewer import StableCascadePreviewer
from stable_cascade.models.semantic_encoder import StableCascadeSemanticEncoder
from stable_cascade.models.vqgan import StableCascadeVQGAN
from tests.released_keys import released_keys

CLASSES = {
    "vqgan": StableCascadeVQGAN,
    "semantic_encoder": StableCascadeSemanticEncoder,
    "previewer": StableCascadePreviewer,
    "controlnet": StableCascadeControlNet,
}
PARAMETERS = {
    ("vqgan", "released"): (18_406_894, 9, 122),
    ("semantic_encoder", "released"): (20_197_968, 154_015, 784),
    ("previewer", "released"): (3_979_651, 4_104, 58),
    ("controlnet", "canny"): (54_255_776, 153_982, 796),
    ("controlnet", "inpainting"): (54_256_424, 153_982, 796),
    ("controlnet", "super_resolution"): (203_491_584, 0, 86),
    ("controlnet", "identity"): (102_763_008, 0, 132),
}
UNET_PARAMETERS = {
    ("prior", "3.6B"): 3_589_103_632,
    ("prior", "1B"): 1_030_785_040,
    ("decoder", "3B"): 1_562_941_136,
    ("decoder", "700M"): 699_471_248,
}
EVERY = [(component, version) for component, versions in PRESETS.items() for version in versions]


def on_meta(cls, component, version):
    with torch.device("meta"):
        return cls(**preset(component, version))


def expected_keys(component, version):
    if component != "controlnet":
        return released_keys(component)
    keys = released_keys(f"controlnet {version}")
    if PRESETS[component][version]["bottleneck"] == "effnet":
        features = {
            key: shape for key, shape in released_keys("semantic_encoder").items() if key.startswith("backbone")
        }
        keys = features | keys
    return keys


@pytest.mark.parametrize(("component", "version"), PARAMETERS)
def test_released_networks_have_the_original_keys_and_shapes(component, version):
    model = on_meta(CLASSES[component], component, version)
    state = {
        key.replace("vquantizer.embedding", "vquantizer.codebook"): tuple(value.shape)
        for key, value in model.state_dict().items()
    }
    assert state == expected_keys(component, version)
    sizes = sum(p.numel() for p in model.parameters()), sum(b.numel() for b in model.buffers()), len(state)
    assert sizes == PARAMETERS[component, version]


@pytest.mark.parametrize(("component", "version"), UNET_PARAMETERS)
def test_prior_and_decoder_presets_are_configs_of_diffusers(component, version):
    model = on_meta(StableCascadeUNet, component, version)
    assert set(preset(component, version)) <= set(model.config)
    assert sum(p.numel() for p in model.parameters()) == UNET_PARAMETERS[component, version]


def test_embedded_networks_fit_each_other():
    prior, decoder = preset("prior", "embedded"), preset("decoder", "embedded")
    encoder = StableCascadeSemanticEncoder(**preset("semantic_encoder", "embedded")).eval()
    vqgan = StableCascadeVQGAN(**preset("vqgan", "embedded")).eval()
    previewer = StableCascadePreviewer(**preset("previewer", "embedded")).eval()
    with torch.no_grad():
        semantic_latents = encoder(torch.rand(1, 3, 48, 48))
        vq_latents = vqgan.encode(torch.rand(1, 3, 64, 64)).latents
        assert previewer(semantic_latents).shape == (1, 3, 48, 48)
    assert encoder.stride == 8
    assert semantic_latents.shape == (1, prior["in_channels"], 6, 6)
    assert decoder["effnet_in_channels"] == prior["out_channels"]
    assert vq_latents.shape == (1, decoder["in_channels"], 16, 16)


@pytest.mark.parametrize("component", ["prior", "decoder"])
def test_embedded_unets_are_configs_of_diffusers(component):
    model = on_meta(StableCascadeUNet, component, "embedded")
    assert 1e6 < sum(p.numel() for p in model.parameters()) < 8e6


def test_the_embedded_vqgan_is_a_paella_config():
    on_meta(PaellaVQModel, "vqgan", "embedded")


@pytest.mark.parametrize(("component", "version"), EVERY)
def test_presets_are_json_and_copies(component, version):
    config = preset(component, version)
    assert json.loads(json.dumps(config)) == config == PRESETS[component][version]
    for value in config.values():
        if isinstance(value, list | dict):
            value.clear()
    assert preset(component, version) == PRESETS[component][version] != config or component in ("previewer", "vqgan")


def test_unknown_presets_are_refused():
    with pytest.raises(ValueError, match=r"prior has no preset '3\.5B'; allowed: 3\.6B, 1B, embedded; nearest: 3\.6B"):
        preset("prior", "3.5B")
    with pytest.raises(ValueError, match=r"component 'decodr' has no presets; .*nearest: decoder"):
        preset("decodr", "3B")


def test_header_of_a_single_file_tells_its_preset(tmp_path):
    model = StableCascadeDecoder(**preset("decoder", "embedded"))
    save_file({name: value.contiguous() for name, value in model.to_original().items()}, tmp_path / "b.safetensors")
    assert single_file_config(StableCascadeDecoder, "decoder", tmp_path / "b.safetensors") == preset(
        "decoder", "embedded"
    )
    save_file({"gamma": torch.ones(3)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError):
        single_file_config(StableCascadeDecoder, "decoder", tmp_path / "other.safetensors")
