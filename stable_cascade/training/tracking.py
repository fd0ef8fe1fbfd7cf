"""What a run tells while it runs: the accelerator's trackers, a log file, the progress bar."""

from __future__ import annotations

import importlib.util
import json
import logging
import math
import os
import re
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stable_cascade.config import TrainingSettings
from stable_cascade.redaction import redacted

from .processes import is_sharded
from .publishing import check_upload
from .sheets import sheet_images

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
    # FSDP that was asked for and does not run.
    sharded = is_sharded(accelerator)
    if _asked("ACCELERATE_USE_FSDP") and not sharded:
        if accelerator.device.type == "cpu":
            raise ValueError(NO_DEVICE)
        raise ValueError(
            f"ACCELERATE_USE_FSDP is set, but accelerate runs {accelerator.distributed_type.value}; {LAUNCH_SHARDED}, "
            "or unset it"
        )
    # Processes that do not know of each other would write the same files.
    started = int(os.environ.get("WORLD_SIZE", 1)) if "LOCAL_RANK" in os.environ else 1
    if started > 1 and accelerator.num_processes == 1:
        raise ValueError(
            f"{started} processes were started, but each takes itself for the only one, and all would write the same "
            "files; on the CPU set ACCELERATE_USE_CPU=true before `accelerate launch`, elsewhere launch one process "
            "or mend distributed_type in the accelerate config"
        )
    if _asked("ACCELERATE_USE_DEEPSPEED") or getattr(accelerator.distributed_type, "value", "") == "DEEPSPEED":
        raise ValueError(NO_DEEPSPEED)
    # Config and launch must agree.
    if config.use_fsdp and not sharded:
        raise ValueError(
            f"use_fsdp: True, but accelerate runs {accelerator.distributed_type.value}; {LAUNCH_SHARDED}, or set "
            "use_fsdp: False"
        )
    if sharded and not config.use_fsdp:
        raise ValueError("accelerate runs FSDP, but use_fsdp is False; set use_fsdp: True or launch another config")
    # The batch must divide; an upload must be possible.
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
    # Weights & Biases goes on with the run of before, offline where nobody is logged in.
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
    # What the trackers keep: settings without credentials.
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
    """One image; its writer needs to know that the channels come last."""
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


LOWEST, WIDTH, BUCKETS = -10.0, 2.0, 10
MEANS, COUNTS = "loss_by_log_snr", "samples_by_log_snr"
"""The keys in `log.jsonl`, each a mapping from the middle of a bucket."""


def middle(bucket: int) -> str:
    """The log_snr in the middle of a bucket, as the log names it."""
    return f"{LOWEST + WIDTH * (bucket + 0.5):g}"


class LossByNoiseLevel:
    """The unweighted loss in buckets of log_snr since it was last read.

    `add` never waits for the device. What lies outside the buckets counts in the nearest one.
    """

    def __init__(self) -> None:
        self.totals: Tensor | None = None  # (2, BUCKETS): sums of the loss, numbers of samples

    def add(self, log_snr: Tensor, loss: Tensor) -> None:
        """Count samples.

        Shapes: (B,), (B,).
        """
        if self.totals is None:
            self.totals = torch.zeros(2, BUCKETS, device=loss.device)
        loss = loss.detach().float()
        bucket = ((log_snr.detach().to(loss.device).float() - LOWEST) / WIDTH).long().clamp(0, BUCKETS - 1)
        self.totals.index_add_(1, bucket, torch.stack([loss, torch.ones_like(loss)]))

    def read(self, accelerator: Any) -> dict[str, dict[str, float]]:
        """What all processes counted since the last time: mean loss and number of samples of each bucket that has any.

        Every process has to call it. Without noise levels the result is empty.
        """
        totals, self.totals = self.totals, None
        if totals is None:
            return {}
        if accelerator.num_processes > 1:
            totals = accelerator.reduce(totals.to(accelerator.device), "sum")
        sums, counts = totals.tolist()
        seen = [bucket for bucket in range(BUCKETS) if counts[bucket]]
        return {
            MEANS: {middle(bucket): sums[bucket] / counts[bucket] for bucket in seen},
            COUNTS: {middle(bucket): int(counts[bucket]) for bucket in seen},
        }


@dataclass(frozen=True)
class Span:
    """The mean loss by log_snr over the steps `first` to `last` of a run."""

    first: int
    last: int
    points: tuple[tuple[float, float], ...]


def spans_of_log(log: Path, count: int = 5) -> list[Span]:
    """A run's log in at most `count` spans of equally many lines, the oldest first."""
    with log.open() as file:
        lines = [line for line in map(json.loads, file) if line.get(MEANS)]
    cuts = [round(number * len(lines) / count) for number in range(count + 1)]
    parts = [lines[start:stop] for start, stop in pairwise(cuts) if stop > start]
    starts = [1, *(part[-1]["step"] + 1 for part in parts)]
    return [_span(first, part) for first, part in zip(starts, parts, strict=False)]


def _span(first: int, lines: Sequence[dict[str, Any]]) -> Span:
    """Lines of the log as one span; every sample counts alike."""
    points = []
    for name in sorted({name for line in lines for name in line[MEANS]}, key=float):
        pairs = [(line[MEANS][name], line[COUNTS][name]) for line in lines if name in line[MEANS]]
        points.append((float(name), _weighted_mean(pairs)))
    return Span(first, lines[-1]["step"], tuple(points))


def _weighted_mean(pairs: Iterable[tuple[float, float]]) -> float:
    pairs = list(pairs)
    return sum(value * weight for value, weight in pairs) / sum(weight for _, weight in pairs)


def plot_spans(spans: Sequence[Span], path: Path) -> Path:
    """Draw the loss over log_snr, on a logarithmic axis, a later span in a darker line; returns the path.

    Raises:
        ValueError: there is nothing to draw.
    """
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter

    # A loss of zero, or one that is no number, has no place on a logarithmic axis.
    curves = [[point for point in span.points if point[1] > 0 and math.isfinite(point[1])] for span in spans]
    if not any(curves):
        raise ValueError(f"{path.name}: no loss was logged by noise level")
    figure = Figure(figsize=(7.2, 4.4), dpi=100, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot(yscale="log", xlim=(LOWEST, LOWEST + WIDTH * BUCKETS))
    shades = colormaps["Blues"]

    # One line per span, with a dot per bucket.
    for number, (span, curve) in enumerate(zip(spans, curves, strict=True)):
        shade = shades(1.0 if len(spans) == 1 else 0.35 + 0.65 * number / (len(spans) - 1))
        places, losses = [log_snr for log_snr, _ in curve], [loss for _, loss in curve]
        axes.plot(places, losses, "o-", color=shade, label=f"steps {span.first}-{span.last}")
    axes.set_xlabel("more noise   <   logSNR   >   less noise")
    axes.set_ylabel("mean unweighted loss")
    axes.set_xticks([LOWEST + WIDTH * bucket for bucket in range(BUCKETS + 1)])
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.grid(color="0.9")
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    return path
