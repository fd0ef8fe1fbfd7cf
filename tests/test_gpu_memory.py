"""On a GPU: the memory that a training took, against its estimate."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from stable_cascade.config import LoraConfig, load_config
from stable_cascade.estimate import estimate
from tests.trainer_runs import settings, train, write_cascade, write_config, write_images

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.mark.parametrize("checkpointed", [False, True, "selective"])
@pytest.mark.parametrize("quantization", ["none", "int4"])
def test_lora_takes_what_is_estimated(tmp_path, checkpointed, quantization):
    expected, measured = memory_of_lora(
        tmp_path, "1B", image_size=192, gradient_checkpointing=checkpointed, quantization=quantization
    )
    assert abs(expected / measured - 1) < 0.15


@pytest.mark.slow
@pytest.mark.parametrize("quantization", ["none", "int4"])
def test_lora_of_the_largest_prior_takes_what_is_estimated(tmp_path, quantization):
    """The settings of examples/configs/lora_one_gpu.yaml; `pytest -s` prints what docs/evidence.md quotes."""
    expected, measured = memory_of_lora(
        tmp_path, "3.6B", image_size=768, gradient_checkpointing=True, quantization=quantization,
        rank=4, module_filters=[".attn"], batch_size=1, grad_accum_steps=1,
    )  # fmt: skip
    print(f"{quantization}: {measured / 1e9:.2f} GB measured, {expected / 1e9:.2f} GB estimated")
    assert abs(expected / measured - 1) < 0.15


def memory_of_lora(folder: Path, size: str, **changes: Any) -> tuple[int, int]:
    """(estimated, measured) bytes of a LoRA run beside the tiny cascade's encoders, which the cache leaves out."""
    from stable_cascade import StableCascadePrior
    from stable_cascade.files.presets import PRESETS

    # A newly initialised prior of the released size, fitted to the tiny encoders.
    cascade = write_cascade(folder / "cascade")
    write_images(cascade / "images.tar")
    sizes = {"clip_text_in_channels": 32, "clip_text_pooled_in_channels": 32, "clip_image_in_channels": 24}
    with torch.device("cuda"):
        prior = StableCascadePrior(**PRESETS["prior"][size] | sizes)
    prior.to(torch.bfloat16).save_pretrained(cascade / "prior")
    del prior
    torch.cuda.empty_cache()
    changes = {
        "train_tokens": None, "cache": True, "num_preview_images": 0, "multi_aspect_ratio": None,
        "dtype": "bfloat16", "updates": 3, "max_grad_norm": 1.0, **changes,
    }  # fmt: skip
    config = write_config(folder / "estimate.yaml", settings("lora", folder, cascade, **changes))
    expected = estimate(load_config(LoraConfig, [str(config)]), "lora", mixed_precision="no").allocated
    # The first run fills the cache, the second is measured.
    train("lora", folder, cascade, **{**changes, "updates": 1})
    torch.cuda.reset_peak_memory_stats()
    train("lora", folder, cascade, experiment_id="measured", cache_dir=str(folder / "runs/cache"), **changes)
    return expected, torch.cuda.max_memory_allocated()
