"""A Hub repository in diffusers' layout, downloaded as far as a pipeline needs it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from stable_cascade.hub import ask

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
