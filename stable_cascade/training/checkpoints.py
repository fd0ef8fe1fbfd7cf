"""Run checkpoints: all that a run needs to go on as if it had never stopped; none is ever half there.

checkpoint_path/experiment_id/
  step-00001000/     weights.safetensors  optimizer.pt  ema.safetensors  stateful.pt  run.json  config.yaml  export/
  backup-00005000/   the same, never rotated away
  final/             the trained model alone
"""

from __future__ import annotations

import json
import os
import re
import shutil
import zlib
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stable_cascade.config import TrainingSettings

FREE_KEYS = frozenset({
    "experiment_id", "checkpoint_path", "output_path", "resume", "save_every", "backup_every", "log_every", "check",
    "checkpoints_total_limit", "tracker", "wandb_project", "wandb_entity", "push_to_hub", "hub_model_id",
    "num_workers", "cache_dir", "max_broken_share", "validation_prompts", "num_preview_images", "preview_steps",
    "preview_decoder_steps", "preview_guidance_scale",
})  # fmt: skip
"""Keys that may change between a run and its resumption, because no weight depends on them."""


@dataclass
class RunContents:
    """What a checkpoint holds."""

    step: int
    samples_seen: int
    weights: dict[str, Tensor]
    optimizer: dict[str, Any]
    stateful: dict[str, Any]
    ema: dict[str, Tensor] | None = None
    tracker_run: str = ""


def run_folder(config: TrainingSettings) -> Path:
    """The folder of the run's checkpoints."""
    return Path(config.checkpoint_path) / config.experiment_id


def write_checkpoint(
    target: Path, contents: RunContents, config: TrainingSettings, export: Callable[[Path], None] | None = None
) -> None:
    """Write a checkpoint folder; it appears under its name only when it is whole and on the disk.

    Args:
        export: writes the model in its own format into the folder it is given.
    """

    def fill(folder: Path) -> None:
        _write_files(folder, contents, config)
        if export is not None:
            (folder / "export").mkdir()
            export(folder / "export")

    write_folder(target, fill)


def write_folder(target: Path, fill: Callable[[Path], None]) -> None:
    """Make the folder `target` with what `fill` writes, replacing one that is there, in one step."""
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f".tmp-{target.name}-{os.getpid()}")
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    fill(temporary)
    _sync(temporary)
    if target.exists():
        remove_folder(target)
    os.replace(temporary, target)
    _sync_one(target.parent)


def remove_folder(folder: Path) -> None:
    """Delete a folder so that an interruption leaves no half of it under its name."""
    doomed = folder.with_name(f".tmp-old-{folder.name}-{os.getpid()}")
    shutil.rmtree(doomed, ignore_errors=True)
    os.replace(folder, doomed)
    shutil.rmtree(doomed)


def keep_backup(checkpoint: Path) -> Path:
    """A copy of a checkpoint that rotation does not touch; it shares the files where the file system can."""
    backup = checkpoint.with_name(checkpoint.name.replace("step-", "backup-"))

    def fill(folder: Path) -> None:
        shutil.copytree(checkpoint, folder, copy_function=_link, dirs_exist_ok=True)

    write_folder(backup, fill)
    return backup


def rotate(run: Path, limit: int | None) -> None:
    """Delete all but the newest `limit` checkpoints of a run; backups stay."""
    steps = sorted(run.glob("step-*"))
    for folder in steps[: max(0, len(steps) - limit)] if limit else []:
        remove_folder(folder)


def sweep(run: Path) -> None:
    """Delete what interrupted writes left behind."""
    for folder in run.glob(".tmp-*"):
        shutil.rmtree(folder, ignore_errors=True)


def set_aside(run: Path) -> Path | None:
    """Move a run's old checkpoints to `before-1`, `before-2`, …, so that a new run cannot be confused with them."""
    old = [*run.glob("step-*"), *run.glob("backup-*"), *run.glob("final")]
    if not old:
        return None
    number = 1 + max([int(f.name.split("-")[1]) for f in run.glob("before-*") if f.name[7:].isdigit()], default=0)
    aside = run / f"before-{number}"
    aside.mkdir()
    for folder in old:
        os.replace(folder, aside / folder.name)
    return aside


def find_checkpoint(config: TrainingSettings) -> Path | None:
    """The checkpoint that `resume` means, or None for a new run.

    Raises:
        ValueError: `resume` names a path without a checkpoint.
    """
    if config.resume == "never":
        return None
    if config.resume == "latest":
        return _newest(run_folder(config))
    named = Path(config.resume)
    found = named if (named / "run.json").is_file() else _newest(named)
    if found is None:
        newest = _newest(run_folder(config))
        raise ValueError(
            f"resume '{config.resume}' is no checkpoint and holds none; give latest, never or a folder step-…"
            + (f"; nearest: '{newest}'" if newest else "")
        )
    return found


def read_checkpoint(folder: Path, config: TrainingSettings) -> RunContents:
    """The contents of a checkpoint, if it is undamaged and was written with the same settings.

    Raises:
        ValueError: a file is missing or damaged, or a key that the weights depend on has another value.
    """
    record = _read_record(folder)
    _refuse_other_settings(folder, record["settings"], config)
    for name, (size, check) in record["files"].items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != size or _checksum(path) != check:
            raise ValueError(
                f"checkpoint file {path} is missing or damaged; delete {folder} to resume from the one before it"
            )
    from safetensors.torch import load_file

    saved = torch.load(folder / "optimizer.pt", map_location="cpu", weights_only=True)
    return RunContents(
        step=record["step"],
        samples_seen=record["samples_seen"],
        tracker_run=record["tracker_run"],
        weights=load_file(folder / "weights.safetensors"),
        optimizer=saved,
        stateful=torch.load(folder / "stateful.pt", map_location="cpu", weights_only=True),
        ema=load_file(folder / "ema.safetensors") if "ema.safetensors" in record["files"] else None,
    )


def _write_files(folder: Path, contents: RunContents, config: TrainingSettings) -> None:
    """The files of a checkpoint, the record last."""
    import yaml
    from safetensors.torch import save_file

    save_file(_packed(contents.weights), folder / "weights.safetensors")
    if contents.ema is not None:
        save_file(_packed(contents.ema), folder / "ema.safetensors")
    torch.save(contents.optimizer, folder / "optimizer.pt")
    torch.save(contents.stateful, folder / "stateful.pt")
    settings = json.loads(json.dumps(asdict(config)))
    (folder / "config.yaml").write_text(yaml.safe_dump(settings, sort_keys=False, allow_unicode=True))
    record = {
        "format": 1,
        "step": contents.step,
        "samples_seen": contents.samples_seen,
        "tracker_run": contents.tracker_run,
        "settings": settings,
        "files": {path.name: [path.stat().st_size, _checksum(path)] for path in sorted(folder.iterdir())},
    }
    (folder / "run.json").write_text(json.dumps(record, indent=1))


def _read_record(folder: Path) -> dict[str, Any]:
    """The `run.json` of a checkpoint."""
    try:
        record = json.loads((folder / "run.json").read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"checkpoint {folder} has no readable run.json; delete it and resume again") from error
    if record.get("format") != 1:
        raise ValueError(f"checkpoint {folder} has format {record.get('format')}; this version reads format 1")
    return record


def _refuse_other_settings(folder: Path, saved: dict[str, Any], config: TrainingSettings) -> None:
    """An error when a key that the weights depend on differs between the checkpoint and the config."""
    current = json.loads(json.dumps(asdict(config)))
    free = set(FREE_KEYS)
    if config.lr_scheduler in ("constant", "inverse_sqrt"):
        free.add("updates")  # the other schedules stretch with the length of the run
    defaults = {field.name: field.default for field in fields(config)}
    for key in sorted((set(saved) | set(current)) - free):
        before, now = saved.get(key, defaults.get(key)), current.get(key)
        if before != now:
            raise ValueError(
                f"resume from {folder}: {key} was {before!r} and is {now!r}; "
                f"set it back, or start anew with another experiment_id or resume: never"
            )


def _newest(run: Path) -> Path | None:
    """The checkpoint or backup with the highest step in a run's folder."""
    found = [(int(name[2]), name[1] == "step", name[0]) for name in map(_numbered, run.glob("*-*")) if name]
    whole = [entry for entry in found if (run / entry[2] / "run.json").is_file()]
    return run / max(whole)[2] if whole else None


def _numbered(folder: Path) -> re.Match[str] | None:
    """The match of a checkpoint folder's name: group 1 its kind, group 2 its step."""
    return re.fullmatch(r"(step|backup)-(\d+)", folder.name)


def _packed(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors on the CPU, each with memory of its own, as safetensors wants them."""
    return {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items()}


def _checksum(path: Path) -> int:
    """CRC-32 of a file."""
    value = 0
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            value = zlib.crc32(block, value)
    return value


def _link(source: str, target: str) -> None:
    """A second name for a file, or a copy where the file system has no links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def _sync(folder: Path) -> None:
    """Wait until a folder and all in it are on the disk."""
    for path in [*folder.rglob("*"), folder]:
        _sync_one(path)


def _sync_one(path: Path) -> None:
    """Wait until one file or folder is on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
