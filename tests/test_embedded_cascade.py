"""The embedded cascade is there, small, and draws what it is asked for; `evaluate.py` measures it in full."""

import sys
from pathlib import Path

import pytest
import torch

from stable_cascade import StableCascadePipeline, StableCascadeReconstructionPipeline
from stable_cascade.embedded import embedded_path
from stable_cascade.objectives.vqgan import psnr

EMBEDDED = Path(__file__).resolve().parents[1] / "examples" / "embedded"
sys.path.insert(0, str(EMBEDDED))
from measures import distances, ranks, read_mosaic, shrink  # noqa: E402


def seeds(count: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed) for seed in range(count)]


def test_fits_into_25_mb_of_safetensors():
    files = [file for file in embedded_path().rglob("*") if file.is_file() and "__pycache__" not in file.parts]
    assert sum(file.stat().st_size for file in files) <= 25e6
    assert not [file for file in files if file.suffix in (".bin", ".pt", ".ckpt", ".pkl")]


def test_draws_its_captions():
    _, captions, targets = read_mosaic(EMBEDDED / "captions_100.webp", side=32)
    chosen = list(range(0, 100, 10))
    pipeline = StableCascadePipeline.from_pretrained(embedded_path(), torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline([captions[i] for i in chosen], generator=seeds(10), output_type="pt").images
    place = ranks(distances(shrink(images), shrink(targets)), torch.tensor(chosen))
    assert (place < 5).float().mean() >= 0.8


def test_rebuilds_images_it_never_saw():
    _, _, images = read_mosaic(EMBEDDED / "held_out_200.webp", side=64)
    pipeline = StableCascadeReconstructionPipeline.from_pretrained(embedded_path(), torch_dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    rebuilt = pipeline(images[::20], generator=seeds(10), output_type="pt").images
    assert psnr(rebuilt, images[::20]).mean() >= 17


def test_says_what_is_missing(monkeypatch):
    monkeypatch.setattr("stable_cascade.embedded.REQUIRED", ("model_index.json", "no_such/config.json"))
    with pytest.raises(ValueError, match=r"lacks no_such/config\.json; reinstall"):
        embedded_path()
