"""On a GPU: the memory that a training took, against its estimate."""

from __future__ import annotations

import pytest
import torch

from stable_cascade.config import LoraConfig, load_config
from stable_cascade.estimate import estimate
from tests.trainer_runs import settings, train, write_cascade, write_config, write_pictures

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.parametrize("checkpointed", [False, True, "selective"])
@pytest.mark.parametrize("quantization", ["none", "int4"])
def test_lora_takes_what_is_estimated(tmp_path, checkpointed, quantization):
    """A newly initialised 1B prior beside the tiny cascade's encoders, which the cache leaves out."""
    from stable_cascade import StableCascadePrior
    from stable_cascade.models.presets import PRESETS

    cascade = write_cascade(tmp_path / "cascade")
    write_pictures(cascade / "pictures.tar")
    sizes = {"clip_text_in_channels": 32, "clip_text_pooled_in_channels": 32, "clip_image_in_channels": 24}
    with torch.device("cuda"):
        prior = StableCascadePrior(**PRESETS["prior"]["1B"] | sizes)
    prior.to(torch.bfloat16).save_pretrained(cascade / "prior")
    del prior
    torch.cuda.empty_cache()
    changes = {
        "train_tokens": None, "cache": True, "num_preview_images": 0, "image_size": 192, "multi_aspect_ratio": None,
        "dtype": "bfloat16", "gradient_checkpointing": checkpointed, "quantization": quantization, "updates": 3,
        "max_grad_norm": 1.0,
    }  # fmt: skip
    config = write_config(tmp_path / "estimate.yaml", settings("lora", tmp_path, cascade, **changes))
    expected = estimate(load_config(LoraConfig, [str(config)]), "lora", mixed_precision="no").allocated
    train("lora", tmp_path, cascade, **{**changes, "updates": 1})  # fills the cache
    torch.cuda.reset_peak_memory_stats()
    train("lora", tmp_path, cascade, experiment_id="measured", cache_dir=str(tmp_path / "runs/cache"), **changes)
    measured = torch.cuda.max_memory_allocated()
    assert abs(expected / measured - 1) < 0.15
