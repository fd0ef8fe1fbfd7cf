"""The guide's configs as files: its keys and values, networks of the real sizes, and a small twin that trains."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from diffusers import StableCascadeUNet

from stable_cascade import factory
from stable_cascade.config import load_config
from stable_cascade.files.presets import preset
from stable_cascade.trainers.check import plan_training
from tests.test_config import GUIDE
from tests.test_presets import PARAMETERS, UNET_PARAMETERS
from tests.trainer_runs import ROOT, tensors, trainer_main

CONFIGS = ROOT / "examples/configs"
TRAININGS = [name.split("/")[1] for name in GUIDE if name.startswith("training/")]
SCRIPTS = {
    "LoraConfig": "lora",
    "TextToImageConfig": "text_to_image",
    "ControlNetConfig": "controlnet",
    "DecoderConfig": "decoder",
}
CONTROLS = {"canny": "canny", "identity": "identity", "inpainting": "inpainting", "sr": "super_resolution"}


def guide(name):
    return GUIDE[f"training/{name}"]


@pytest.fixture
def released_files(tmp_path, monkeypatch):
    """A folder with files of the names that the guide's configs give, whose contents nobody reads here."""
    (tmp_path / "models").mkdir()
    names = ("effnet_encoder", "previewer", "stage_a", "stage_b_bf16", "stage_b_lite_bf16")
    for name in (*names, "stage_c_bf16", "stage_c_lite_bf16"):
        (tmp_path / f"models/{name}.safetensors").touch()
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("name", TRAININGS)
def test_file_holds_the_guide_s_keys_and_values(name):
    cls, values = guide(name)
    assert yaml.safe_load((CONFIGS / f"{name}.yaml").read_text()) == values | {"lr": 1e-4}
    config = load_config(cls, ["--config", str(CONFIGS / f"{name}.yaml")])
    assert {key: getattr(config, key) for key in values} == values


@pytest.mark.parametrize("name", TRAININGS)
def test_networks_have_the_released_shapes(name, released_files):
    cls, _ = guide(name)
    config = load_config(cls, ["--config", str(CONFIGS / f"{name}.yaml")])
    component = "decoder" if cls.__name__ == "DecoderConfig" else "prior"
    network = factory.network_on_meta(config, component)
    with torch.device("meta"):
        theirs = StableCascadeUNet(**preset(component, config.model_version))
    shapes = {key: tuple(value.shape) for key, value in network.state_dict().items()}
    assert shapes == {key: tuple(value.shape) for key, value in theirs.state_dict().items()}
    assert sum(p.numel() for p in network.parameters()) == UNET_PARAMETERS[component, config.model_version]
    for other in ("semantic_encoder", "vqgan" if component == "decoder" else "previewer"):
        kind = other
        assert (
            sum(p.numel() for p in factory.network_on_meta(config, other).parameters())
            == PARAMETERS[kind, "released"][0]
        )
    if cls.__name__ == "ControlNetConfig":
        control = factory.controlnet_on_meta(config, network, factory.control_filter(config))
        assert (
            sum(p.numel() for p in control.parameters()) == PARAMETERS["controlnet", CONTROLS[name.split("_")[-1]]][0]
        )
    if cls.__name__ == "LoraConfig":
        layers = factory.add_config_lora(config, network)
        trained = {key: value for key, value in network.named_parameters() if value.requires_grad}
        assert len(layers) == 4 * 2 * (8 + 24)
        assert all(".attention.to_" in layer for layer in layers)
        assert all(4 in value.shape for value in trained.values())


@pytest.mark.parametrize("name", ["finetune_c_3b", "finetune_b_3b", "controlnet_c_3b_canny"])
def test_sharding_is_told_by_check_and_asked_for_by_a_launch(name, released_files):
    """What is missing here (CLIP, the images) is told as well; nothing is read from a network."""
    cls, values = guide(name)
    assert values["use_fsdp"]
    path = str(CONFIGS / f"{name}.yaml")
    plan = plan_training(load_config(cls, ["--config", path, "--check"]), trains="x", needs=["semantic_encoder"])
    assert "accelerate launch --config_file accelerate_configs/fsdp.yaml" in plan.text


def test_sharded_config_started_without_sharding_names_the_launch(tmp_path):
    config = CONFIGS / "finetune_c_3b_embedded.yaml"
    done = subprocess.run(
        [sys.executable, "examples/train_text_to_image.py", "--config", str(config), "--use_fsdp", "True",
         "--checkpoint_path", str(tmp_path), "--output_path", str(tmp_path)],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 2
    assert "accelerate launch --config_file accelerate_configs/fsdp.yaml" in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", TRAININGS)
def test_twin_at_embedded_size_trains(name, tmp_path, monkeypatch):
    cls, values = guide(name)
    twin = yaml.safe_load((CONFIGS / f"{name}_embedded.yaml").read_text())
    own = {"webdataset_path", "image_size", "batch_size", "updates", "save_every", "use_fsdp", "experiment_id",
           "checkpoint_path", "output_path", "pretrained_model_name_or_path", "controlnet_blocks", "train_tokens",
           "controlnet_filter_params"}  # fmt: skip
    assert {key: value for key, value in twin.items() if key not in own}.items() <= values.items()
    monkeypatch.chdir(ROOT)
    folders = ["--checkpoint_path", str(tmp_path / "runs"), "--output_path", str(tmp_path / "out")]
    small = ["--updates", "2", "--num_preview_images", "1", "--preview_steps", "2", "--preview_decoder_steps", "1"]
    config = ["--config", str(CONFIGS / f"{name}_embedded.yaml")]
    trainer_main(SCRIPTS[cls.__name__])([*config, *folders, *small])
    final = tmp_path / "runs" / twin["experiment_id"] / "final"
    assert all(value.isfinite().all() for value in tensors(final).values())
    assert list(Path(tmp_path / "out").rglob("step-00000002.png"))
