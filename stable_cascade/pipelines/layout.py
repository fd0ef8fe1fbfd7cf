"""The components of a pipeline in folders: which folder or repository has which, and loading one from its folder."""

from __future__ import annotations

import importlib
import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch

from stable_cascade.components import COMPONENTS
from stable_cascade.disk import local_path
from stable_cascade.files.headers import read_header
from stable_cascade.files.json_files import read_config
from stable_cascade.hub import ask
from stable_cascade.models.base import check_whole
from stable_cascade.wording import brief, quoted

from .habits import OF_PRIOR

logger = logging.getLogger(__name__)

PRIOR_SHIFT = 2.0


def device_of(device_map: Any) -> torch.device | None:
    """The device that diffusers' `device_map` names.

    Raises:
        ValueError: it asks for a placement over several devices.
    """
    if device_map is None or isinstance(device_map, torch.device):
        return device_map
    try:
        return torch.device(device_map)
    except (RuntimeError, TypeError):
        raise ValueError(
            f"device_map {quoted(device_map)} is no device; name one, such as 'cuda', or load without it and call "
            "enable_model_cpu_offload()"
        ) from None


def dtype_of(dtype: Any, name: str, place: Path | None = None) -> torch.dtype:
    """The type meant for a component, float32 where none is; `auto` is that of its weights in `place`.

    Raises:
        ValueError: it is no type that networks have.
    """
    meant = dtype.get(name, dtype.get("default")) if isinstance(dtype, dict) else dtype
    if meant == "auto":
        meant = _stored_type(place)
    if isinstance(meant, str):
        meant = getattr(torch, meant.removeprefix("torch."), meant)
    if meant is None or (isinstance(meant, torch.dtype) and meant in (torch.float32, torch.bfloat16, torch.float16)):
        return meant or torch.float32
    raise ValueError(f"torch_dtype {quoted(meant)} is none of float32, bfloat16, float16, 'auto'")


def _stored_type(place: Path | None) -> torch.dtype:
    """The type of a component's first weights of floating-point numbers."""
    files = sorted(place.glob("*.safetensors")) if place is not None and place.is_dir() else [place] if place else []
    types = ("float32", "float16", "bfloat16")
    for file in files:
        found = next((info.dtype for info in read_header(file).tensors.values() if info.dtype in types), None)
        if found is not None:
            return getattr(torch, found)
    return torch.float32


def load_folder(name: str, place: Path, dtype: torch.dtype, variant: str | None, *, of_prior: bool) -> Any:
    """A component from its folder.

    Raises:
        ValueError: a file is missing, damaged or of another network.
    """
    module, cls_name = COMPONENTS[name].module, COMPONENTS[name].cls
    if name == "controlnet" and (place / "0").is_dir():
        cls_name = "StableCascadeMultiControlNet"
    if variant is not None and name not in WITHOUT_WEIGHTS and place.is_dir() and not has_variant(place, variant):
        logger.warning("%s has no weights of the variant '%s'; its plain ones are loaded", place.name, variant)
        variant = None
    try:
        if place.is_file():
            cls = getattr(importlib.import_module(module), cls_name)
            return cls.from_single_file(place, torch_dtype=dtype)
        if name.endswith("scheduler"):
            return own_scheduler(read_config(place / "scheduler_config.json"), of_prior)
        configs = [read_config(config) for config in place.glob("**/config.json")]
        if not configs and name not in WITHOUT_WEIGHTS:
            raise ValueError("it has no config.json")  # transformers would build its own default size
        cls = getattr(importlib.import_module(module), cls_name)
        if name in ("tokenizer", "feature_extractor"):
            return cls.from_pretrained(place)
        if module != "transformers":
            return cls.from_pretrained(place, variant=variant, torch_dtype=dtype)
        # transformers would take the type that config.json notes, and only warns of missing weights.
        network, info = cls.from_pretrained(place, variant=variant, dtype=dtype, output_loading_info=True)
        check_whole(info, cls_name, place)
        return network
    except MemoryError:
        raise
    except Exception as error:  # what diffusers, transformers and tokenizers make of damaged files
        reason = brief(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {brief(error)}"
        raise ValueError(
            f"{quoted(place)} holds no {cls_name} that can be read ({reason}); get the folder again"
        ) from error


def own_scheduler(config: dict[str, Any], of_prior: bool) -> Any:
    """Our scheduler from its own config, or from diffusers', which lacks the shift that Stage C is sampled with."""
    from stable_cascade.schedulers import StableCascadeScheduler

    shift = {} if "shift" in config or not of_prior else {"shift": PRIOR_SHIFT}
    return StableCascadeScheduler.from_config(config, **shift)


def own_network(name: str, network: Any) -> Any:
    """Our network with the parameters of diffusers' one, so that what changes one (`to`, training) changes both."""
    from stable_cascade.files.loading import on_meta

    # Their values hold where ours has another default, as for the scale of Stage A's latents.
    config = {key: value for key, value in network.config.items() if not key.startswith("_")}
    model = on_meta(COMPONENTS[name].load_class(), config)
    model.load_state_dict(network.state_dict(keep_vars=True), strict=True, assign=True)
    return model.train(network.training)


HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "token")
_PLAIN = re.compile(r"(?:diffusion_pytorch_model|model)(?:-\d+-of-\d+)?\.safetensors(?:\.index\.json)?")


def hub_folder(
    name: str, parts: Sequence[str], variant: str | None, options: Mapping[str, Any], files: Iterable[str] = ()
) -> Path:
    """The local copy of a repository: these parts' folders, each in its variant where it has one, and single files.

    Raises:
        HubError: the Hub does not know the repository, or cannot be reached and nothing is in the cache.
    """
    from huggingface_hub import snapshot_download

    options = {key: value for key, value in options.items() if key != "proxies"}
    listed = ask(name, partial(_listed, name), **options) if parts else None
    wanted = ["model_index.json", *files]
    for part in parts:
        wanted += [f"{part}/*.json", f"{part}/*.txt", *_weights(part, variant, listed)]
    return Path(ask(name, partial(snapshot_download, name, allow_patterns=wanted), **options))


def _listed(name: str, **options: Any) -> list[str] | None:
    """The repository's files; None where the Hub cannot be asked, and the cache decides."""
    if options.get("local_files_only"):
        return None
    from huggingface_hub import HfApi

    try:
        return HfApi(token=options.get("token")).list_repo_files(name, revision=options.get("revision"))
    except Exception:  # the download says what is wrong, unless the cache has it all
        return None


def _weights(part: str, variant: str | None, listed: list[str] | None) -> list[str]:
    """The weights files of a part, or patterns of their names."""
    if listed is None:
        return [f"{part}/*.{variant}*" if variant else f"{part}/*model*.safetensors*"]
    names = [path.removeprefix(f"{part}/") for path in listed if path.startswith(f"{part}/")]
    of_variant = [name for name in names if variant and re.search(rf"\.{re.escape(variant)}[.-]", name)]
    return [f"{part}/{name}" for name in of_variant or [name for name in names if _PLAIN.fullmatch(name)]]


INDEX = "model_index.json"
PRIOR_PARTS = ("prior", "prior_scheduler", "text_encoder", "tokenizer", "image_encoder", "feature_extractor")
LITE = ("prior", "decoder")
"""Components with a small network beside the large one, in a folder `<name>_lite`."""
ROOT_FILES = {name: f"{part.file}.safetensors" for name, part in COMPONENTS.items() if part.single}
"""What Stability's repository has as single files only."""
WITHOUT_WEIGHTS = tuple(name for name, part in COMPONENTS.items() if not part.title)

Folders = list[tuple[Path, dict[str, Any]]]
"""Folders with their indexes; where there are two, the first is Stage C's own."""


def folders_of(
    name: str | Path,
    prior_name: str | Path | None,
    missing: list[str],
    small: Sequence[str],
    variant: str | None,
    hub: dict[str, Any],
) -> Folders:
    """Where the components are: one folder, or Stage C's own and another."""
    folder = _folder(name, missing, small, variant, hub)
    index = _index(folder)
    has_prior = any(_place(folder, _folder_name(alias, small), index) for alias in _aliases("", "prior", index))
    if prior_name is None and "prior" in missing and not has_prior:
        beside = f"{name}-prior"
        prior_name = beside if local_path(beside).is_dir() or not local_path(name).is_dir() else None
    folders = [(folder, index)]
    if prior_name is not None:
        prior_folder = _folder(prior_name, [part for part in missing if part in PRIOR_PARTS], small, variant, hub)
        folders.insert(0, (prior_folder, _index(prior_folder)))
    return folders


def _index(folder: Path) -> dict[str, Any]:
    path = folder / INDEX
    return read_config(path) if path.exists() else {}


def _folder(
    name: str | Path, parts: list[str], small: Sequence[str], variant: str | None, hub: dict[str, Any]
) -> Path:
    """The local folder, or the Hub repository's, downloaded as far as the parts need it."""
    path = local_path(name)
    if path.is_dir():
        return path
    if path.is_absolute() or str(name).startswith(".") or str(name).count("/") != 1:
        raise ValueError(f"'{name}' is no folder and no Hub name; give a folder in diffusers' layout, or 'owner/name'")
    folders = [_folder_name(part, small) for part in parts]
    return hub_folder(
        str(name), [*folders, "scheduler"], variant, hub, [ROOT_FILES[part] for part in parts if part in ROOT_FILES]
    )


def small_networks(lite: bool | str | Sequence[str], needed: Sequence[str]) -> tuple[str, ...]:
    """The components whose small network is meant.

    Raises:
        ValueError: one that has none.
    """
    if isinstance(lite, bool):
        return tuple(name for name in LITE if lite and name in needed)
    names = (lite,) if isinstance(lite, str) else tuple(lite)
    wrong = [name for name in names if name not in LITE]
    if wrong:
        raise ValueError(f"lite names '{wrong[0]}'; only {' and '.join(LITE)} have a small network")
    return names


def _folder_name(name: str, small: Sequence[str]) -> str:
    return f"{name}_lite" if name in small else name


def _place(folder: Path, name: str, index: dict[str, Any]) -> Path | None:
    """Where a folder keeps a component; None when it has none or says that there is none."""
    place = folder / name
    if index.get(name, ["", ""]) in ([None, None], None) or not place.is_dir():
        file = folder / ROOT_FILES.get(name, "")
        return file if name in ROOT_FILES and file.is_file() else None
    # Stability's repository keeps ControlNets of the original's format in a folder of this name.
    if name == "controlnet" and not (place / "config.json").is_file() and not (place / "0").is_dir():
        return None
    return place


def find(pipeline: str, name: str, folders: Folders, small: Sequence[str]) -> Path | None:
    """The component's folder, or its single file in the repository's root; None for neither."""
    for position, (folder, index) in enumerate(folders):
        # Stage C's parts come from its own folder when there is one, the others never do.
        if len(folders) > 1 and position == 0 and name not in PRIOR_PARTS:
            continue
        for alias in _aliases(pipeline, name, index, own_folder=len(folders) > 1 and position == 0):
            place = _place(folder, _folder_name(alias, small), index)
            if place is not None:
                return place
    return None


def check_places(
    pipeline: str,
    places: dict[str, Path | None],
    optional: Sequence[str],
    folders: Folders,
    variant: str | None,
    small: Sequence[str] = (),
) -> None:
    """Passes when every component has a place, and the variant is there.

    Raises:
        ValueError: naming what is missing.
    """
    where = " or ".join(f"'{folder}'" for folder, _ in folders)
    for name, place in places.items():
        if place is None and name not in optional:
            lite = f" ('{_folder_name(name, small)}')" if name in small else ""
            raise ValueError(f"{pipeline} needs '{name}'{lite}, and {where} has no such folder; pass {name}=…")
    weighty = [place for name, place in places.items() if place and place.is_dir() and name not in WITHOUT_WEIGHTS]
    if variant and weighty and not any(has_variant(place, variant) for place in weighty):
        known = sorted({found for place in weighty for found in _variants(place)})
        known_text = f"it has {', '.join(known)}" if known else "it has none"
        raise ValueError(
            f"no component in {where} has weights of the variant '{variant}'; {known_text}, or leave it out"
        )


def has_variant(place: Path, variant: str) -> bool:
    """Whether a component's folder has weights of a variant."""
    return variant in _variants(place)


def _variants(place: Path) -> set[str]:
    """The variants that a component's weights come in: the word before `.safetensors` and the like."""
    names = [path.name for path in place.glob("**/*model*")] if place.is_dir() else []
    found = (re.search(r"model\.(\w+?)(?:-\d+-of-\d+)?\.(?:safetensors|bin)$", name) for name in names)
    return {match[1] for match in found if match}


def _aliases(pipeline: str, name: str, index: dict[str, Any], *, own_folder: bool = False) -> tuple[str, ...]:
    """Folders in which a component may lie: Stage C's scheduler is `scheduler` where Stage C lives alone."""
    alone = own_folder or "decoder" not in index
    if name == "prior_scheduler" and alone:
        return ("prior_scheduler", "scheduler")
    if name == "scheduler" and "Prior" in pipeline:
        return ("prior_scheduler", "scheduler") if alone else ("prior_scheduler",)
    # diffusers' whole pipeline saves Stage C's parts under names of its own.
    names = (name, f"prior_{name}") if f"prior_{name}" in OF_PRIOR else (name,)
    return names[::-1] if "Prior" in pipeline else names
