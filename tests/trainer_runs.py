"""Folders, shards and configs for the trainers' tests; also a program: python tests/trainer_runs.py NAME CONFIG ..."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from typing import Any

import yaml

from stable_cascade import StableCascadePipeline
from tests.making_shards import image, write_tar
from tests.tiny_cascade import MULTIPLE, WORDS, tiny_decoder, tiny_parts, tiny_prior

ROOT = Path(__file__).parent.parent
SIZES = ((48, 40), (30, 60), (64, 64), (70, 35), (40, 48), (33, 90))
ROUNDED = {"adam_epsilon": 0.1, "max_grad_norm": 1e9, "lr": 0.03}
"""Keys' biases have the gradient zero but for rounding, which Adam with a small epsilon would blow up to a step's
size; with this one, and without clipping, a step also shows a gradient that is right but for its scale."""
LORA, TOKENS = "pytorch_lora_weights.safetensors", "learned_embeds.safetensors"


def write_cascade(folder: Path, dropout: float = 0.1) -> Path:
    """A tiny cascade in diffusers layout; only the networks that train have dropout."""
    parts = tiny_parts()
    parts["prior"], parts["decoder"] = tiny_prior(dropout=dropout), tiny_decoder(dropout=dropout)
    StableCascadePipeline(**parts, resolution_multiple=MULTIPLE).save_pretrained(folder)
    return folder


def write_images(path: Path, count: int = 12) -> Path:
    """A shard of images of many shapes whose captions use a token that is learned."""
    members: dict[str, Any] = {}
    for number in range(count):
        members[f"{number:03}.png"] = image(*SIZES[number % len(SIZES)], seed=number)
        members[f"{number:03}.txt"] = f"a [fox] photo of {WORDS[number % 3]}"
        members[f"{number:03}.json"] = {"score": number}
    return write_tar(path, members)


def settings(trainer: str, folder: Path, cascade: Path, **changes: Any) -> dict[str, Any]:
    """A config of 6 steps of the trainer; `None` takes a key out."""
    values: dict[str, Any] = {
        "experiment_id": "run", "checkpoint_path": str(folder / "runs"), "output_path": str(folder / "out"),
        "pretrained_model_name_or_path": str(cascade), "webdataset_path": str(cascade / "images.tar"),
        "image_size": 32, "batch_size": 4, "grad_accum_steps": 2, "updates": 6, "lr": 1e-3, "warmup_updates": 3,
        "save_every": 100, "log_every": 1, "num_preview_images": 1, "preview_steps": 1, "preview_decoder_steps": 1,
        "multi_aspect_ratio": ["1/1", "1/2"], "max_grad_norm": 0.01,
    }  # fmt: skip
    if trainer == "lora":
        values |= {"rank": 2, "train_tokens": [["[fox]", "^dog</w>"], ["^snail", None]]}
    if trainer == "controlnet":
        values |= {"controlnet_blocks": [0, 1, 3], "controlnet_filter": "CannyFilter",
                   "controlnet_filter_params": {"resize": 32}}  # fmt: skip
    return {key: value for key, value in (values | changes).items() if value is not None}


def write_config(path: Path, values: dict[str, Any]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(values))
    return path


def trainer_main(name: str) -> Any:
    """`main` of examples/train_NAME.py, or of examples/NAME.py."""
    if str(ROOT / "examples") not in sys.path:
        sys.path.insert(0, str(ROOT / "examples"))
    script = f"train_{name}" if (ROOT / f"examples/train_{name}.py").exists() else name
    return importlib.import_module(script).main


def train(trainer: str, folder: Path, cascade: Path, *, script: str = "", **changes: Any) -> Path:
    """Runs a trainer's `main` on its config; the folder of its final export."""
    values = settings(trainer, folder, cascade, **changes)
    config = write_config(folder / f"{values['experiment_id']}.yaml", values)
    trainer_main(script or trainer)(["--config", str(config)])
    return folder / "runs" / values["experiment_id"] / "final"


def tensors(folder: Path) -> dict[str, Any]:
    """Every tensor of every weights file in a folder."""
    from safetensors.torch import load_file

    files = sorted(folder.rglob("*.safetensors"))
    return {f"{file.name}:{key}": value for file in files for key, value in load_file(file).items()}


def assert_same(one: Path, other: Path, tolerance: float = 0.0) -> None:
    """The same weights files in two folders, to the bit or within a tolerance."""
    import torch

    first, second = (tensors(folder) for folder in (one, other))
    assert first
    assert first.keys() == second.keys()
    for name, value in first.items():
        if tolerance:
            assert (value - second[name]).abs().max() <= tolerance, name
        else:
            assert torch.equal(value, second[name]), name


def main(arguments: list[str]) -> None:
    """Trains one config after the other in this process: start-up is most of the time of a tiny training."""
    from accelerate.state import AcceleratorState, PartialState

    leave = PartialState.destroy_process_group
    PartialState.destroy_process_group = lambda state, group=None: None  # processes do not always meet a second time
    for name, config in zip(arguments[::2], arguments[1::2], strict=True):
        trainer_main(name)(["--config", config])
        AcceleratorState._reset_state()
    leave(PartialState())


if __name__ == "__main__":
    main(sys.argv[1:])
