"""Files of learned tokens alone: diffusers' with a row under each token's name, the others with one unnamed token."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from stable_cascade.disk import local_path
from stable_cascade.wording import brief, quoted

from .tensor_files import check_target, read_weights, whole, write_tensors

FORMATS = ("diffusers", "comfyui")
"""`diffusers`: token -> rows, for `load_textual_inversion`. `comfyui`: rows under `clip_g`, OneTrainer's too."""
ALIASES = {"peft": "diffusers", "onetrainer": "comfyui", "onetrainer_legacy": "comfyui"}
NAME_KEY = "token"
"""Header entry with the name of a token that its file has under `clip_g`."""
_UNNAMED = ("clip_g", "emb_params")
_OTHERS = {"clip_l": "rows of another text encoder", "clip_g_out": "an output embedding, which only OneTrainer knows"}


@dataclass(frozen=True)
class TokenReport:
    """What was converted: the tokens, the format and place, and what was not carried over."""

    tokens: tuple[str, ...]
    format: str
    target: str
    left: tuple[str, ...] = ()

    def __str__(self) -> str:
        text = f"tokens {', '.join(self.tokens)} -> {self.target} ({self.format}), every value as it was"
        return f"{text}\nnot carried over: {brief(', '.join(self.left), 400)}" if self.left else text


def read_token_file(path: str | Path, token: str | None = None) -> tuple[dict[str, Tensor], tuple[str, ...]]:
    """Rows (n, D) by token, and what else is in the file.

    Args:
        token: the name of an unnamed token, or the one to take out of several.

    Raises:
        ValueError: the token has no name, or the file holds no rows.
    """
    tensors, metadata = read_weights(path)
    # The original's rows are differences: they need their base.
    if "embeddings.indices" in tensors:
        raise ValueError(
            f"{quoted(path)} has the original's learned tokens, differences to rows of its base without the tokens' "
            "names; load it with its base and save the tokens"
        )
    # By name, or one unnamed row whose name the caller or the header knows.
    left = tuple(f"{name} ({what})" for name, what in _OTHERS.items() if name in tensors)
    unnamed = next((name for name in _UNNAMED if name in tensors), None)
    if unnamed is None:
        rows = tensors
        if token is not None:
            if token not in rows:
                raise ValueError(f"{quoted(path)} has no token {quoted(token, 60)}; it has {brief(', '.join(rows))}")
            rows = {token: rows[token]}
    else:
        name = token or metadata.get(NAME_KEY)
        if not name:
            raise ValueError(f"{quoted(path)} does not name its token; add --token '[name]'")
        rows = {name: tensors[unnamed]}
    # One row or several per token.
    wrong = next((name for name, value in rows.items() if value.ndim not in (1, 2)), None)
    if wrong is not None or not rows:
        raise ValueError(f"{quoted(path)} has no rows of a token embedding")
    return {name: value if value.ndim == 2 else value[None] for name, value in rows.items()}, left


def convert_tokens(
    source: str | Path, target: str | Path, format: str, *, token: str | None = None, overwrite: bool = False
) -> TokenReport:
    """Writes learned tokens in another tool's way.

    Raises:
        ValueError: the format is none, cannot hold several tokens, or the target exists.
    """
    # Check format, names and place.
    format = ALIASES.get(format, format)
    if format not in FORMATS:
        raise ValueError(f"format {quoted(format, 60)} of learned tokens is none of {', '.join([*FORMATS, *ALIASES])}")
    place, out = local_path(source), local_path(target)
    check_target(out, place, overwrite=overwrite)
    rows, left = read_token_file(place, token)
    if out.suffix != ".safetensors":
        raise ValueError(f"{quoted(target)}: learned tokens are one file; give a name with .safetensors")
    if format == "comfyui" and len(rows) > 1:
        raise ValueError(f"{quoted(source)} has {len(rows)} tokens, and a {format} file holds one; add --token NAME")
    # ComfyUI keeps one token in a file, under a fixed name.
    with whole(out) as temporary:
        if format == "comfyui":
            ((name, value),) = rows.items()
            write_tensors(temporary, {"clip_g": value}, {NAME_KEY: name})
        else:
            flat = {name: value[0] if len(value) == 1 else value for name, value in rows.items()}
            write_tensors(temporary, flat, {})
    return TokenReport(tuple(rows), format, str(out), left)
