"""The state of a run: the objects that train, what is saved of them and how it is taken up again."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stable_cascade.compilation import as_written, compile_blocks
from stable_cascade.config import TrainingSettings
from stable_cascade.training import checkpoints, processes, run_folders, tracking
from stable_cascade.training.float8 import prepare_float8
from stable_cascade.training.optimizers import MovingAverage, averaged, build_optimizer, parameter_groups, trainable
from stable_cascade.training.processes import broadcast, gathered
from stable_cascade.training.publishing import publish_run
from stable_cascade.training.run_folders import begin_folder, cleared_if_full, write_folder
from stable_cascade.training.tracking import LossByNoiseLevel

DATA_STATE = "data"
"""The name in a checkpoint of where the processes stand in a stream."""

SaveFunction = Callable[[Path, nn.Module, "dict[str, Tensor] | None"], Any]
PreviewFunction = Callable[[Path, nn.Module, int, "dict[str, Tensor] | None"], "Sequence[Path] | None"]


@dataclass(frozen=True)
class TrainResult:
    """How a run ended."""

    step: int
    samples_seen: int
    finished: bool
    loss: float | None
    checkpoint: Path | None
    export: Path | None
    broken: int


@dataclass
class Figures:
    """What one step computed on this process; tensors stay on the device until somebody reads them."""

    step: int
    losses: Tensor
    keys: list[str]
    broken: int
    noise_levels: Tensor | None
    unweighted: Tensor | None
    status: Tensor | None = None
    read_status: Callable[[], list[float]] | None = None


@dataclass(frozen=True)
class Whole:
    """The model in one piece, on the main process; of a sharded one a copy in main memory."""

    model: nn.Module
    ema: dict[str, Tensor] | None


def reads_late(config: TrainingSettings, device: torch.device) -> bool:
    """Whether the host may ask one step later whether a step was good.

    It needs an optimizer that leaves the weights alone on the device's own word, which the fused AdamW does.
    """
    return device.type == "cuda" and config.optimizer == "adamw"


class Run:
    """The state of one call of `train`: what a checkpoint holds, and the objects that carry it."""

    def __init__(
        self,
        config: TrainingSettings,
        accelerator: Any,
        model: nn.Module,
        stateful: dict[str, Any],
        save_fn: SaveFunction,
        preview_fn: PreviewFunction,
        learning_rate: Callable[[str], float] | None = None,
        data: Mapping[str, Any] | None = None,
    ):
        tracking.check_launch(config, accelerator)
        if not trainable(model):
            raise ValueError("no parameter of the model requires gradients, so there is nothing to train")
        if accelerator.device.type == "cpu":
            torch.set_flush_denormal(True)  # denormal numbers cost tens of times the time of ordinary ones
        self.config, self.accelerator, self.stateful = config, accelerator, stateful
        self.save_fn, self.preview_fn, self.data = save_fn, preview_fn, data
        model.train()
        self.network = model
        self.sharded = processes.is_sharded(accelerator)
        self.blueprint: nn.Module | None = None
        if self.sharded:
            processes.refuse_unsupported(accelerator, model, config.optimizer)
            self.blueprint = processes.blueprint(model)
            processes.keep_precision(accelerator, model)
        if config.float8:  # after adapters, before compilation
            prepare_float8(model, accelerator)
        if config.compile:  # after adapters and checkpointing, before wrappers, which then see the compiled blocks
            compile_blocks(model)
        self.plain_optimizer: Any = build_optimizer(config, parameter_groups(trainable(model), learning_rate))
        self.model, self.optimizer = accelerator.prepare(model, self.plain_optimizer)
        self.trained = self.model if self.sharded else model
        self.reads_late = not self.sharded and reads_late(config, accelerator.device)
        self.ema: MovingAverage | None = None
        if config.ema_beta is not None:
            self.ema = MovingAverage(
                self.trained, beta=config.ema_beta, start=config.ema_start_iters or 0, every=config.ema_iters or 1,
                offload=config.ema_offload,
            )  # fmt: skip
        self.step = self.samples_seen = self.broken = 0
        self.rate = 0.0
        self.loss: float | None = None
        self.tracker_run = os.urandom(6).hex()
        self.checkpoint: Path | None = None
        self.window: list[Tensor] = []
        self.noise_levels = LossByNoiseLevel()
        self.data_state: Any = None  # as the last checkpoint has it
        self.after: Any = None  # of this process, after the last micro-batch
        self.images = tracking.image_folder(config)
        self.folder = run_folders.run_folder(config)

    def restore(self) -> None:
        """Take up the checkpoint that the config means, if there is one."""
        # The main process tidies up and looks for checkpoints; all processes take its list.
        found: list[Path] = []
        if self.accelerator.is_main_process:
            if self.folder.exists():
                run_folders.sweep(self.folder)
            if self.config.resume == "never" and (aside := run_folders.set_aside(self.folder)):
                self.accelerator.print(f"resume: never: the checkpoints of an earlier run are now in {aside}")
            found = checkpoints.find_checkpoints(self.config)
        found = broadcast(self.accelerator, found)
        # The newest that is undamaged.
        for folder in found:
            try:
                self._load(folder)
                break
            except checkpoints.DamagedError as error:
                if folder == found[-1]:
                    raise
                self.accelerator.print(f"passed over: {error}")
        self.progress = tracking.Progress(self.config, self.step, shown=self.accelerator.is_main_process)
        if self.accelerator.is_main_process:
            self.log_file = tracking.LogFile(self.images, self.step)

    def _load(self, folder: Path) -> None:
        """Put the contents of a checkpoint in place."""
        # Weights, optimizer and average: in parts under FSDP, otherwise whole.
        contents = self._read(folder)
        if contents.weights is None:
            processes.read_parts(folder / checkpoints.PARTS, self._parts())
        else:
            expected = self._changing()
            if set(contents.weights) != expected:
                odd = sorted(set(contents.weights) ^ expected)[0]
                raise ValueError(f"checkpoint {folder} and the model differ in '{odd}'; resume with the same settings")
            self.network.load_state_dict(contents.weights, strict=False)
            self.optimizer.load_state_dict(contents.optimizer["optimizer"])
            if self.ema is not None and contents.ema is not None:
                self.ema.load_state_dict(contents.ema)
        # What else keeps state.
        if self.accelerator.scaler is not None and contents.optimizer["scaler"] is not None:
            self.accelerator.scaler.load_state_dict(contents.optimizer["scaler"])
        for name, thing in self.stateful.items():
            if name not in contents.stateful:
                raise ValueError(f"checkpoint {folder} has no state of '{name}'; resume with the same settings")
            thing.load_state_dict(contents.stateful[name])
        self.data_state = contents.stateful.get(DATA_STATE)
        # The counters.
        self.step, self.samples_seen, self.checkpoint = contents.step, contents.samples_seen, folder
        self.tracker_run = contents.tracker_run
        self.accelerator.print(f"{self.config.experiment_id}: resuming after step {self.step} from {folder}")

    def _read(self, folder: Path) -> checkpoints.RunContents:
        """A checkpoint's contents; an error that one process finds is an error on all."""
        accelerator, error = self.accelerator, None
        share = (accelerator.process_index, accelerator.num_processes)
        try:
            contents = checkpoints.read_checkpoint(folder, self.config, share, self.data)
        except ValueError as found:
            error = (str(found), isinstance(found, checkpoints.DamagedError))
        for message, damaged in filter(None, gathered(accelerator, error)):
            raise checkpoints.DamagedError(message) if damaged else ValueError(message)
        return contents

    def _parts(self) -> processes.Parts:
        """What the processes of a sharded run save and restore together."""
        assert self.blueprint is not None
        trained = frozenset(trainable(self.blueprint))
        return processes.Parts(self.model, self.plain_optimizer, self.ema, frozenset(self._changing()), trained)

    def _changing(self) -> set[str]:
        """Names of what training changes in the model: parameters that train, and buffers (running statistics)."""
        model = self.blueprint if self.blueprint is not None else self.network
        frozen = {name for name, parameter in model.named_parameters() if not parameter.requires_grad}
        return set(model.state_dict()) - frozen

    @property
    def backup_due(self) -> bool:
        """Whether this step's checkpoint is also kept as a backup."""
        return bool(self.config.backup_every) and self.step % (self.config.backup_every or 1) == 0

    def count(self, figures: Figures) -> None:
        """Account for a step that was done."""
        self.samples_seen += self.config.batch_size
        self.broken += figures.broken
        assert figures.status is not None
        self.window.append(figures.status[0])
        if figures.noise_levels is not None and figures.unweighted is not None:
            self.noise_levels.add(figures.noise_levels, figures.unweighted)
        self.progress.advance()

    def log(self, due: bool) -> None:
        """Every `log_every` steps, and when it is due anyhow, read the losses since the last time and tell them."""
        if self.step % self.config.log_every and not due:
            return
        losses, self.window = torch.stack(self.window), []
        by_noise = self.noise_levels.read(self.accelerator)
        if not self.accelerator.is_main_process:
            return
        self.loss = losses.mean().item() / self.accelerator.num_processes
        speed = self.progress.speed(self.step)
        self.progress.show(loss=self.loss, lr=self.rate, speed=speed)
        figures = {
            "loss": self.loss, "lr": self.rate, "samples_per_second": speed, "samples_seen": self.samples_seen,
            "broken": self.broken, **by_noise,
        }  # fmt: skip
        self.log_file.write({"step": self.step, **figures})
        self.accelerator.log(tracking.flat(figures), step=self.step)

    def gather(self) -> Whole:
        """The model and its moving average in one piece; with a sharded model every process must take part."""
        if self.blueprint is None:
            return Whole(self.network, self.ema.state_dict() if self.ema is not None else None)
        weights = processes.gather_weights(self.model)
        ema = None
        if self.ema is not None:
            with averaged(self.trained, self.ema):
                ema = processes.gather_weights(self.model)
        if not self.accelerator.is_main_process:
            return Whole(self.network, None)
        names = set(trainable(self.blueprint))
        ema = {name: weight.float() for name, weight in ema.items() if name in names} if ema is not None else None
        return Whole(processes.build(self.blueprint, weights), ema)

    def save(self, whole: Whole) -> None:
        """Write the checkpoint of this step, back it up when due, delete the oldest."""
        target = run_folders.step_folder(self.folder, self.step)
        if self.after is not None:  # where every process stands in a stream
            self.data_state = gathered(self.accelerator, self.after.plain())
        begun, checksums = self._write_parts(target) if self.sharded else (None, None)
        if self.accelerator.is_main_process:
            contents, export = self._contents(), functools.partial(self._export, whole)
            checkpoints.write_checkpoint(target, contents, self.config, export, begun=begun, checksums=checksums)
            if self.backup_due:
                checkpoints.keep_backup(target)
            run_folders.rotate(self.folder, self.config.checkpoints_total_limit, target)
        self.checkpoint = target
        self.accelerator.wait_for_everyone()

    def _contents(self) -> checkpoints.RunContents:
        """What the main process writes of a checkpoint."""
        scaler, sharded, changing = self.accelerator.scaler, self.sharded, self._changing()
        return checkpoints.RunContents(
            step=self.step,
            samples_seen=self.samples_seen,
            tracker_run=self.tracker_run,
            weights=None if sharded else {n: w for n, w in self.network.state_dict().items() if n in changing},
            optimizer={
                "optimizer": None if sharded else self.optimizer.state_dict(),
                "scaler": scaler.state_dict() if scaler else None,
            },
            stateful={name: thing.state_dict() for name, thing in self.stateful.items()}
            | ({DATA_STATE: self.data_state} if self.data_state else {}),
            ema=self.ema.state_dict() if self.ema is not None and not sharded else None,
            data=self.data,
        )

    def _write_parts(self, target: Path) -> tuple[Path, dict[str, list[int]]]:
        """Let every process write its part of a checkpoint; the folder it is begun in, and the parts' checksums."""
        begun = broadcast(self.accelerator, begin_folder(target) if self.accelerator.is_main_process else None)
        with cleared_if_full(begun, target):
            return begun, processes.write_together(self.accelerator, begun / checkpoints.PARTS, self._parts())

    def _export(self, whole: Whole, folder: Path) -> None:
        """Write the model in its own format."""
        self.save_fn(folder, whole.model, whole.ema)

    def preview(self, whole: Whole) -> None:
        """Draw the preview sheets, with the networks in evaluation mode and back in training mode after it."""
        if self.accelerator.is_main_process:
            self.images.mkdir(parents=True, exist_ok=True)
            whole.model.to(self.accelerator.device).eval()
            # A sheet is too few steps for graphs of its own, those of evaluation, to pay.
            plain = as_written() if self.config.compile else contextlib.nullcontext()
            with torch.no_grad(), torch.random.fork_rng(), plain:
                drawn = self.preview_fn(self.images, whole.model, self.step, whole.ema)
            whole.model.train()
            shown = [*(Path(path) for path in drawn or ()), *tracking.draw_noise_levels(self.log_file)]
            tracking.log_images(self.accelerator, shown, self.step)
        self.accelerator.wait_for_everyone()

    def finish(self) -> TrainResult:
        """Write the final export, and say how the run ended."""
        final, whole = self.folder / "final", self.gather()
        if self.accelerator.is_main_process:
            write_folder(final, functools.partial(self._export, whole), keep_others=True)
            if self.config.push_to_hub:
                self.accelerator.print(publish_run(self.config, final))
        self.accelerator.wait_for_everyone()
        return TrainResult(self.step, self.samples_seen, True, self.loss, self.checkpoint, final, self.broken)

    def interrupted(self) -> TrainResult:
        """How a run ended that a signal stopped; its checkpoint is written already."""
        self.accelerator.print(f"stopped after step {self.step}; the same command resumes from {self.checkpoint}")
        return TrainResult(self.step, self.samples_seen, False, self.loss, self.checkpoint, None, self.broken)
