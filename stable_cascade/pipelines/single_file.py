"""Pipelines from single weights files: ComfyUI's checkpoints of several networks each, or the original's files."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from stable_cascade.components import CLIP, COMPONENTS
from stable_cascade.disk import local_path
from stable_cascade.embedded import embedded_path
from stable_cascade.files.detection import Description, describe
from stable_cascade.files.json_files import read_config
from stable_cascade.files.loading import hub_file, load_clip_file
from stable_cascade.wording import brief, quoted

from .folders import PRIOR_SHIFT, dtype_of, load_folder
from .places import INDEX

TOKENIZERS = (
    ("stabilityai/stable-cascade", "tokenizer/"),
    ("stabilityai/stable-cascade-prior", "tokenizer/"),
    ("laion/CLIP-ViT-bigG-14-laion2B-39B-b160k", ""),
    ("openai/clip-vit-large-patch14", ""),
)
"""Hub repositories with the tokenizer that the released cascade was trained with, and the folder it lies in."""
_REMEDIES = {
    "tokenizer": "tokenizer='stabilityai/stable-cascade' or a folder with one (no weights file holds it)",
    "text_encoder": "text_encoder=a file or folder of CLIP ViT-bigG/14",
    "vqgan": "vqgan='stage_a.safetensors'",
}


@dataclass
class _Parts:
    """Where the components of a pipeline come from."""

    files: dict[str, Path] = field(default_factory=dict)
    sizes: dict[str, str | None] = field(default_factory=dict)
    configs: dict[str, Any] = field(default_factory=dict)
    values: dict[str, Any] = field(default_factory=dict)


def pipeline_of_files(
    cls: Any,
    files: Sequence[str | Path],
    *,
    stage_c: str | Path | None = None,
    stage_b: str | Path | None = None,
    config: str | Path | Mapping[str, Any] | None = None,
    torch_dtype: torch.dtype | dict[str, torch.dtype] | None = None,
    **kwargs: Any,
) -> Any:
    """A pipeline of class `cls`; see `from_single_file`.

    Raises:
        ValueError: a file holds something else than its name says, or components are missing.
    """
    torch_dtype = kwargs.pop("dtype", torch_dtype)
    needed, settings = cls._get_signature_keys(cls)
    unknown = sorted(set(kwargs) - set(needed) - set(settings))
    if unknown:
        nearest = difflib.get_close_matches(unknown[0], [*needed, *settings], n=1, cutoff=0)
        raise ValueError(f"from_single_file has no argument '{unknown[0]}'; nearest: '{nearest[0]}'")
    parts = _Parts()
    for file, expected in [*((one, None) for one in files), (stage_c, "prior"), (stage_b, "decoder")]:
        if file is not None:
            place = hub_file(str(file)) if str(file).startswith(("http:", "https:")) else local_path(file)
            _add_file(parts, place, expected, [name for name in needed if name not in kwargs], cls.__name__)
    _add_config(parts, config)
    given = {name: kwargs.pop(name) for name in needed if name in kwargs}
    _add_tokenizer(parts, needed, given)
    _check_complete(cls, needed, {*given, *parts.files, *parts.values})
    loaded = {name: _given(name, value, torch_dtype, parts) for name, value in given.items()}
    for name, file in parts.files.items():
        loaded[name] = _of_file(name, file, parts.configs.get(name), dtype_of(torch_dtype, name))
    loaded |= {name: value for name, value in parts.values.items() if name in needed}
    _check_vocabulary(loaded)
    values = {name: value for name, value in parts.values.items() if name in settings}
    return cls(**(_schedulers(cls, needed) | values | loaded | kwargs))


def _add_file(parts: _Parts, file: Path, expected: str | None, needed: Sequence[str], pipeline: str) -> None:
    """Notes which components a file holds; the first file that holds one counts.

    Raises:
        ValueError: it holds nothing that the pipeline needs, or not what it was given for.
    """
    found = describe(file)
    networks = found.parts if found.kind == "checkpoint" else (found,) if found.kind == "network" else ()
    names = {str(one.component): one for one in networks}
    if expected is not None and expected not in names:
        stage = "stage_c" if expected == "prior" else "stage_b"
        raise ValueError(f"{stage}={quoted(file)} is {found.short()}, and a {expected} is needed")
    useful = {name: one for name, one in names.items() if name in needed}
    if not useful:
        raise ValueError(f"{quoted(file)} is {found.short()}, of which {pipeline} needs nothing{_advice(found)}")
    for name, one in useful.items():
        parts.files.setdefault(name, file)
        parts.sizes.setdefault(name, one.size)


def _advice(found: Description) -> str:
    return "; give it to load_lora_weights" if found.kind == "lora" else ""


def _add_config(parts: _Parts, config: str | Path | Mapping[str, Any] | None) -> None:
    """Notes configs of components, from a mapping or a pipeline's folder, and the embedded cascade's own values."""
    if isinstance(config, Mapping):
        parts.configs |= config
    elif config is not None:
        folder = local_path(config)
        if not (folder / INDEX).is_file():
            raise ValueError(
                f"config {quoted(config)} is no folder of a pipeline, with {INDEX}; or give component -> config"
            )
        parts.values |= {key: value for key, value in read_config(folder / INDEX).items() if key[0] != "_"}
        parts.values = {key: value for key, value in parts.values.items() if not isinstance(value, list)}
        parts.configs |= {name: folder / name for name in COMPONENTS if (folder / name / "config.json").is_file()}
        if (folder / "tokenizer").is_dir():
            parts.values["tokenizer"] = load_folder(
                "tokenizer", folder / "tokenizer", torch.float32, None, of_prior=False
            )
    elif "embedded" in (parts.sizes.get("prior"), parts.sizes.get("decoder")):
        index = read_config(embedded_path() / INDEX)
        parts.values |= {key: value for key, value in index.items() if isinstance(value, float)}


def _add_tokenizer(parts: _Parts, needed: Sequence[str], given: Mapping[str, Any]) -> None:
    """The tokenizer that goes with the text encoder, if it is on this machine; nothing is downloaded."""
    if "tokenizer" not in needed or "tokenizer" in given or "tokenizer" in parts.values:
        return
    place = embedded_path() / "tokenizer" if parts.sizes.get("text_encoder") == "embedded" else _cached_tokenizer()
    if place is not None:
        parts.values["tokenizer"] = load_folder("tokenizer", place, torch.float32, None, of_prior=False)


def _cached_tokenizer() -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    for repository, folder in TOKENIZERS:
        found = try_to_load_from_cache(repository, f"{folder}tokenizer_config.json")
        if isinstance(found, str):
            return Path(found).parent
    return None


def _check_complete(cls: Any, needed: Sequence[str], have: set[str]) -> None:
    """Passes when every component has a source, before any tensor is read.

    Raises:
        ValueError: naming those that have none, and where they are.
    """
    without = [*cls._optional_components, "scheduler", "prior_scheduler"]
    missing = [name for name in needed if name not in have and name not in without]
    if missing:
        remedies = ", ".join(_REMEDIES.get(name, f"{name}=its file or folder") for name in missing)
        raise ValueError(
            f"{cls.__name__} needs {', '.join(missing)}, which the given files do not hold; pass {remedies}"
        )


def _of_file(name: str, file: Path, config: Any, dtype: torch.dtype) -> Any:
    """A component from a weights file."""
    if name in CLIP:
        return load_clip_file(name, file, config, dtype)
    config = config if config is None or isinstance(config, Mapping) else str(config)
    return COMPONENTS[name].load_class().from_single_file(file, config=config, torch_dtype=dtype)


def _given(name: str, value: Any, dtype: torch.dtype | dict[str, torch.dtype] | None, parts: _Parts) -> Any:
    """A component that was given: itself, or where it is.

    Raises:
        ValueError: there is no such file, folder or Hub name.
    """
    if not isinstance(value, str | Path):
        return value
    place, wanted = local_path(value), dtype_of(dtype, name)
    if place.is_file():
        return _of_file(name, place, parts.configs.get(name), wanted)
    if place.is_dir():
        inner = place / name
        return load_folder(name, inner if inner.is_dir() else place, wanted, None, of_prior=name == "prior_scheduler")
    if place.is_absolute() or str(value).startswith(".") or str(value).count("/") != 1:
        raise ValueError(f"{name}={quoted(value)} is no file, no folder and no Hub name")
    return _of_hub(name, str(value), wanted)


def _of_hub(name: str, repository: str, dtype: torch.dtype) -> Any:
    """A component from a Hub repository: from its own folder there, or, CLIP's parts, from the root."""
    cls = COMPONENTS[name].load_class()
    key = "dtype" if COMPONENTS[name].module == "transformers" else "torch_dtype"
    typed = {} if name == "tokenizer" else {key: dtype}
    problems = []
    for place in ({"subfolder": name}, {}):
        try:
            return cls.from_pretrained(repository, **place, **typed)
        except Exception as error:  # the libraries and their HTTP clients each have errors of their own
            problems.append(f"{type(error).__name__}: {brief(error)}")
    raise ValueError(f"{name}='{repository}' cannot be had from the Hub ({problems[0]}); give a local folder")


def _check_vocabulary(loaded: Mapping[str, Any]) -> None:
    """Passes when the text encoder has a row for every token.

    Raises:
        ValueError: the tokenizer is another encoder's.
    """
    tokenizer, encoder = loaded.get("tokenizer"), loaded.get("text_encoder")
    if tokenizer is None or encoder is None:
        return
    rows = encoder.get_input_embeddings().num_embeddings
    if len(tokenizer) > rows:
        raise ValueError(
            f"the tokenizer has {len(tokenizer)} tokens, the text encoder {rows} rows; pass its own tokenizer="
        )


def _schedulers(cls: Any, needed: Sequence[str]) -> dict[str, Any]:
    """The schedulers that the released cascade is sampled with."""
    from stable_cascade.schedulers import StableCascadeScheduler

    of_prior = "prior_scheduler" if "prior_scheduler" in needed else "scheduler" if "Prior" in cls.__name__ else ""
    return {
        name: StableCascadeScheduler(shift=PRIOR_SHIFT) if name == of_prior else StableCascadeScheduler()
        for name in ("prior_scheduler", "scheduler")
        if name in needed
    }
