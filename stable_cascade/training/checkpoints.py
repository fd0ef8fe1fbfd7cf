"""Run checkpoints: all that a run needs to go on as if it had never stopped; none is ever half there.

checkpoint_path/experiment_id/
  step-00001000/     weights.safetensors  optimizer.pt  ema.safetensors  stateful.pt  run.json  config.yaml  export/
                     a sharded run has parts/ instead of the first three, to which every process writes its part
  backup-00005000/   the same, never rotated away
  final/             the trained model alone
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stable_cascade.config import TrainingSettings
from stable_cascade.redaction import redacted
from stable_cascade.training.folders import checked, remove_folder, write_folder

FREE_KEYS = frozenset({
    "experiment_id", "checkpoint_path", "output_path", "resume", "save_every", "backup_every", "log_every", "check",
    "checkpoints_total_limit", "tracker", "wandb_project", "wandb_entity", "push_to_hub", "hub_model_id",
    "hub_private", "ema_offload", "offload", "stage_b_checkpoint_path",
    "num_workers", "cache_dir", "max_broken_share", "validation_prompts", "num_preview_images", "preview_steps",
    "preview_decoder_steps", "preview_guidance_scale",
})  # fmt: skip
"""Keys that may change between a run and its resumption, because no weight depends on them."""


PARTS = "parts"
"""The folder in a sharded run's checkpoint that all processes write to."""


@dataclass
class RunContents:
    """What a checkpoint holds; of a sharded run, what is not in `parts/`: its `weights` and `ema` are None."""

    step: int
    samples_seen: int
    weights: dict[str, Tensor] | None
    optimizer: dict[str, Any]
    stateful: dict[str, Any]
    ema: dict[str, Tensor] | None = None
    tracker_run: str = ""


def run_folder(config: TrainingSettings) -> Path:
    """The folder of the run's checkpoints."""
    return Path(config.checkpoint_path) / config.experiment_id


def write_checkpoint(
    target: Path,
    contents: RunContents,
    config: TrainingSettings,
    export: Callable[[Path], None] | None = None,
    *,
    begun: Path | None = None,
    checksums: Mapping[str, list[int]] | None = None,
) -> None:
    """Write a checkpoint folder; it appears under its name only when it is whole and on the disk.

    Args:
        export: writes the model in its own format into the folder it is given.
        begun: the folder of `begin_folder` in which the processes of a sharded run have written their parts.
        checksums: file -> size and CRC-32 of those parts.

    Raises:
        DiskFullError: there is no space for it.
    """

    def fill(folder: Path) -> None:
        _write_files(folder, contents, config, dict(checksums or {}))
        if export is not None:
            (folder / "export").mkdir()
            export(folder / "export")

    write_folder(target, fill, begun=begun, needs=_size(contents))


def keep_backup(checkpoint: Path) -> Path:
    """A copy of a checkpoint that rotation does not touch; it shares the files where the file system can."""
    backup = checkpoint.with_name(checkpoint.name.replace("step-", "backup-"))

    def fill(folder: Path) -> None:
        shutil.copytree(checkpoint, folder, copy_function=_link, dirs_exist_ok=True)

    write_folder(backup, fill)
    return backup


def rotate(run: Path, limit: int | None) -> None:
    """Delete all but the newest `limit` checkpoints of a run; backups stay."""
    steps = sorted(path for path in run.glob("step-*") if path.is_dir())  # previews may lie in the same folder
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


def read_checkpoint(folder: Path, config: TrainingSettings, share: tuple[int, int] = (0, 1)) -> RunContents:
    """The contents of a checkpoint, if it is undamaged and was written with the same settings.

    Args:
        share: number of this process and of all: of the files in `parts/` each process checks its share.

    Raises:
        ValueError: a file is missing or damaged, or keys that the weights depend on have other values.
    """
    record = _read_record(folder)
    _refuse_other_settings(folder, record["settings"], config)
    parts = sorted(name for name in record["files"] if name.startswith(f"{PARTS}/"))
    for name, (size, check) in record["files"].items():
        if name in parts and parts.index(name) % share[1] != share[0]:
            continue
        path = folder / name
        if not path.is_file() or path.stat().st_size != size or checked(path) != [size, check]:
            raise ValueError(
                f"checkpoint file {path} is missing or damaged; delete {folder} to resume from the one before it"
            )
    from safetensors.torch import load_file

    saved = torch.load(folder / "optimizer.pt", map_location="cpu", weights_only=True)
    return RunContents(
        step=record["step"],
        samples_seen=record["samples_seen"],
        tracker_run=record["tracker_run"],
        weights=load_file(folder / "weights.safetensors") if "weights.safetensors" in record["files"] else None,
        optimizer=saved,
        stateful=torch.load(folder / "stateful.pt", map_location="cpu", weights_only=True),
        ema=load_file(folder / "ema.safetensors") if "ema.safetensors" in record["files"] else None,
    )


def _write_files(
    folder: Path, contents: RunContents, config: TrainingSettings, checksums: dict[str, list[int]]
) -> None:
    """The files of a checkpoint, the record last."""
    import yaml
    from safetensors.torch import save_file

    if contents.weights is not None:
        save_file(_packed(contents.weights), folder / "weights.safetensors")
    if contents.ema is not None:
        save_file(_packed(contents.ema), folder / "ema.safetensors")
    torch.save(contents.optimizer, folder / "optimizer.pt")
    torch.save(contents.stateful, folder / "stateful.pt")
    settings = redacted(json.loads(json.dumps(asdict(config))))
    (folder / "config.yaml").write_text(yaml.safe_dump(settings, sort_keys=False, allow_unicode=True))
    record = {
        "format": 1,
        "step": contents.step,
        "samples_seen": contents.samples_seen,
        "tracker_run": contents.tracker_run,
        "settings": settings,
        "files": checksums | {path.name: checked(path) for path in sorted(folder.iterdir()) if path.is_file()},
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
    saved, current = redacted(saved), redacted(json.loads(json.dumps(asdict(config))))
    free = set(FREE_KEYS)
    if config.lr_scheduler in ("constant", "inverse_sqrt"):
        free.add("updates")  # the other schedules stretch with the length of the run
    defaults = {field.name: field.default for field in fields(config)}
    pairs = {key: (saved.get(key, defaults.get(key)), current.get(key)) for key in set(saved) | set(current)}
    other = sorted(key for key, (before, now) in pairs.items() if before != now and key not in free)
    if not other:
        return
    told = ", ".join(f"{key} was {pairs[key][0]!r} and is {pairs[key][1]!r}" for key in other)
    if other == ["updates"]:
        raise ValueError(
            f"resume from {folder}: {told}, but under lr_scheduler {config.lr_scheduler} the learning rate of every "
            "step depends on it; set it back, or start anew from the trained model in "
            f"{folder / 'export'} with another experiment_id (a run meant to be prolonged: lr_scheduler: constant)"
        )
    raise ValueError(
        f"resume from {folder}: {told}; set {'them' if len(other) > 1 else 'it'} back, or start anew with another "
        "experiment_id or resume: never"
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


def _size(contents: RunContents) -> int:
    """About how many bytes a checkpoint takes: its tensors, and what trains once more for the export."""
    from torch.utils._pytree import tree_leaves

    tensors = tree_leaves([contents.weights, contents.weights, contents.ema, contents.optimizer, contents.stateful])
    return sum(leaf.numel() * leaf.element_size() for leaf in tensors if isinstance(leaf, Tensor))


def _link(source: str, target: str) -> None:
    """A second name for a file, or a copy where the file system has no links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)
