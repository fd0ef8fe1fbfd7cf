"""What trains beside frozen networks: adapters and token rows, started anew or from a file."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from stable_cascade.adapters import LearnedTokens, add_learned_tokens, add_lora, add_token_rows, read_learned_embeds
from stable_cascade.adapters.injection import lora_scales_of
from stable_cascade.adapters.load import LoraFile
from stable_cascade.adapters.lora import layer_shapes, lora_path, read_lora
from stable_cascade.adapters.tokens import EMBEDS_NAME
from stable_cascade.models.clip import TextEmbedder

from .networks import text_encoder

TEXT_FILTERS = ("q_proj", "k_proj", "v_proj", "out_proj")
"""The layers of the text encoder that get an adapter when the config names none."""


def add_config_lora(config: Any, prior: Any) -> list[str]:
    """Names of the layers that got an adapter as the config says, started from `lora_checkpoint_path` if it is set.

    Works on the meta device too, where it is the check of these keys.

    Raises:
        ValueError: the filters match nothing, or the file is of another rank, scale or choice of layers.
    """
    # Put new adapters on the layers that the config names.
    targets = add_lora(
        prior,
        module_filters=config.module_filters,
        rank=config.rank,
        module_excludes=config.module_excludes,
        rank_pattern=config.rank_pattern,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        use_dora=config.use_dora,
        seed=config.seed,
    )
    # Start them from a file.
    if config.lora_checkpoint_path:
        lora, where = read_lora(config.lora_checkpoint_path), f"lora_checkpoint_path '{config.lora_checkpoint_path}'"
        has = ", ".join(sorted(lora.parts))
        if "prior" not in lora.parts:
            raise ValueError(f"{where} has nothing for the prior, only {has}; name another file")
        if "text_encoder" in lora.parts and not config.train_text_encoder:
            raise ValueError(f"{where} has adapters for the text encoder too; set train_text_encoder: True")
        _start_from(lora, where, prior, "prior", _settings(config, _PRIOR_KEYS))
    return targets


def add_config_text_lora(config: Any, encoder: Any) -> list[str]:
    """Names of the text encoder's layers that got an adapter; they start from `lora_checkpoint_path` if it has them.

    The scale is the prior's, `lora_alpha / rank`.

    Raises:
        ValueError: as `add_config_lora`.
    """
    rank = config.text_encoder_rank or config.rank
    targets = add_lora(
        encoder,
        module_filters=config.text_encoder_module_filters or TEXT_FILTERS,
        rank=rank,
        lora_alpha=config.lora_alpha / config.rank * rank,
        lora_dropout=config.lora_dropout,
        use_dora=config.use_dora,
        seed=config.seed,
    )
    if config.lora_checkpoint_path:
        lora, where = read_lora(config.lora_checkpoint_path), f"lora_checkpoint_path '{config.lora_checkpoint_path}'"
        if "text_encoder" in lora.parts:
            _start_from(lora, where, encoder, "text_encoder", _settings(config, _TEXT_KEYS))
    return targets


_PRIOR_KEYS = ("module_filters", "module_excludes", "rank", "rank_pattern", "use_dora")
_TEXT_KEYS = ("text_encoder_module_filters", "text_encoder_rank", "rank", "use_dora")


def _settings(config: Any, keys: tuple[str, ...]) -> dict[str, Any]:
    return {key: getattr(config, key) for key in keys if getattr(config, key) is not None}


def _start_from(lora: LoraFile, where: str, model: Any, component: str, settings: Mapping[str, Any]) -> None:
    """Put one component's values of a LoRA file into the adapters, which have to be just those of the file."""
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    # The file's tensors under our names; each has to have the shape of the adapter's.
    part = lora.part(component, layer_shapes(model), settings.get("module_filters"))
    values = part.tensors
    own = get_peft_model_state_dict(model, save_embedding_layers=False)
    wanted = {name: value.shape for name, value in own.items()}
    given = {name: value.shape for name, value in values.items()}
    odd = sorted(name for name in wanted.keys() | given.keys() if wanted.get(name) != given.get(name))
    if odd:
        shapes = [list(shapes[odd[0]]) if odd[0] in shapes else "absent" for shapes in (given, wanted)]
        said = ", ".join(f"{key} {value}" for key, value in settings.items())
        raise ValueError(
            f"{where} differs from {said} in '{odd[0]}': {shapes[0]} in the file, {shapes[1]} here; "
            "set them as it was trained"
        )
    # The scales have to be the same as well.
    wanted_scales = lora_scales_of(model)
    for name, scale in part.scales.items():
        if abs(scale - wanted_scales[name]) > 1e-6 * abs(scale):
            raise ValueError(
                f"{where} was trained with another lora_alpha: '{name}' has the scale {scale:g} there, "
                f"{wanted_scales[name]:g} here; set lora_alpha: {scale * settings['rank']:g}"
            )
    if not next(model.parameters()).is_meta:
        set_peft_model_state_dict(model, values, "default")


def learned_tokens(config: Any, tokenizer: Any, text_encoder: Any) -> LearnedTokens | None:
    """The token rows that train, put into the text encoder; those beside `lora_checkpoint_path` go on from there.

    Raises:
        ValueError: `train_tokens` matches nothing, or leaves out a token of that file.
    """
    before: dict[str, Tensor] = {}
    if config.lora_checkpoint_path:
        beside = lora_path(config.lora_checkpoint_path).parent / EMBEDS_NAME
        before = read_learned_embeds(beside) if beside.exists() else {}
    if before:
        add_token_rows(tokenizer, text_encoder, before)
    tokens = add_learned_tokens(tokenizer, text_encoder, config.train_tokens)
    lost = [token for token in before if tokens is None or token not in tokens.tokens]
    if lost:
        raise ValueError(
            f"lora_checkpoint_path '{config.lora_checkpoint_path}' comes with the token '{lost[0]}', which "
            f"train_tokens leaves out; add ['{lost[0]}', null]"
        )
    return tokens


def trainable_text(config: Any) -> TextEmbedder | None:
    """The text encoder if something in it trains: token rows, adapters or both."""
    if not (config.train_tokens or config.lora_checkpoint_path or config.train_text_encoder):
        return None
    tokenizer, encoder = text_encoder(config, dtype=getattr(torch, config.dtype))
    tokens = learned_tokens(config, tokenizer, encoder)
    if config.train_text_encoder:
        add_config_text_lora(config, encoder)
    return TextEmbedder(encoder, tokenizer) if tokens is not None or config.train_text_encoder else None


def learning_rate(config: Any) -> Callable[[str], float] | None:
    """Name of a parameter of the composed model -> its learning rate; None where all have `lr`."""
    if config.token_lr is None and config.text_encoder_lr is None:
        return None

    def rate(name: str) -> float:
        if name.endswith(".rows"):
            own = config.token_lr
        else:
            own = config.text_encoder_lr if name.startswith("text.") else None
        return config.lr if own is None else own

    return rate
