"""Where a LoRA is: a file, a folder, the Hub or a state dict, and the learned tokens that lie beside it."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from stable_cascade.disk import local_path
from stable_cascade.files import lora as files
from stable_cascade.hub import hub_file
from stable_cascade.wording import quoted

from .bundled_tokens import rows_beside
from .loading import lora_path
from .tokens import EMBEDS_NAME, read_learned_embeds

Source = str | os.PathLike | Mapping[str, Tensor]


def read_with_tokens(
    source: Source, weight_name: str | None = None, hub: Mapping[str, Any] | None = None
) -> files.LoraFile:
    """A LoRA of any format with its learned tokens, those in the file and those beside it.

    Tokens beside a file are in `learned_embeds.safetensors` of its folder, where it is in diffusers' layout, or one
    each in the folder `<name>_embeddings`.

    Args:
        weight_name: the file in a folder that holds several.
        hub: revision, token, cache_dir and so on, for a Hub name.

    Raises:
        ValueError: there is neither a LoRA nor a token, or one cannot be read.
    """
    file, embeds = _located(source, weight_name, hub or {})
    lora = files.read(file) if file is not None else files.LoraFile(str(source), "peft", {})
    beside = read_learned_embeds(embeds) if embeds is not None else {}
    if isinstance(file, Path):
        beside |= rows_beside(file)
    twice = next((name for name in beside if name in lora.tokens), None)
    if twice is not None:
        raise ValueError(
            f"{quoted(lora.name)} has the token {quoted(twice, 60)}, and so has a file beside it; move one away"
        )
    rows = {name: row if row.ndim == 2 else row[None] for name, row in beside.items()}
    lora = replace(lora, tokens={**lora.tokens, **rows})
    if not (lora.parts or lora.tokens or lora.token_deltas or lora.output_tokens):
        raise ValueError(f"{quoted(lora.name)} has neither a LoRA nor {EMBEDS_NAME}")
    return lora


def _located(
    source: Source, weight_name: str | None, hub: Mapping[str, Any]
) -> tuple[Path | Mapping[str, Tensor] | None, Path | None]:
    """The LoRA (file or state dict) and the learned tokens' file that a name means; None for what is not there."""
    if isinstance(source, Mapping):
        return source, None
    path = local_path(source)
    if not path.exists() and str(source).count("/") == 1 and not path.suffix:
        embeds = from_hub(str(source), EMBEDS_NAME, hub, missing_ok=True)
        if weight_name is None and from_hub(str(source), files.CONFIG_NAME, hub, missing_ok=True) is not None:
            safe, pickled = files.ADAPTER_NAMES
            return from_hub(str(source), safe, hub, missing_ok=True) or from_hub(str(source), pickled, hub), embeds
        file = from_hub(str(source), weight_name or files.WEIGHT_NAME, hub, missing_ok=embeds is not None)
        return file, embeds
    beside = (path if path.is_dir() else path.parent) / EMBEDS_NAME
    only_tokens = path.is_dir() and beside.exists() and len(list(path.glob("*.safetensors"))) == 1
    if only_tokens or path.name == EMBEDS_NAME:
        return None, beside
    embeds = beside if beside.exists() and (path.is_dir() or path.name == files.WEIGHT_NAME) else None
    return lora_path(path, weight_name), embeds


def from_hub(name: str, file: str, hub: Mapping[str, Any], *, missing_ok: bool = False) -> Any:
    """A file of a Hub repository on this disk; None where it is not there and may be missing.

    Raises:
        ValueError: the repository has no such file.
    """
    try:
        return hub_file(name, file, **hub)
    except FileNotFoundError:
        if missing_ok:
            return None
        raise ValueError(f"'{name}' has no file {file} on the Hub; download the LoRA, or name its file") from None
