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
import shutil
import zlib
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stable_cascade import bounds
from stable_cascade.config import TrainingSettings, keys_where
from stable_cascade.disk import local_path, read_file
from stable_cascade.redaction import redacted
from stable_cascade.training.run_folders import RECORD, checked, resumable, run_folder, step_of, write_folder
from stable_cascade.wording import brief, quoted

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
    data: Mapping[str, Any] | None = None


class DamagedError(ValueError):
    """A checkpoint is not what was written."""


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


def find_checkpoints(config: TrainingSettings) -> list[Path]:
    """The checkpoints that `resume` means, the first to be taken if it is undamaged; none for a new run.

    Raises:
        ValueError: `resume` names a path without a checkpoint.
    """
    if config.resume == "never":
        return []
    newest = resumable(run_folder(config))
    if config.resume in ("latest", "latest_intact"):
        return newest if config.resume == "latest_intact" else newest[:1]
    named = local_path(config.resume)
    found = [named] if (named / RECORD).is_file() else resumable(named)[:1]
    if not found:
        raise ValueError(
            f"resume '{config.resume}' is no checkpoint and holds none; give latest, latest_intact, never or a folder "
            "step-…" + (f"; nearest: '{newest[0]}'" if newest else "")
        )
    return found


def read_checkpoint(
    folder: Path,
    config: TrainingSettings,
    share: tuple[int, int] = (0, 1),
    data: Mapping[str, Any] | None = None,
) -> RunContents:
    """The contents of a checkpoint, if it is undamaged and was written with the same settings and data.

    Args:
        share: number of this process and of all: of the files in `parts/` each process checks its share.
        data: what `RunContents.data` would be now.

    Raises:
        DamagedError: a file is missing or damaged.
        ValueError: keys that the weights depend on have other values, or the images are others and the config does
            not allow it.
    """
    # The same settings and data, or a refusal.
    record = _read_record(folder)
    known = config.resume_with_other_data or _refuse_other_data(folder, record.get("data"), data)
    _refuse_other_settings(folder, record["settings"], config, same_data=known)
    # Every file as it was written; parts are shared out among the processes.
    parts = sorted(name for name in record["files"] if name.startswith(f"{PARTS}/"))
    for name, (size, check) in record["files"].items():
        if name in parts and parts.index(name) % share[1] != share[0]:
            continue
        path = folder / name
        if not path.is_file() or path.stat().st_size != size or checked(path) != [size, check]:
            raise DamagedError(f"checkpoint file {path} is missing or damaged; {_instead(folder)}")
    # Read them.
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
        data=record.get("data"),
    )


def _write_files(
    folder: Path, contents: RunContents, config: TrainingSettings, checksums: dict[str, list[int]]
) -> None:
    """The files of a checkpoint, the record last."""
    import yaml
    from safetensors.torch import save_file

    # Weights and state.
    if contents.weights is not None:
        save_file(_packed(contents.weights), folder / "weights.safetensors")
    if contents.ema is not None:
        save_file(_packed(contents.ema), folder / "ema.safetensors")
    torch.save(contents.optimizer, folder / "optimizer.pt")
    torch.save(contents.stateful, folder / "stateful.pt")
    # The settings, without credentials.
    settings = redacted(json.loads(json.dumps(asdict(config))))
    (folder / "config.yaml").write_text(yaml.safe_dump(settings, sort_keys=False, allow_unicode=True))
    # The record with a checksum of every file: a checkpoint without it is not complete.
    record = {
        "format": 1,
        "step": contents.step,
        "samples_seen": contents.samples_seen,
        "tracker_run": contents.tracker_run,
        "settings": settings,
        "data": contents.data,
        "files": checksums | {path.name: checked(path) for path in sorted(folder.iterdir()) if path.is_file()},
    }
    (folder / RECORD).write_text(json.dumps({**record, "check": _check(record)}, indent=1))


def _check(record: Mapping[str, Any]) -> int:
    """CRC-32 of a record's content, whatever its layout in the file."""
    content = {key: value for key, value in record.items() if key != "check"}
    return zlib.crc32(json.dumps(content, sort_keys=True).encode())


def _read_record(folder: Path) -> dict[str, Any]:
    """The `run.json` of a checkpoint.

    Raises:
        DamagedError: it is not as it was written.
        ValueError: another version wrote it.
    """
    damaged = DamagedError(f"checkpoint {folder} has a damaged or incomplete {RECORD}; {_instead(folder)}")
    try:
        record = json.loads(read_file(folder / RECORD, at_most=bounds.RUN_RECORD, what="checkpoint record"))
    except (ValueError, RecursionError) as error:
        raise damaged from error
    if not isinstance(record, dict):
        raise damaged
    if record.get("format") != 1:
        raise ValueError(f"checkpoint {folder} has format {brief(record.get('format'))}; this version reads format 1")
    # Records of earlier versions have no check, but always these.
    step, files, settings = record.get("step"), record.get("files"), record.get("settings")
    whole = (
        record.get("check", _check(record)) == _check(record)
        and type(step) is int
        and step_of(folder) in (None, step)
        and type(record.get("samples_seen")) is int
        and isinstance(record.get("tracker_run"), str)
        and isinstance(settings, dict)
        and isinstance(files, dict)
        and {"optimizer.pt", "stateful.pt"} <= files.keys()
        and ("weights.safetensors" in files or any(name.startswith(f"{PARTS}/") for name in files))
        and all(isinstance(entry, list) and len(entry) == 2 for entry in files.values())
        and not any(Path(name).is_absolute() or ".." in Path(name).parts for name in files)
    )
    if not whole:
        raise damaged
    return record


def _instead(folder: Path) -> str:
    """What to do about a damaged checkpoint."""
    return f"set resume: latest_intact, or delete {folder}, to go on from the one before it"


def _refuse_other_data(folder: Path, saved: Mapping[str, Any] | None, current: Mapping[str, Any] | None) -> bool:
    """Whether both sets of images are known, and so the same; where they are is then of no importance.

    Raises:
        ValueError: they differ.
    """
    # Unknown, or the same.
    if not saved or not current:
        return False
    if all(saved[part] == current[part] for part in ("samples", "all")):
        return True
    # Say what differs, with examples, and how to go on.
    if saved["samples"] != current["samples"]:
        change = f"{saved['samples']:,} samples then, {current['samples']:,} now"
    elif (saved.get("images") or saved.get("pictures")) != current["images"]:  # earlier runs wrote the second word
        change = "other images among them"
    elif saved["order"] != current["order"]:
        change = "the same images in another order; name the shards as before"
    else:
        change = "other captions or masks"
    gone = sorted(set(saved["some"].values()) - set(current["some"].values()))
    named = [key for key, content in saved["some"].items() if content in gone][:3]
    example = f" (not found again: {', '.join(map(quoted, named))})" if named and "order" not in change else ""
    raise ValueError(
        f"resume from {folder}: it was trained on other data: {change}{example}; give the same data, set "
        "resume_with_other_data: True to go on with these, or start anew with another experiment_id or resume: never"
    )


def _refuse_other_settings(folder: Path, saved: dict[str, Any], config: TrainingSettings, *, same_data: bool) -> None:
    """An error when a key that the weights depend on differs between the checkpoint and the config."""
    saved, current = redacted(saved), redacted(json.loads(json.dumps(asdict(config))))
    # Which keys may differ: each field says so of itself, and the length of the run depends on the schedule.
    free = set(keys_where([type(config)], resume="free"))
    if same_data:
        free |= keys_where([type(config)], resume="same data")
    if config.lr_scheduler in ("constant", "inverse_sqrt"):
        free.add("updates")  # the other schedules stretch with the length of the run
    # What differs beyond them; a key that the record lacks had its default.
    defaults = {field.name: field.default for field in fields(config)}
    pairs = {key: (saved.get(key, defaults.get(key)), current.get(key)) for key in set(saved) | set(current)}
    other = sorted(key for key, (before, now) in pairs.items() if before != now and key not in free)
    if not other:
        return
    change = ", ".join(f"{key} was {pairs[key][0]!r} and is {pairs[key][1]!r}" for key in other)
    if other == ["updates"]:
        raise ValueError(
            f"resume from {folder}: {change}, but under lr_scheduler {config.lr_scheduler} the learning rate of every "
            "step depends on it; set it back, or start anew from the trained model in "
            f"{folder / 'export'} with another experiment_id (a run meant to be prolonged: lr_scheduler: constant)"
        )
    raise ValueError(
        f"resume from {folder}: {change}; set {'them' if len(other) > 1 else 'it'} back, or start anew with another "
        "experiment_id or resume: never"
    )


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
