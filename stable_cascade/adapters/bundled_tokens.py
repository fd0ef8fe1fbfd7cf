"""Learned tokens that come with a LoRA, in it or beside it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from stable_cascade.files import lora as files
from stable_cascade.files.lora.conversion import TOKEN_KEY
from stable_cascade.files.tensor_files import read_tensors
from stable_cascade.wording import quoted

from .tokens import check_token_rows, restart_rows


def usable_rows(
    pipeline: Any, lora: files.LoraFile, train_tokens: Sequence[Sequence[str | None]] | None
) -> dict[str, Tensor]:
    """Token -> row of all tokens that come with a LoRA; checked, so that adding them to the pipeline cannot fail.

    Raises:
        ValueError: they need what the pipeline has not, or are none that it can use.
    """
    if not (lora.tokens or lora.token_deltas or lora.output_tokens):
        return {}
    if getattr(pipeline, "text_encoder", None) is None:
        raise ValueError(f"'{lora.name}' has learned tokens, which need a text_encoder, and this pipeline has none")
    output = next(iter(lora.output_tokens), None)
    if output is not None:
        raise ValueError(
            f"'{lora.name}' has the output embedding {quoted(output, 60)}, rows that OneTrainer puts into the text "
            "encoder's output, which is not done here; train the token without 'output embedding'"
        )
    several = next((name for name, rows in lora.tokens.items() if len(rows) > 1), None)
    if several is not None:
        raise ValueError(
            f"'{lora.name}' has {len(lora.tokens[several])} rows for the token {quoted(several, 60)}, and one is used "
            "here; train it with a token count of 1"
        )
    rows = {name: row[0] for name, row in lora.tokens.items()}
    if lora.token_deltas:
        rows |= restart_rows(pipeline.tokenizer, pipeline.text_encoder, lora.token_deltas, train_tokens)
    check_token_rows(pipeline.text_encoder, rows)
    return rows


def rows_beside(file: Path) -> dict[str, Tensor]:
    """Tokens with a file each, in the folder beside a LoRA that carries its name.

    Shapes: (n, D) or (D,) per token.

    Raises:
        ValueError: there is a file in it that holds no token.
    """
    rows: dict[str, Tensor] = {}
    # OneTrainer leaves the ending in the folder's name.
    for folder in (files.tokens_folder(file), file.with_name(f"{file.name}_embeddings")):
        for path in sorted(folder.glob("*.safetensors")) if folder.is_dir() else ():
            name, value = _own_file(path)
            rows[name] = value
    return rows


def _own_file(path: Path) -> tuple[str, Tensor]:
    """A token and its rows from a file with key `clip_g`; without a name in its header it is called as the file is."""
    tensors, header = read_tensors(path)
    rows = tensors.get("clip_g", tensors.get("emb_params"))
    if rows is None or len(tensors) > 1 or rows.ndim not in (1, 2) or not rows.numel() or not rows.is_floating_point():
        raise ValueError(f"{quoted(path)} lies where the tokens of a LoRA are; one tensor 'clip_g' is needed in it")
    return header.get(TOKEN_KEY, f"<{path.stem}>"), rows
