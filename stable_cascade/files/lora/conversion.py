"""From one tool's LoRA file to another's: the network's weights are not needed, its layers' names and shapes are."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from os import PathLike
from pathlib import Path

import torch
from torch import Tensor

from stable_cascade.disk import local_path
from stable_cascade.files.writing import whole, write_tensors
from stable_cascade.wording import quoted

from .file import FILTERS_KEY, LoraFile
from .keys import format_name
from .metadata import WEIGHT_NAME
from .names import Shapes
from .part import Part
from .positional import as_original, original_token_tensors
from .reading import read
from .report import Report
from .writing import BUNDLED_TOKENS, WRITERS, carried, check_holds

EMBEDS_NAME = "learned_embeds.safetensors"
TOKEN_KEY = "token"
"""Header entry of a token's own file: the token, which its file name may not be able to spell."""


def convert(
    source: str | PathLike[str] | Mapping[str, Tensor] | LoraFile,
    target: str | PathLike[str],
    format: str,
    *,
    layers: Mapping[str, Shapes],
    module_filters: Sequence[str] | None = None,
    metadata: Mapping[str, str] | None = None,
) -> Report:
    """Writes a LoRA file in another tool's format, in its own dtype, and says how faithful that is.

    Args:
        layers: component -> weight shape of every linear and convolution layer of the network it is for.
        module_filters: of the original's format, from which or to which this goes.
        metadata: more entries for the header.

    Raises:
        ValueError: the file cannot be read or does not fit the network, or the format cannot hold what is in it.
    """
    format = format_name(format)  # before anything is read
    lora = source if isinstance(source, LoraFile) else read(source)
    return write(target, lora, format, layers=layers, module_filters=module_filters, metadata=metadata)


def write(
    target: str | PathLike[str],
    lora: LoraFile,
    format: str,
    *,
    layers: Mapping[str, Shapes],
    module_filters: Sequence[str] | None = None,
    metadata: Mapping[str, str] | None = None,
) -> Report:
    """Writes a LoRA that was read; see `convert`.

    A target without `.safetensors` is a folder in diffusers' layout for `peft`, and an error for the others. Tokens go
    where the tool looks for them: into the file (OneTrainer, and the original as rows to add), into
    `learned_embeds.safetensors` (a folder), or into a folder `<name>_embeddings` with a file for each.
    """
    format, path = format_name(format), local_path(target)
    if path.suffix != ".safetensors" and format != "peft":
        raise ValueError(f"target {quoted(target)} does not end in .safetensors, as a file in {format} format has to")
    file = path if path.suffix == ".safetensors" else path / WEIGHT_NAME
    report = Report(lora.name, lora.format, str(target), format)
    try:
        check_tokens(lora, format)
        filters = None if format == "original" else module_filters
        parts = {component: lora.part(component, layers[component], filters) for component in lora.parts}
        check_holds(format, parts, report)
        tensors, header = _encoded(format, parts, lora, layers, module_filters, report)
    except ValueError as problem:
        named = str(problem).startswith(quoted(lora.name))
        raise ValueError(str(problem) if named else f"{quoted(lora.name)} {problem}") from None
    report.layers = {component: len(part.layers) for component, part in parts.items()}
    header = {**carried(lora.header, format, parts, report), **header, **(metadata or {})}
    report.tokens = [*lora.tokens, *(f"id {token}" for token in lora.token_deltas)]
    if tensors:
        _save(file, tensors, header, report)
    if lora.tokens and format not in BUNDLED_TOKENS:
        _save_tokens(file, lora.tokens, path.suffix != ".safetensors", report)
    return report


def check_tokens(lora: LoraFile, format: str) -> None:
    """Passes when a format can hold the file's tokens.

    Raises:
        ValueError: it cannot as they are.
    """
    if lora.output_tokens and format not in BUNDLED_TOKENS:
        name = next(iter(lora.output_tokens))
        raise ValueError(
            f"has the output embedding {quoted(name, 60)}, which only OneTrainer knows; write onetrainer or "
            "onetrainer_diffusers"
        )
    if lora.tokens and format == "original":
        raise ValueError(
            "has learned tokens, which the original stores as differences to the base's rows; give base and "
            "train_tokens"
        )
    if lora.token_deltas and format != "original":
        raise ValueError(
            "has learned tokens as differences to the base's rows, and without their names; give base and train_tokens"
        )


def _encoded(
    format: str,
    parts: Mapping[str, Part],
    lora: LoraFile,
    layers: Mapping[str, Shapes],
    module_filters: Sequence[str] | None,
    report: Report,
) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and header of the new file."""
    if format != "original":
        tensors, header = WRITERS[format](parts, report) if parts else ({}, {})
        if format in BUNDLED_TOKENS:
            tensors |= {f"bundle_emb.{name}.clip_g": rows for name, rows in lora.tokens.items()}
            tensors |= {f"bundle_emb.{name}.clip_g_out": rows for name, rows in lora.output_tokens.items()}
        return tensors, header
    if "prior" not in parts:
        raise ValueError("has nothing for the prior, and the original's files hold nothing else; write another format")
    stored = lora.header.get(FILTERS_KEY, "").split() if lora.format != "original" else []
    tensors, filters = as_original(parts["prior"], layers["prior"], module_filters or stored or None, report)
    return tensors | original_token_tensors(lora.token_deltas), {FILTERS_KEY: " ".join(filters)}


def _save(path: Path, tensors: Mapping[str, Tensor], header: Mapping[str, str], report: Report) -> None:
    """Writes a file whole or not at all, so that it may replace its own source.

    Raises:
        ValueError: a folder has its name.
    """
    if path.is_dir():
        raise ValueError(f"target {quoted(path)} is a folder and is not replaced; name another place")
    own = {key: value.clone() for key, value in tensors.items()}  # layers may share one, which safetensors refuses
    with whole(path) as temporary:
        write_tensors(temporary, own, header)
    report.files.append(str(path))


def _save_tokens(file: Path, tokens: Mapping[str, Tensor], is_folder: bool, report: Report) -> None:
    """Rows in files of their own: one for all in diffusers' layout, one each, key `clip_g`, for the others."""
    if is_folder:
        rows = {name: value[0] if len(value) == 1 else value for name, value in tokens.items()}
        return _save(file.parent / EMBEDS_NAME, rows, {"format": "pt"}, report)
    folder = tokens_folder(file)
    for number, (name, value) in enumerate(tokens.items()):
        stem = re.sub(r"[^\w.-]+", "", name) or f"token{number}"
        _save(folder / f"{stem}.safetensors", {"clip_g": value}, {"format": "pt", TOKEN_KEY: name}, report)
    report.note(f"Learned tokens are files of their own, in {folder.name}.")
    return None


def tokens_folder(file: Path) -> Path:
    """The folder beside a LoRA file with its learned tokens, one file each."""
    return file.with_name(f"{file.stem}_embeddings")


def with_tokens(lora: LoraFile, rows: Mapping[str, Tensor]) -> LoraFile:
    """The LoRA with these tokens' rows in place of its own. Shapes: (D,) or (n, D) per token."""
    tokens = {name: row if row.ndim == 2 else row[None] for name, row in rows.items()}
    return replace(lora, tokens=tokens, token_deltas={})


def with_deltas(lora: LoraFile, deltas: Mapping[int, Tensor]) -> LoraFile:
    """The LoRA with its tokens as differences to the base's rows, by id. Shapes: (D,) per token."""
    return replace(lora, tokens={}, token_deltas={token: row.to(torch.float32) for token, row in deltas.items()})
