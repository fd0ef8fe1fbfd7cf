"""Where a pipeline's components lie: in one folder or Hub repository, in two, or in single files beside them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from stable_cascade.components import COMPONENTS
from stable_cascade.disk import local_path
from stable_cascade.files.json_files import read_config

from .habits import OF_PRIOR
from .hub import hub_folder

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
