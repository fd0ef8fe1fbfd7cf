"""A training of a tiny network through the real loop, for the tests; also a program, to be killed and launched twice.

python tests/toy_run.py --key value ...    TOY_PAUSE=seconds per step, TOY_BAD=key of a sample whose loss is NaN,
TOY_FAULT=PROCESS:STEP:raise|stuck|kill, what happens to a process when it loads that step
"""

from __future__ import annotations

import atexit
import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import nn

from stable_cascade.config import TrainingSettings, load_config, run_main
from stable_cascade.data import Batch
from stable_cascade.diffusion.weighting import AdaptiveLossWeight
from stable_cascade.training import TrainResult, make_accelerator, train

SIDE = 8


class Toy(nn.Module):
    """A frozen layer, two that train, dropout between them."""

    def __init__(self, dropout: float = 0.1):
        super().__init__()
        self.frozen = nn.Linear(SIDE, 16)
        self.inner = nn.Linear(16, 16)
        self.dropout = nn.Dropout(dropout)
        self.outer = nn.Linear(16, SIDE)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
        self.frozen.requires_grad_(False)

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        self.inputs = rows.dtype
        return self.outer(self.dropout(torch.nn.functional.gelu(self.inner(self.frozen(rows)))))


def sample(seed: int, position: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed * 1_000_003 + position)
    return torch.randn(SIDE, generator=generator)


def toy_batches(config: TrainingSettings, processes: int = 1, process: int = 0):
    """The micro-batches of one process, laid out as the data loader lays them out."""
    size = config.batch_size // (processes * config.grad_accum_steps)
    pause = float(os.environ.get("TOY_PAUSE", 0))

    def from_step(start: int) -> Iterator[Batch]:
        step = start
        while True:
            time.sleep(pause)
            if pause:
                Path(config.output_path, f"began-{step}").touch()
            suffer(process, step)
            for part in range(config.grad_accum_steps):
                first = step * config.batch_size + (part * processes + process) * size
                positions = range(first, first + size)
                rows = torch.stack([sample(config.seed, position) for position in positions])
                keys = [f"toy.tar/{position:04d}" for position in positions]
                yield Batch(rows, [""] * size, keys, torch.tensor(positions), torch.tensor(positions))
            step += 1

    return from_step


def suffer(process: int, step: int) -> None:
    """The fault that the environment asks for, if it is meant here."""
    where, _, what = os.environ.get("TOY_FAULT", "").rpartition(":")
    if where == f"{process}:{step}":
        if what == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if what == "stuck":
            atexit.register(time.sleep, 90)
        raise OSError(f"shard of step {step + 1} is gone")


def toy_loss(weight: AdaptiveLossWeight, bad: str = ""):
    def loss_fn(model: nn.Module, batch: Batch) -> dict[str, torch.Tensor]:
        unweighted = (model(batch.pixels) - batch.pixels.flip(-1)).square().mean(1)
        if bad in batch.keys:
            unweighted = unweighted * torch.where(
                torch.arange(len(batch.keys)) == batch.keys.index(bad), torch.nan, 1.0
            )
        log_snr = batch.pixels[:, 0] * 4
        return {"loss": unweighted * weight(log_snr), "unweighted": unweighted, "log_snr": log_snr}

    return loss_fn


def in_order(config: TrainingSettings, log_snr: torch.Tensor) -> bool:
    """Whether these are the noise levels of one whole global batch, in sample order."""
    positions = range(config.updates * config.batch_size)
    place = {sample(config.seed, position)[0].item() * 4: position for position in positions}
    found = [place[value] for value in log_snr.tolist()]
    return found == list(range(found[0], found[0] + config.batch_size))


def save_toy(folder: Path, model: nn.Module, ema: dict[str, torch.Tensor] | None) -> None:
    torch.save({"own": model.state_dict(), "ema": ema or {}}, folder / "toy.pt")


def saved(folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    return torch.load(folder / "toy.pt", weights_only=True)


def toy_arguments(folder: Path, **changes) -> list[str]:
    values = {
        "experiment_id": "toy", "checkpoint_path": folder / "runs", "output_path": folder, "updates": 12,
        "batch_size": 8, "grad_accum_steps": 2, "lr": 0.01, "warmup_updates": 3, "save_every": 4, "log_every": 2,
        "ema_beta": 0.9, "ema_start_iters": 2, "ema_iters": 2, "lr_scheduler": "cosine",
    }  # fmt: skip
    return [f"--{key}={value}" for key, value in {**values, **changes}.items()]


def toy_config(folder: Path, **changes) -> TrainingSettings:
    return load_config(TrainingSettings, toy_arguments(folder, **changes))


def toy_train(config: TrainingSettings, model: nn.Module | None = None, bad: str = "", **functions) -> TrainResult:
    accelerator = make_accelerator(config)
    weight = AdaptiveLossWeight()

    def after_step(log_snr: torch.Tensor, unweighted: torch.Tensor) -> None:
        assert in_order(config, log_snr)
        weight.update(log_snr, unweighted)

    return train(
        config,
        accelerator,
        model=Toy() if model is None else model,
        batches=toy_batches(config, accelerator.num_processes, accelerator.process_index),
        **{
            "loss_fn": toy_loss(weight, bad),
            "save_fn": save_toy,
            "preview_fn": lambda *_: [],
            "stateful": {"weight": weight},
            "after_step": after_step,
            **functions,
        },
    )


def main() -> None:
    config = load_config(TrainingSettings)
    model = Toy(dropout=float(os.environ.get("TOY_DROPOUT", 0.1)))
    result = toy_train(config, model, bad=os.environ.get("TOY_BAD", ""))
    accelerator = make_accelerator(config)
    accelerator.print(f"processes={accelerator.num_processes} finished={result.finished} step={result.step}")
    accelerator.print(f"inputs={model.inputs}")


if __name__ == "__main__":
    run_main(main)
