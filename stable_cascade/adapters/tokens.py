"""Learned tokens: a few rows of the text encoder's token embedding train, everything else stays as it is."""

from __future__ import annotations

import difflib
import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stable_cascade.disk import local_path
from stable_cascade.files import lora as files
from stable_cascade.files.lora.conversion import TOKEN_KEY
from stable_cascade.files.tensor_files import read_tensors, read_weights
from stable_cascade.wording import quoted

logger = logging.getLogger(__name__)

EMBEDS_NAME = "learned_embeds.safetensors"


class LearnedTokens(nn.Module):
    """A token embedding whose frozen table is overridden by trainable float32 rows at a few ids."""

    slots: Tensor

    def __init__(self, weight: Tensor, tokens: Mapping[str, int], rows: Tensor):
        """Takes the table `weight` (V, D), the learned tokens with their ids, and their first values (n, D)."""
        super().__init__()
        self.weight = nn.Parameter(weight.detach(), requires_grad=False)
        self.rows = nn.Parameter(rows.detach().to(weight.device, torch.float32, copy=True))
        self.tokens = dict(tokens)
        slots = torch.full((weight.shape[0],), -1, dtype=torch.int64, device=weight.device)
        slots[list(self.tokens.values())] = torch.arange(len(self.tokens), device=weight.device)
        self.register_buffer("slots", slots, persistent=False)

    @property
    def num_embeddings(self) -> int:
        """Rows of the table, as nn.Embedding has it."""
        return self.weight.shape[0]

    @property
    def embedding_dim(self) -> int:
        """Width of a row, as nn.Embedding has it."""
        return self.weight.shape[1]

    def forward(self, input_ids: Tensor) -> Tensor:
        """Looks ids up, learned rows first.

        Shapes: (...) -> (..., D), in the table's dtype.
        """
        base = F.embedding(input_ids, self.weight)
        slot = self.slots[input_ids]
        learned = F.embedding(slot.clamp(min=0), self.rows).to(base.dtype)
        return torch.where((slot >= 0).unsqueeze(-1), learned, base)

    def embeds(self, rows: Tensor | None = None) -> dict[str, Tensor]:
        """Token -> its row, float32 on the CPU; `rows` replaces the live values (an average, for example).

        Shapes: one (D,) per token.
        """
        values = (self.rows if rows is None else rows).detach().to("cpu", torch.float32)
        return {token: row.clone() for token, row in zip(self.tokens, values, strict=True)}

    def merged(self) -> nn.Embedding:
        """A plain embedding with the learned rows written into the table."""
        weight = self.weight.detach().clone()
        weight[list(self.tokens.values())] = self.rows.detach().to(weight.dtype)
        return nn.Embedding.from_pretrained(weight, freeze=True)


def add_learned_tokens(
    tokenizer: Any, text_encoder: Any, train_tokens: Sequence[Sequence[str | None]] | None
) -> LearnedTokens | None:
    """The trainable rows that `train_tokens` asks for, put in place of the token embedding; None if it asks for none.

    An entry `['[name]', regex]` (or `<name>`) adds a token that starts as the mean of the vocabulary rows matching the
    regex; `['regex', None]` trains the existing rows that match. Vocabulary entries that end a word carry `</w>`.
    A new token that the tokenizer already knows keeps its row, so that a training can go on from its own result.

    Raises:
        ValueError: an entry is not a pair, a regex is invalid, or a bare regex matches no token.
    """
    if not train_tokens:
        return None
    # A row for every token: its own where it exists, otherwise that of a word it starts from.
    vocabulary = tokenizer.get_vocab()
    table = _table(text_encoder)
    rows: dict[str, Tensor] = {}
    for entry in train_tokens:
        name, pattern = _checked(entry)
        if not _is_new(name):
            rows.update({token: table[vocabulary[token]] for token in _existing(vocabulary, name)})
        elif name in vocabulary:
            rows[name] = table[vocabulary[name]]
        else:
            rows[name] = _first_value(table, vocabulary, name, pattern)
    # Make room for the new ones, and put the trainable rows in place.
    tokens = _grow(tokenizer, text_encoder, list(rows))
    learned = LearnedTokens(_table(text_encoder), tokens, torch.stack([row.float() for row in rows.values()]))
    text_encoder.set_input_embeddings(learned)
    return learned


def tokens_of(tokenizer: Any, entry: Sequence[str | None]) -> list[str]:
    """The tokens that one entry of `train_tokens` trains: the new one, or those of the vocabulary that match.

    Raises:
        ValueError: as `add_learned_tokens`.
    """
    name, _ = _checked(entry)
    return [name] if _is_new(name) else _existing(tokenizer.get_vocab(), name)


def add_token_rows(tokenizer: Any, text_encoder: Any, embeds: Mapping[str, Tensor]) -> None:
    """Writes rows into the token embedding for use: known tokens are overwritten, the others added.

    Shapes: (D,) or (1, D) per token.

    Raises:
        ValueError: a row has another width than the text encoder.
    """
    check_token_rows(text_encoder, embeds)
    tokens = _grow(tokenizer, text_encoder, list(embeds))
    weight = text_encoder.get_input_embeddings().weight
    with torch.no_grad():
        for token, index in tokens.items():
            weight[index] = embeds[token].reshape(-1).to(weight)


def check_token_rows(text_encoder: Any, embeds: Mapping[str, Tensor]) -> None:
    """Passes when rows are as wide as the text encoder's.

    Raises:
        ValueError: one is not.
    """
    width = _table(text_encoder).shape[1]
    for token, row in embeds.items():
        if row.numel() != width:
            raise ValueError(
                f"learned token {quoted(token)} has width {row.numel()}, this text encoder has {width}; "
                "it was trained with another text encoder"
            )


def save_learned_embeds(directory: str | Path, embeds: Mapping[str, Tensor]) -> Path:
    """Writes `learned_embeds.safetensors`, token -> row, as textual inversion files are laid out."""
    from safetensors.torch import save_file

    path = local_path(directory) / EMBEDS_NAME
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({token: row.detach().cpu().contiguous() for token, row in embeds.items()}, path, {"format": "pt"})
    return path


def read_learned_embeds(path: str | Path, token: str | None = None) -> dict[str, Tensor]:
    """Token -> row from a textual inversion file.

    Args:
        token: the name to use when the file holds one unnamed row (keys `emb_params` or `clip_g`).

    Raises:
        ValueError: the file is damaged or holds something else, or the row has no name and `token` gives none.
    """
    (embeds, header), named = read_weights(path), f"learned tokens {quoted(path)}"
    if "clip_g_out" in embeds:
        raise ValueError(f"{named} are output embeddings of OneTrainer, which are not used here; train without them")
    # An unnamed row takes its name from the caller or from the header.
    unnamed = next((key for key in ("emb_params", "clip_g") if key in embeds), None)
    token = token or (header.get("token") if unnamed else None)
    if unnamed is not None and token is None:
        raise ValueError(f"{named} do not name their token; pass token='[name]'")
    if token is not None and (unnamed or len(embeds) == 1):
        embeds = {token: embeds[unnamed or min(embeds)]}
    # Every token is one finite row.
    if not embeds:
        raise ValueError(f"{named} are none: the file is empty")
    for name, row in embeds.items():
        if not row.is_floating_point() or row.ndim not in (1, 2) or row.shape[:-1].numel() != 1 or not row.numel():
            what = f"{tuple(row.shape)} {str(row.dtype).removeprefix('torch.')}"
            raise ValueError(f"{named} have {what} for {quoted(name)}; one row of floating-point numbers is a token")
        if not row.float().isfinite().all():
            raise ValueError(f"{named} have values for {quoted(name)} that are not finite; train it again")
    return {name: row.reshape(-1) for name, row in embeds.items()}


def restart_rows(
    tokenizer: Any,
    text_encoder: Any,
    deltas: Mapping[int, Tensor],
    train_tokens: Sequence[Sequence[str | None]] | None,
) -> dict[str, Tensor]:
    """Token -> row from an original LoRA file, which stores what to ADD to a row and not the token's name.

    New tokens are rebuilt as the training started them, so their `train_tokens` entries are needed, in their order.

    Raises:
        ValueError: the file has tokens outside the vocabulary and `train_tokens` does not account for them.
    """
    # Ids beyond the vocabulary are the training's new tokens, in the order of train_tokens.
    vocabulary, table = tokenizer.get_vocab(), _table(text_encoder)
    names = {index: token for token, index in vocabulary.items()}
    entries = [_checked(entry) for entry in train_tokens or []]
    added = [(name, pattern) for name, pattern in entries if _is_new(name) and name not in vocabulary]
    unknown = sorted(index for index in deltas if index not in names)
    if len(unknown) != len(added):
        raise ValueError(
            f"the LoRA file has {len(unknown)} new token(s) {unknown}, train_tokens names {len(added)}; "
            "pass the training's train_tokens, e.g. [['[fernando]', '^dog</w>']]"
        )
    width = table.shape[1]
    wrong = next((delta for delta in deltas.values() if delta.shape[-1] != width), None)
    if wrong is not None:
        raise ValueError(f"the LoRA file's tokens have width {wrong.shape[-1]}, this text encoder has {width}")
    # Add the differences to the rows that the training started from.
    rows = {names[index]: table[index].float() + delta for index, delta in deltas.items() if index in names}
    for index, (name, pattern) in zip(unknown, added, strict=True):
        rows[name] = _first_value(table, vocabulary, name, pattern).float() + deltas[index]
    return rows


def original_deltas(
    tokenizer: Any,
    text_encoder: Any,
    rows: Mapping[str, Tensor],
    train_tokens: Sequence[Sequence[str | None]] | None,
) -> dict[int, Tensor]:
    """Token id -> what an original LoRA file adds to that row: the reverse of `restart_rows`.

    Without `train_tokens` every token is a new one that starts as zeros.

    Raises:
        ValueError: `train_tokens` leaves a token out, or a row has another width than the text encoder.
    """
    check_token_rows(text_encoder, rows)
    vocabulary, table = tokenizer.get_vocab(), _table(text_encoder)
    entries = [_checked(entry) for entry in train_tokens or [[name, None] for name in rows]]
    deltas: dict[int, Tensor] = {}
    free = len(vocabulary)
    named: set[str] = set()
    # Number the tokens as the training did: new ones behind the vocabulary, others by their id.
    for name, pattern in entries:
        if _is_new(name) and name not in vocabulary:
            start, named = _first_value(table, vocabulary, name, pattern).float(), named | {name}
            deltas[free] = rows[name].reshape(-1).float() - start if name in rows else torch.zeros_like(start)
            free += 1
            continue
        for token in [name] if name in vocabulary else _existing(vocabulary, name):
            start, named = table[vocabulary[token]].float(), named | {token}
            deltas[vocabulary[token]] = rows.get(token, start).reshape(-1).float() - start
    # Every row must have found its number.
    left = next((name for name in rows if name not in named), None)
    if left is not None:
        raise ValueError(
            f"train_tokens leaves out the token {quoted(left, 60)}; add [{quoted(left, 60)}, regex or null] to it"
        )
    return deltas


def _table(text_encoder: Any) -> Tensor:
    """The token embedding's table as it is used now, learned rows included."""
    embedding = text_encoder.get_input_embeddings()
    return (embedding.merged() if isinstance(embedding, LearnedTokens) else embedding).weight.detach()


def _is_new(name: str) -> bool:
    return (name[0], name[-1]) in {("[", "]"), ("<", ">")} and len(name) > 2


def _checked(entry: Any) -> tuple[str, str | None]:
    pair = [entry] if isinstance(entry, str) else list(entry)
    if len(pair) != 2 or not isinstance(pair[0], str) or not pair[0] or not isinstance(pair[1], str | None):
        raise ValueError(
            f"train_tokens entry {entry!r} is not [token, regex or null]; "
            "write ['[name]', '^dog</w>'] for a new token, ['^snail', null] to train existing ones"
        )
    return pair[0], pair[1]


def _search(pattern: str, vocabulary: Mapping[str, int]) -> list[str]:
    try:
        compiled = re.compile(pattern)
    except re.error as problem:
        raise ValueError(f"train_tokens regex '{pattern}' is invalid: {problem}; escape brackets with \\") from None
    return sorted((token for token in vocabulary if compiled.search(token)), key=vocabulary.__getitem__)


def _existing(vocabulary: Mapping[str, int], pattern: str) -> list[str]:
    found = _search(pattern, vocabulary)
    if not found:
        word = re.sub(r"\W", "", pattern.replace("</w>", ""))
        nearest = difflib.get_close_matches(word + "</w>", list(vocabulary), n=3, cutoff=0)
        raise ValueError(
            f"train_tokens '{pattern}' matches no token of the vocabulary; nearest: {', '.join(map(repr, nearest))}; "
            "a new token is written [name]"
        )
    return found


def _first_value(table: Tensor, vocabulary: Mapping[str, int], name: str, pattern: str | None) -> Tensor:
    """The mean of the rows matching the regex, zeros without one."""
    found = [] if pattern is None else _search(pattern, vocabulary)
    if pattern is not None and not found:
        logger.warning("train_tokens '%s': regex '%s' matches no token, so it starts as zeros", name, pattern)
    if not found:
        return torch.zeros_like(table[0])
    return table[[vocabulary[token] for token in found]].float().mean(0)


def _grow(tokenizer: Any, text_encoder: Any, names: list[str]) -> dict[str, int]:
    """Adds the tokens that are missing, with zero rows, and gives the id of each; the embedding becomes plain."""
    vocabulary = tokenizer.get_vocab()
    missing = [name for name in names if name not in vocabulary]
    if missing:
        tokenizer.add_tokens(missing)
    vocabulary = tokenizer.get_vocab()
    table = _table(text_encoder)
    extra = max(vocabulary[name] for name in names) + 1 - table.shape[0]
    weight = F.pad(table, (0, 0, 0, max(extra, 0)))
    text_encoder.set_input_embeddings(nn.Embedding.from_pretrained(weight, freeze=True))
    for module in text_encoder.modules():
        if hasattr(module, "config"):
            module.config.vocab_size = weight.shape[0]
    if missing:
        _pool_at_end_of_text(tokenizer, text_encoder)
    return {name: vocabulary[name] for name in names}


def _pool_at_end_of_text(tokenizer: Any, text_encoder: Any) -> None:
    """Pools at the end-of-text token by its id.

    Configs with `eos_token_id` 2, a mistake of old files, pool at the highest id of the caption. That is the end of
    the text until a token is added behind it; from then on it would be the learned token.
    """
    for module in text_encoder.modules():
        if getattr(module, "eos_token_id", None) == 2:
            module.eos_token_id = tokenizer.eos_token_id
        if getattr(getattr(module, "config", None), "eos_token_id", None) == 2:
            module.config.eos_token_id = tokenizer.eos_token_id


def usable_rows(
    pipeline: Any, lora: files.LoraFile, train_tokens: Sequence[Sequence[str | None]] | None
) -> dict[str, Tensor]:
    """Token -> row of all tokens that come with a LoRA; checked, so that adding them to the pipeline cannot fail.

    Raises:
        ValueError: they need what the pipeline has not, or are none that it can use.
    """
    if not (lora.tokens or lora.token_deltas or lora.output_tokens):
        return {}
    # What this pipeline cannot use.
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
    # Rows as they are, and those that are stored as differences.
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
