"""Sharded training (FSDP 2) through accelerate on two CPU processes: the numbers of one process, resumed exactly."""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors import safe_open

from stable_cascade.training import processes
from tests.toy_run import Toy, saved, toy_arguments, toy_config, toy_train
from tests.trainer_runs import settings, tensors, train, write_cascade, write_config, write_images
from tests.two_processes import ROOT, launch_sharded

LINEAR = ("--fsdp_transformer_layer_cls_to_wrap", "Linear")
"""The toy has none of the blocks that fsdp2.yaml names."""


def toy_sharded(folder: Path, *, precision: str = "no", **changes) -> str:
    """What the toy, sharded over two processes, printed."""
    done = launch_sharded(
        ROOT / "tests/toy_run.py", *toy_arguments(folder, use_fsdp=True, **changes),
        options=(*LINEAR, "--mixed_precision", precision), TOY_DROPOUT="0",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert "processes=2" in done.stdout
    return done.stdout


def farthest(one: dict, other: dict) -> float:
    return max((other[kind][name] - weight).abs().max().item() for kind in one for name, weight in one[kind].items())


def test_sharded_toy_equals_one_process_and_resumes_to_the_same_bits(tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    toy_sharded(whole)
    one = saved(toy_train(toy_config(tmp_path / "one"), Toy(dropout=0.0)).export)
    assert farthest(one, saved(whole / "runs/toy/final")) <= 1e-5

    checkpoint = whole / "runs/toy/step-00000008"
    kept = json.loads((checkpoint / "run.json").read_text())["files"]
    files = sorted(path for path in (checkpoint / "parts").iterdir())
    assert len(files) == 2
    assert {f"parts/{path.name}" for path in files} <= set(kept)
    elements = 0
    for path in files:
        with safe_open(path, "pt") as file:
            names = [name for name in file.keys() if name.startswith("weights/")]
            elements += sum(file.get_tensor(name).numel() for name in names)
    assert elements == sum(p.numel() for p in Toy().parameters() if p.requires_grad)  # each once, nothing frozen

    toy_sharded(parts, resume=checkpoint)
    assert farthest(saved(whole / "runs/toy/final"), saved(parts / "runs/toy/final")) == 0


@pytest.mark.slow
def test_sharded_checkpoint_is_read_by_another_number_of_processes(tmp_path):
    """Four processes take up what two wrote; a damaged part is refused by all, whoever finds it."""
    toy_sharded(tmp_path)
    resume = tmp_path / "runs/toy/step-00000008"
    again = toy_arguments(tmp_path / "again", use_fsdp=True, resume=resume)
    options = (*LINEAR, "--num_processes", "4")
    done = launch_sharded(ROOT / "tests/toy_run.py", *again, options=options, TOY_DROPOUT="0")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "processes=4" in done.stdout
    assert farthest(saved(tmp_path / "runs/toy/final"), saved(tmp_path / "again/runs/toy/final")) <= 1e-5
    part = sorted((resume / "parts").iterdir())[1]
    part.write_bytes(part.read_bytes()[:-4])
    done = launch_sharded(ROOT / "tests/toy_run.py", *again, options=LINEAR, TOY_DROPOUT="0")
    assert done.returncode != 0
    assert re.search(r"error: checkpoint file .*parts/shard-.* is missing or damaged", done.stderr)


@pytest.mark.slow
def test_mixed_precision_keeps_inputs_and_sums_whole(tmp_path):
    """bfloat16 under FSDP: the network sees float32 inputs, and its results are those of one process in bfloat16."""
    told = toy_sharded(tmp_path, precision="bf16")
    assert "inputs=torch.float32" in told
    from tests.two_processes import launch_two

    done = launch_two(ROOT / "tests/toy_run.py", *toy_arguments(tmp_path / "plain"), TOY_DROPOUT="0",
                      ACCELERATE_MIXED_PRECISION="bf16")  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert farthest(saved(tmp_path / "plain/runs/toy/final"), saved(tmp_path / "runs/toy/final")) <= 2e-2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("trainer", "changes"),
    [
        ("lora", {"ema_beta": 0.5}),
        ("lora", {"dtype": "bfloat16"}),
        ("text_to_image", {"adaptive_loss_weight": True, "ema_beta": 0.5, "gradient_checkpointing": True}),
        ("controlnet", {"ema_beta": 0.5, "gradient_checkpointing": True}),
        ("text_to_image", {"gradient_checkpointing": "selective"}),
        ("decoder", {"adaptive_loss_weight": True, "ema_beta": 0.5}),
    ],
)
def test_sharded_trainer_equals_one_process_and_resumes_to_the_same_bits(tmp_path, trainer, changes):
    """Every training that may be sharded, as fsdp2.yaml wraps it; a LoRA also on a base of another number format."""
    cascade = write_cascade(tmp_path / "cascade", dropout=0.0)
    write_images(cascade / "images.tar")
    changes = {"adam_epsilon": 1e-5, "save_every": 3, **changes}

    def launch(name: str, **more) -> Path:
        values = settings(trainer, tmp_path, cascade, experiment_id=name, use_fsdp=True, **changes, **more)
        config = write_config(tmp_path / f"{name}.yaml", values)
        done = launch_sharded(ROOT / f"examples/train_{trainer}.py", "--config", str(config), timeout=600)
        assert done.returncode == 0, done.stderr[-3000:]
        assert "processes       2," in done.stdout
        return tmp_path / "runs" / name / "final"

    two = tensors(launch("two"))
    one = tensors(train(trainer, tmp_path, cascade, experiment_id="one", **changes))
    assert one.keys() == two.keys()
    rounding = 1e-4 if "dtype" in changes else 1e-5  # sums of bfloat16 depend on their order
    assert max((one[name] - two[name]).abs().max().item() for name in one) <= rounding
    again = tensors(launch("again", resume=str(tmp_path / "runs/two/step-00000003")))
    assert all(torch.equal(again[name], value) for name, value in two.items())


@pytest.mark.slow
def test_gradient_norm_of_a_sharded_model_is_that_of_the_whole(tmp_path):
    """Clipping at a small norm acts at every step, so equal weights after it mean equal norms."""
    toy_sharded(tmp_path / "two", max_grad_norm=0.01, updates=4, adam_epsilon=0.01)
    one = saved(
        toy_train(
            toy_config(tmp_path / "one", max_grad_norm=0.01, updates=4, adam_epsilon=0.01), Toy(dropout=0.0)
        ).export
    )
    loose = saved(toy_train(toy_config(tmp_path / "loose", updates=4, adam_epsilon=0.01), Toy(dropout=0.0)).export)
    assert farthest(one, saved(tmp_path / "two/runs/toy/final")) <= 1e-5
    assert farthest(one, loose) > 1e-3


def test_what_cannot_be_sharded_is_refused():
    one, two = SimpleNamespace(is_fsdp2=False), SimpleNamespace(is_fsdp2=True)
    model = Toy()
    processes.refuse_unsupported(one, model, "adamw")
    with pytest.raises(ValueError, match="adamw_8bit does not work on sharded weights; set optimizer: adamw"):
        processes.refuse_unsupported(two, model, "adamw_8bit")
    model.frozen.bfloat16()
    processes.refuse_unsupported(two, model, "adamw")
    with pytest.raises(
        ValueError, match=r"FSDP 1 cannot shard bfloat16 and float32 weights in one unit; launch .*fsdp2"
    ):
        processes.refuse_unsupported(one, model, "adamw")
    quantized = torch.nn.Parameter(torch.zeros(2, 2, dtype=torch.int8), requires_grad=False)
    model.frozen.weight = quantized
    with pytest.raises(ValueError, match=r"cannot shard the quantized weight 'frozen.weight'"):
        processes.refuse_unsupported(two, model, "adamw")
