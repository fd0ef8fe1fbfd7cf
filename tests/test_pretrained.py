"""Networks from folders: whole or not at all."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from stable_cascade import StableCascadePipeline, StableCascadeVQGAN
from stable_cascade.pipelines.layout import load_folder
from tests.tiny_cascade import tiny_parts, tiny_text_encoder
from tests.tiny_pipelines import cascade

PARTS = tiny_parts()


def without(folder, *keys):
    path = folder / "diffusion_pytorch_model.safetensors"
    weights = {key: value for key, value in load_file(path).items() if not key.startswith(keys)}
    save_file(weights, path)


@pytest.mark.parametrize(("name", "left_out"), [("prior", "clf.1"), ("vqgan", "down_blocks.1."), ("decoder", "clip")])
def test_missing_weights_are_named(tmp_path, name, left_out):
    network = PARTS[name]
    network.save_pretrained(tmp_path)
    assert type(network).from_pretrained(tmp_path).state_dict().keys() == network.state_dict().keys()
    without(tmp_path, left_out)
    with pytest.raises(
        ValueError, match=rf"of the weights of {type(network).__name__} are missing in .*{left_out}"
    ) as told:
        type(network).from_pretrained(tmp_path)
    assert "\n" not in str(told.value)
    _, info = type(network).from_pretrained(tmp_path, output_loading_info=True)
    assert info["missing_keys"]


def test_a_pipeline_with_a_network_that_is_not_whole(tmp_path):
    cascade().save_pretrained(tmp_path)
    without(tmp_path / "decoder", "clf")
    with pytest.raises(ValueError, match="of the weights of StableCascadeDecoder are missing"):
        StableCascadePipeline.from_pretrained(tmp_path)


def test_a_vqgan_with_defaults_keeps_its_scale_as_a_component():
    """diffusers' class has 0.3764 by default, ours 0.43 as released."""
    from diffusers.pipelines.deprecated.wuerstchen import PaellaVQModel

    from stable_cascade import StableCascadeDecoderPipeline

    theirs = PaellaVQModel(bottleneck_blocks=1, embed_dim=16, num_vq_embeddings=16)
    pipeline = StableCascadeDecoderPipeline(
        decoder=None, tokenizer=None, text_encoder=None, scheduler=None, vqgan=theirs
    )
    assert type(pipeline.vqgan) is StableCascadeVQGAN
    assert pipeline.vqgan.config.scale_factor == theirs.config.scale_factor == 0.3764
    latents = torch.randn(1, 4, 4, 4)
    with torch.no_grad():
        expected = theirs.decode(latents / theirs.config.scale_factor).sample
        found = pipeline.vqgan.decode(latents / pipeline.vqgan.config.scale_factor).sample
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_a_text_encoder_that_is_not_whole(tmp_path):
    """transformers only warns of weights that begin at random."""
    tiny_text_encoder().save_pretrained(tmp_path)
    file = tmp_path / "model.safetensors"
    tensors = load_file(file)
    del tensors["text_model.encoder.layers.0.mlp.fc1.weight"]
    save_file(tensors, file, {"format": "pt"})
    with pytest.raises(ValueError, match=r"1 of the weights of CLIPTextModelWithProjection are missing"):
        load_folder("text_encoder", tmp_path, torch.float32, None, of_prior=True)


def test_a_trainers_text_encoder_that_is_not_whole(tmp_path):
    from types import SimpleNamespace

    from transformers import CLIPTextModelWithProjection

    from stable_cascade.factory.networks import from_source

    PARTS["text_encoder"].save_pretrained(tmp_path)
    config = SimpleNamespace(clip_text_model_name=str(tmp_path), pretrained_model_name_or_path=None)
    whole = from_source(config, "text_encoder", CLIPTextModelWithProjection)
    assert whole.state_dict().keys() == PARTS["text_encoder"].state_dict().keys()
    path = tmp_path / "model.safetensors"
    save_file(
        {key: value for key, value in load_file(path).items() if "projection" not in key}, path, {"format": "pt"}
    )
    with pytest.raises(ValueError, match=r"weights of CLIPTextModelWithProjection are missing in .*text_projection"):
        from_source(config, "text_encoder", CLIPTextModelWithProjection)
