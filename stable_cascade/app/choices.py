"""The files that can be chosen on the page: names for people, paths for the program, nothing outside of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from stable_cascade.wording import quoted

NONE = "none"
MOST_LORAS = 500


def lora_files(folder: Path | None) -> dict[str, Path]:
    """Name -> file of every .safetensors in the folder and its subfolders, sorted; links that lead out are left out.

    Learned tokens that lie beside a LoRA (`learned_embeds.safetensors`) come with it and are no choice.
    """
    if folder is None:
        return {}
    root, found = folder.resolve(), {}
    for path in sorted(folder.rglob("*.safetensors")):
        if path.name == "learned_embeds.safetensors" or not path.is_file() or not path.resolve().is_relative_to(root):
            continue
        found[_lora_name(path.relative_to(folder))] = path
        if len(found) == MOST_LORAS:
            break
    return found


def controlnet_paths(paths: Iterable[Path]) -> dict[str, Path]:
    """Name -> path, each name as short a tail of the path as tells it from the others."""
    return {_tail(path, list(paths)): path for path in paths}


def chosen(kind: str, name: object, known: Mapping[str, Path]) -> Path | None:
    """The path of a name; None for `none`.

    Raises:
        ValueError: a name that is not among the known ones.
    """
    if name in (None, "", NONE):
        return None
    if not isinstance(name, str) or name not in known:
        raise ValueError(f"{kind} {quoted(name)} is not among the files the page was started with; choose it again")
    return known[name]


def name_of(path: str, known: Mapping[str, Path]) -> str | None:
    """The name under which a path is known, or a file of the same name where that is only one; None without."""
    same = [name for name, place in known.items() if str(place) == path]
    alike = [name for name, place in known.items() if place.name == Path(path).name]
    if same:
        return same[0]
    return alike[0] if len(alike) == 1 else None


def _lora_name(path: Path) -> str:
    """Diffusers' folders hold one file of always the same name; the folder's says more."""
    if path.name == "pytorch_lora_weights.safetensors" and path.parent != Path():
        return path.parent.as_posix()
    return path.as_posix()


def _tail(path: Path, paths: Sequence[Path]) -> str:
    parts = path.parts
    for length in range(1, len(parts) + 1):
        tail = parts[-length:]
        if sum(other.parts[-length:] == tail for other in paths) == 1:
            return "/".join(tail)
    return str(path)
