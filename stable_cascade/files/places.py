"""What lies at a path: a file of weights, a network's or pipeline's folder, a training, a shard."""

from __future__ import annotations

from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Any

from stable_cascade.disk import local_path
from stable_cascade.redaction import redacted
from stable_cascade.wording import brief, quoted

from .detection import KNOWN, Description, describe_tensors
from .headers import TensorInfo, file_type, read_header, read_pickled
from .json_files import read_json
from .weight_names import KEY_MAPS

INDEX = "model_index.json"
WEIGHTS = ("diffusion_pytorch_model", "model", "pytorch_lora_weights", "learned_embeds")
"""Beginnings of the names of weights files in a network's folder, the first that is there counts."""
MAX_FILES = 64
MAX_CONFIG = 256 * 1024


def describe(path: str | PathLike[str]) -> Description:
    """What a file or folder is.

    Raises:
        ValueError: there is none, it is damaged, or nothing that is known here; the error names what was found.
    """
    place = local_path(path)
    if place.is_dir():
        return describe_folder(place)
    kind = file_type(place)
    if kind == "tar":
        return Description(place.name, "shard", bytes=place.stat().st_size)
    if kind == "pickle":
        found = describe_tensors(read_pickled(place), place.name, size=place.stat().st_size)
        return replace(found, notes=(*found.notes, "a pickle file: only its tensors are read; .safetensors is safer"))
    header = read_header(place)
    return describe_tensors(header.tensors, place.name, metadata=header.metadata, size=header.size)


def describe_folder(place: Path) -> Description:
    """What a folder is; of a training, its newest checkpoint or its export.

    Raises:
        ValueError: there is nothing in it that is known here.
    """
    if (place / INDEX).is_file():
        return _pipeline(place)
    runs = sorted(place.glob("step-*/run.json"))
    if (place / "run.json").is_file() or runs or (place / "final").is_dir():
        return _training(place, [run.parent for run in runs])
    found = describe_network_folder(place)
    if found is None:
        inner = sorted(path for path in place.iterdir() if path.is_dir() and weight_files(path))
        files = [*sorted(place.glob("*.safetensors")), *inner]
        if not files:
            raise ValueError(f"{quoted(place)} is a folder without {INDEX} and .safetensors files; known are {KNOWN}")
        found = describe(files[0]) if len(files) == 1 else _files(place, files[:MAX_FILES])
    return replace(found, name=place.name, training=recorded_config(place))


def _files(place: Path, files: list[Path]) -> Description:
    """Files and networks' folders beside each other; what is unknown among them is said.

    Raises:
        ValueError: all of them are.
    """
    parts, problems = [], []
    for file in files:
        try:
            parts.append(describe(file))
        except ValueError as error:
            problems.append(brief(error, 200))
    if not parts:
        raise ValueError(f"{quoted(place)}: {problems[0]}")
    return Description(place.name, "folder", parts=tuple(parts), notes=tuple(problems))


def describe_network_folder(place: Path) -> Description | None:
    """The network in a folder in diffusers' layout, with its parts if it was saved in several files; None for none."""
    files = weight_files(place)
    if not files:
        return None
    # The headers of all shards as one.
    tensors: dict[str, TensorInfo] = {}
    metadata: dict[str, str] = {}
    size = 0
    for file in files:
        header = read_header(file)
        tensors |= header.tensors
        metadata |= header.metadata
        size += header.size
    found = describe_tensors(tensors, place.name, metadata=metadata, size=size)
    # Weights that are not part of it, and whose names its tensors have.
    others = sorted(file.name for file in place.glob("*.safetensors") if file not in files)
    notes = (f"other weights beside them: {brief(', '.join(others), 160)}",) if others else ()
    ours = found.component in KEY_MAPS and (place / "config.json").is_file()
    naming = "diffusers" if found.kind == "network" and ours else found.format
    return replace(found, format=naming, notes=(*found.notes, *notes))


def weight_files(place: Path, variant: str | None = None) -> list[Path]:
    """The safetensors files of a network's folder: one, or the parts that an index lists; empty for none.

    Raises:
        ValueError: a part is missing, or the index names files outside the folder.
    """
    ending = f".{variant}" if variant else ""
    for stem in WEIGHTS:
        file = place / f"{stem}{ending}.safetensors"
        if file.is_file():
            return [file]
        index = place / f"{stem}.safetensors.index{ending}.json"
        if index.is_file():
            return _parts(index)
    variants = sorted(place.glob(f"{WEIGHTS[0]}.*.safetensors")) + sorted(place.glob(f"{WEIGHTS[1]}.*.safetensors"))
    return [] if variant else [file for file in variants if "-of-" not in file.name][:1]


def _parts(index: Path) -> list[Path]:
    table = read_json(index).get("weight_map")
    names = sorted({str(name) for name in table.values()}) if isinstance(table, dict) else []
    if not names or len(names) > MAX_FILES or any(Path(name).name != name for name in names):
        raise ValueError(f"{quoted(index)} lists no weights in its own folder; download the folder again")
    missing = [name for name in names if not (index.parent / name).is_file()]
    if missing:
        raise ValueError(f"{quoted(index)} lists {quoted(missing[0])}, which is not there; download the folder again")
    return [index.parent / name for name in names]


def _pipeline(place: Path) -> Description:
    """A pipeline's folder: what its index and its folders say."""
    index = read_json(place / INDEX)
    parts, plain = [], []
    for folder in sorted(path for path in place.iterdir() if path.is_dir())[:MAX_FILES]:
        found = describe_network_folder(folder)
        if found is not None:
            parts.append(found)
        elif any(folder.glob("*.json")):
            plain.append(folder.name)
    notes = [f"class {brief(index.get('_class_name'), 60)}"]
    notes += [f"without weights: {brief(', '.join(plain), 160)}"] if plain else []
    return Description(place.name, "pipeline", format="diffusers", parts=tuple(parts), notes=tuple(notes))


def _training(place: Path, steps: list[Path]) -> Description:
    """A training's folder or one of its checkpoints."""
    checkpoint = place if (place / "run.json").is_file() else steps[-1] if steps else None
    notes, parts = [], []
    if checkpoint is not None:
        run = read_json(checkpoint / "run.json")
        step, seen = brief(run.get("step"), 20), brief(run.get("samples_seen"), 20)
        notes.append(f"checkpoint of step {step}, {seen} samples seen")
    exports = [place / "final", place / "export"] + ([checkpoint / "export"] if checkpoint else [])
    export = next((folder for folder in exports if folder.is_dir()), None)
    if export is not None:
        parts.append(replace(describe_folder(export), name=export.name, training={}))
    settings = recorded_config(checkpoint or place / "final")
    return Description(place.name, "training", parts=tuple(parts), training=settings, notes=tuple(notes))


def recorded_config(place: Path) -> dict[str, Any]:
    """The plain values of the config that a training wrote beside its checkpoints; empty when there is none.

    Raises:
        ValueError: it is no YAML, or larger than a config is.
    """
    files = [place / "config.yaml"]
    if place.name in ("final", "export"):
        files += [place.parent / "config.yaml", *sorted(place.parent.glob("step-*/config.yaml"))[-1:]]
    file = next((file for file in files if file.is_file()), None)
    if file is None:
        return {}
    import yaml

    if file.stat().st_size > MAX_CONFIG:
        raise ValueError(f"{quoted(file)} has more than {MAX_CONFIG:,} bytes; it is no config of a training")
    try:
        values = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError, ValueError) as error:
        raise ValueError(f"{quoted(file)} is no YAML ({brief(error, 80)}); delete it to inspect the folder") from None
    plain = {str(key): value for key, value in values.items() if _plain(value)} if isinstance(values, dict) else {}
    return redacted(plain)


def _plain(value: Any) -> bool:
    """Whether a value fits on a line: a number, a text, or a short list of them."""
    if isinstance(value, list):
        return len(value) <= 16 and all(isinstance(one, str | int | float | bool | None) for one in value)
    return isinstance(value, str | int | float | bool)
