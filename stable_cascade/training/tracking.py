"""What a run tells while it runs: the accelerator's trackers, a log file, the progress bar."""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import re
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from stable_cascade.config import TrainingSettings
from stable_cascade.redaction import redacted
from stable_cascade.training.noise_levels import MEANS, plot_spans, spans_of_log
from stable_cascade.training.publishing import check_upload
from stable_cascade.training.sharding import is_sharded
from stable_cascade.training.sheets import sheet_images

log = logging.getLogger(__name__)

LAUNCH_SHARDED = "launch with `--launch fsdp`, or with `accelerate launch --config_file accelerate_configs/fsdp.yaml`"
NO_DEVICE = (
    "the accelerate config asks for FSDP, which needs an accelerator such as a CUDA device, and this machine shows "
    "none; launch accelerate_configs/cpu.yaml or cpu_2proc.yaml here (`--launch cpu`)"
)
NO_DEEPSPEED = (
    "accelerate was asked for DeepSpeed, whose engine takes the steps itself, so that no bad step could be held back "
    "and no run resumed exactly; launch accelerate_configs/fsdp2.yaml, which shards the weights too"
)


def make_accelerator(config: TrainingSettings, **options: Any) -> Any:
    """An `accelerate.Accelerator` with the trackers that the config names.

    Processes, precision and sharding come from the accelerate config that the run is launched with.
    """
    from accelerate import Accelerator

    # Asked before accelerate is: it wants the package first, and with the CPU asked for too it runs plain processes.
    if _asked("ACCELERATE_USE_DEEPSPEED"):
        raise ValueError(NO_DEEPSPEED)
    names = trackers_of(config)
    try:
        return Accelerator(log_with=names or None, project_dir=str(image_folder(config)), **options)
    except RuntimeError as error:
        if "no available devices" not in str(error):
            raise
        raise ValueError(NO_DEVICE) from None


def _asked(variable: str) -> bool:
    """Whether the launch sets one of accelerate's switches."""
    return os.environ.get(variable, "").lower() in ("1", "true", "yes")


def trackers_of(config: TrainingSettings) -> list[str]:
    """The trackers that the config names, as accelerate calls them.

    Raises:
        ValueError: the package of one is not installed.
    """
    every = ["wandb", "tensorboard"]
    names = {"wandb": every[:1], "tensorboard": every[1:], "all": every}.get(config.tracker or "none", [])
    for name in names:
        if importlib.util.find_spec(name) is None:
            raise ValueError(
                f"tracker: {config.tracker} needs the package {name}, which is not installed: pip install {name}, or "
                "set tracker: null"
            )
    return names


def image_folder(config: TrainingSettings) -> Path:
    """The folder of the run's previews and logs."""
    return Path(config.output_path) / config.experiment_id


def check_launch(config: TrainingSettings, accelerator: Any) -> None:
    """Refuse a launch that contradicts the config.

    Raises:
        ValueError: `use_fsdp` and the accelerate config disagree, the processes do not know of each other or do not
            divide the batch, or `push_to_hub` could not upload anything in the end.
    """
    sharded = is_sharded(accelerator)
    if _asked("ACCELERATE_USE_FSDP") and not sharded:
        if accelerator.device.type == "cpu":
            raise ValueError(NO_DEVICE)
        raise ValueError(
            f"ACCELERATE_USE_FSDP is set, but accelerate runs {accelerator.distributed_type.value}; {LAUNCH_SHARDED}, "
            "or unset it"
        )
    started = int(os.environ.get("WORLD_SIZE", 1)) if "LOCAL_RANK" in os.environ else 1
    if started > 1 and accelerator.num_processes == 1:
        raise ValueError(
            f"{started} processes were started, but each takes itself for the only one, and all would write the same "
            "files; on the CPU set ACCELERATE_USE_CPU=true before `accelerate launch`, elsewhere launch one process "
            "or mend distributed_type in the accelerate config"
        )
    if _asked("ACCELERATE_USE_DEEPSPEED") or getattr(accelerator.distributed_type, "value", "") == "DEEPSPEED":
        raise ValueError(NO_DEEPSPEED)
    if config.use_fsdp and not sharded:
        raise ValueError(
            f"use_fsdp: True, but accelerate runs {accelerator.distributed_type.value}; {LAUNCH_SHARDED}, or set "
            "use_fsdp: False"
        )
    if sharded and not config.use_fsdp:
        raise ValueError("accelerate runs FSDP, but use_fsdp is False; set use_fsdp: True or launch another config")
    parts = config.grad_accum_steps * accelerator.num_processes
    if config.batch_size % parts:
        nearest = max(parts, round(config.batch_size / parts) * parts)
        raise ValueError(
            f"batch_size {config.batch_size} is not divisible by grad_accum_steps {config.grad_accum_steps} x "
            f"{accelerator.num_processes} processes; nearest: {nearest}"
        )
    if config.push_to_hub:
        check_upload(config, accelerator)


def start_trackers(config: TrainingSettings, accelerator: Any, run: str) -> None:
    """Open the trackers; Weights & Biases works offline when nobody is logged in, and says so.

    Args:
        run: the tracker's name of this run, by which a resumed run continues its curves.
    """
    if not accelerator.log_with:
        return
    wandb: dict[str, Any] = {
        "name": config.experiment_id,
        "entity": config.wandb_entity,
        "id": run,
        "resume": "allow",
        "dir": str(image_folder(config)),
    }
    if config.tracker in ("wandb", "all") and not _logged_in():
        accelerator.print(
            "Weights & Biases: not logged in, so the run is logged offline (`wandb sync` uploads it later)"
        )
        wandb["mode"] = "offline"
    image_folder(config).mkdir(parents=True, exist_ok=True)
    plain = {
        key: value if isinstance(value, (int, float, bool)) else str(value)
        for key, value in redacted(asdict(config)).items()
    }
    project = config.wandb_project or config.experiment_id
    with _redacted_command_line():
        accelerator.init_trackers(project, config=plain, init_kwargs={"wandb": wandb})


@contextmanager
def _redacted_command_line() -> Iterator[None]:
    """Inside its `with` block `sys.argv` holds no credentials: Weights & Biases stores the arguments of a program."""
    arguments = list(sys.argv)
    sys.argv[:] = redacted(arguments)
    try:
        yield
    finally:
        sys.argv[:] = arguments


def _logged_in() -> bool:
    """Whether Weights & Biases knows what to do without asking."""
    if os.environ.get("WANDB_MODE") or os.environ.get("WANDB_API_KEY"):
        return True
    import netrc

    try:
        return netrc.netrc().authenticators("api.wandb.ai") is not None
    except (OSError, netrc.NetrcParseError):
        return False


def log_images(accelerator: Any, images: Sequence[Path], step: int) -> None:
    """Send preview sheets and plots to the trackers: each as an image, and the sheets' images as a table."""
    from PIL import Image

    for path in images if accelerator.trackers else ():
        name = _series(path)
        with Image.open(path) as opened:
            image = opened.convert("RGB")
        for tracker in accelerator.trackers:
            if tracker.name == "tensorboard":
                _log_to_tensorboard(tracker, name, image, step)
            elif tracker.name == "wandb":
                tracker.log_images({name: [image]}, step=step)
                _log_table(tracker, f"{name}/table", path, step)


def _series(path: Path) -> str:
    """The name under which an image of every step appears: `step-00000100.png` is one of the series `previews`."""
    name = re.sub(r"-?step-\d+-?", "", path.stem)
    return name if not path.stem.startswith("step-") else f"previews/{name}".rstrip("/")


def _log_to_tensorboard(tracker: Any, name: str, image: Any, step: int) -> None:
    """One image; its writer has to be told that the channels come last."""
    import numpy as np

    tracker.log_images({name: np.asarray(image)[None]}, step=step, dataformats="NHWC")


def _log_table(tracker: Any, name: str, path: Path, step: int) -> None:
    """The images of one sheet, each a line with its prompt."""
    import wandb

    lines = [[step, found.caption, found.row, wandb.Image(found.image)] for found in sheet_images(path)]
    if lines:
        tracker.log_table(name, columns=["step", "prompt", "row", "image"], data=lines, step=step)


def draw_noise_levels(log: LogFile) -> list[Path]:
    """The plot of the loss by noise level beside the log, drawn anew; none where the log has no loss above zero."""
    spans = [span for span in spans_of_log(log.path) if any(loss > 0 for _, loss in span.points)]
    return [plot_spans(spans, log.path.with_name("loss_by_noise.png"))] if spans else []


def flat(figures: Mapping[str, Any]) -> dict[str, float]:
    """Figures as trackers want them: `{"loss_by_log_snr": {"-9": 1.0}}` becomes `{"loss_by_log_snr/-9": 1.0}`."""
    plain = {key: value for key, value in figures.items() if not isinstance(value, Mapping)}
    return plain | {f"{MEANS}/{middle}": loss for middle, loss in figures.get(MEANS, {}).items()}


def step_in(line: str) -> int | None:
    """The step of a line of figures; None when it is not a whole one."""
    try:
        step = json.loads(line)["step"]
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
    return step if isinstance(step, int) else None


class LogFile:
    """`log.jsonl`: one line of figures per `log_every` steps; a resumed run replaces the lines it repeats."""

    def __init__(self, folder: Path, step: int):
        folder.mkdir(parents=True, exist_ok=True)
        self.path = folder / "log.jsonl"
        lines = self.path.read_text(errors="replace").splitlines() if self.path.exists() else []
        figures = [(line, step_in(line)) for line in lines]
        torn = [number for number, (_, found) in enumerate(figures, 1) if found is None]
        if torn:  # a crash leaves a torn last line
            log.warning("%s: line %s holds no figures and is left out", self.path, ", ".join(map(str, torn[:5])))
        kept = [line for line, found in figures if found is not None and found <= step]
        temporary = self.path.with_name(f".tmp-{os.getpid()}-{self.path.name}")
        temporary.write_text("".join(line + "\n" for line in kept))
        os.replace(temporary, self.path)

    def write(self, figures: Mapping[str, Any]) -> None:
        """Append one line."""
        with self.path.open("a") as file:
            file.write(json.dumps(figures) + "\n")


class Progress:
    """A progress bar with loss, learning rate, samples per second and the remaining time."""

    def __init__(self, config: TrainingSettings, step: int, *, shown: bool):
        from tqdm import tqdm

        interval = 0.2 if os.isatty(2) else 15.0  # a log file needs no line per refresh
        self.bar = tqdm(
            total=config.updates, initial=step, disable=not shown, desc=config.experiment_id, unit="step",
            mininterval=interval, maxinterval=max(10.0, interval), dynamic_ncols=True,
        )  # fmt: skip
        self.batch_size = config.batch_size
        self.mark = (time.perf_counter(), step)

    def advance(self) -> None:
        """One step more."""
        self.bar.update()

    def speed(self, step: int) -> float:
        """Samples per second since the last call."""
        now = time.perf_counter()
        seconds, steps = now - self.mark[0], step - self.mark[1]
        self.mark = (now, step)
        return steps * self.batch_size / max(seconds, 1e-9)

    def show(self, *, loss: float, lr: float, speed: float) -> None:
        """Refresh the figures behind the bar."""
        self.bar.set_postfix_str(f"loss {loss:.4f}, lr {lr:.2e}, {speed:.1f} samples/s", refresh=False)

    def close(self) -> None:
        """Leave the bar as it is."""
        self.bar.close()
