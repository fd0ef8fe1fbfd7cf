"""LoRA through PEFT: added to a frozen network, written, taken out again."""

from __future__ import annotations

import difflib
import hashlib
import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stable_cascade.disk import local_path
from stable_cascade.files import lora as files

from .injection import component_of, inject, layer_shapes
from .load import lora_path as lora_path  # both directions of a file under one name
from .load import read_lora as read_lora
from .tokens import LearnedTokens, save_learned_embeds

logger = logging.getLogger(__name__)


def add_lora(
    model: Any,
    *,
    module_filters: Sequence[str],
    rank: int,
    module_excludes: Sequence[str] | None = None,
    rank_pattern: Mapping[str, int] | None = None,
    lora_alpha: float | None = None,
    lora_dropout: float = 0.0,
    use_dora: bool = False,
    adapter_name: str = "default",
    seed: int = 0,
) -> list[str]:
    """Names of the layers that got a trainable low-rank update; the network itself is frozen.

    The first factor starts uniform, a function of (seed, layer name) only, the second as zeros: training starts from
    the network as it is. Factors are float32 whatever the network's dtype.

    Args:
        module_filters: substrings of layer names, ours or the original's ('.attn' finds the four projections).
        module_excludes: substrings of names of layers that `module_filters` choose and that get no update after all.
        rank_pattern: such a substring -> the rank of the layers that have it; of several the last one counts.
        lora_alpha: every layer's update is scaled by lora_alpha / rank, whatever rank it has; by default 1.

    Raises:
        ValueError: rank below 1, a filter that matches nothing or only depthwise layers, or a name in use.
    """
    from peft import LoraConfig

    # Check the numbers.
    given = {"rank": rank, **{f"rank_pattern '{word}':": own for word, own in (rank_pattern or {}).items()}}
    for key, value in given.items():
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{key} {value!r} is not a positive whole number; 4 to 64 are usual")
    if not 0 <= lora_dropout < 1:
        raise ValueError(f"lora_dropout {lora_dropout} is outside [0, 1)")
    # Choose the layers, each with its rank; alpha / rank is the same for all.
    targets = _targets(model, [module_filters] if isinstance(module_filters, str) else list(module_filters))
    targets = _without(targets, module_excludes or ())
    alpha = rank if lora_alpha is None else lora_alpha
    ranks = _ranks(targets, rank_pattern or {})
    config = LoraConfig(
        r=rank,
        lora_alpha=alpha,  # type: ignore[arg-type]
        rank_pattern={f"^{name}": own for name, own in ranks.items()},
        alpha_pattern={f"^{name}": alpha / rank * own for name, own in ranks.items()},  # type: ignore[misc]
        lora_dropout=lora_dropout,
        use_dora=use_dora,
        target_modules=targets,
    )
    # Freeze the network, inject, and start from the seed.
    model.requires_grad_(False)
    inject(model, config, adapter_name)
    _start(model, adapter_name, seed)
    return targets


def lora_state_dict(
    model: nn.Module, adapter_name: str = "default", overrides: Mapping[str, Tensor] | None = None
) -> dict[str, Tensor]:
    """One adapter in PEFT's layout, on the CPU.

    Args:
        overrides: parameter name -> values to use instead of the live ones (an average of them, for example).

    Raises:
        ValueError: it came from OneTrainer and is of a kind that PEFT does not know.
    """
    from peft import get_peft_model_state_dict

    from .peft_layers import MAGNITUDE

    live = {**model.state_dict(), **(overrides or {})} if overrides else None
    state_dict = get_peft_model_state_dict(
        model, state_dict=live, adapter_name=adapter_name, save_embedding_layers=False
    )
    if any(MAGNITUDE in key for key in state_dict):
        raise ValueError(
            f"adapter '{adapter_name}' is a DoRA of the inputs, which PEFT's files cannot hold; convert its own file"
        )
    return {key: value.detach().cpu().contiguous() for key, value in state_dict.items()}


def save_lora(
    directory: str | Path,
    prior: nn.Module | None = None,
    text_encoder: nn.Module | None = None,
    tokens: LearnedTokens | Mapping[str, Tensor] | None = None,
    *,
    decoder: nn.Module | None = None,
    overrides: Mapping[str, Tensor] | None = None,
    adapter_name: str = "default",
) -> Path:
    """Writes `pytorch_lora_weights.safetensors` with its LoraConfigs, and `learned_embeds.safetensors` for tokens.

    Modules without an adapter are passed over, so the text encoder may always be given; learned tokens found in its
    token embedding are written when `tokens` is not given.

    Args:
        overrides: `prior.<parameter>` and `text_encoder.<parameter>` -> values to write instead of the live ones,
            as an average over the training's composite module names them.
    """
    from safetensors.torch import save_file

    folder = local_path(directory)
    folder.mkdir(parents=True, exist_ok=True)
    # Collect each component's adapter with its config.
    replaced = files.split_components(overrides or {})
    parts, configs = {}, {}
    for component, model in (("prior", prior), ("decoder", decoder), ("text_encoder", text_encoder)):
        if adapter_name in getattr(model, "peft_config", {}):
            parts[component] = lora_state_dict(model, adapter_name, replaced.get(component))  # type: ignore[arg-type]
            configs[component] = model.peft_config[adapter_name].to_dict()  # type: ignore[union-attr, operator, index]
    if parts:
        save_file(files.join_components(parts), folder / files.WEIGHT_NAME, files.write_metadata(configs))
    # Tokens from the text encoder, averaged where an average is kept.
    if tokens is None and text_encoder is not None:
        tokens = next((module for module in text_encoder.modules() if isinstance(module, LearnedTokens)), None)
    if isinstance(tokens, LearnedTokens):
        averages = replaced.get("text_encoder", {})
        tokens = tokens.embeds(next((averages[key] for key in averages if key.endswith("token_embedding.rows")), None))
    if tokens:
        save_learned_embeds(folder, tokens)
    if not parts and not tokens:
        raise ValueError(f"nothing to save in '{folder}': no adapter '{adapter_name}' and no learned tokens")
    return folder


def remove_lora(model: Any) -> None:
    """Takes every adapter out; the network is what it was before the first one."""
    for name, module in list(model.named_modules()):
        if hasattr(module, "base_layer") and hasattr(module, "get_base_layer"):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, module.get_base_layer())
    if hasattr(model, "peft_config"):
        del model.peft_config
    model._hf_peft_config_loaded = False


def _targets(model: Any, filters: list[str]) -> list[str]:
    """The layers that the filters choose, depthwise ones left out because a low rank says nothing about them."""
    layers = list(layer_shapes(model))
    what = component_of(model).replace("_", " ")
    if not filters:
        raise ValueError("module_filters [] chooses no layer; ['.attn'] is usual")
    for word in filters:
        _matching(layers, word, f"module_filters ['{word}'] match no linear layer of the {what}")
    chosen = files.matching_modules(layers, filters)
    targets = [name for name in chosen if getattr(_base(model, name), "groups", 1) == 1]
    if not targets:
        raise ValueError(f"module_filters {filters} match only depthwise convolutions, which have no low rank")
    if len(targets) < len(chosen):
        logger.info("LoRA: %d depthwise convolutions of the %s stay as they are", len(chosen) - len(targets), what)
    return targets


def _matching(layers: Sequence[str], word: str, otherwise: str) -> list[str]:
    """The layers whose name, ours or the original's, contains the word; an error that says the nearest without one."""
    found = files.matching_modules(layers, [word])
    if not found:
        nearest = difflib.get_close_matches(word, files.filter_words(layers), n=3, cutoff=0)
        raise ValueError(f"{otherwise}; nearest: {', '.join(map(repr, nearest))}")
    return found


def _without(targets: list[str], excludes: Sequence[str]) -> list[str]:
    """The layers that no word in `excludes` names."""
    kept = list(targets)
    for word in [excludes] if isinstance(excludes, str) else excludes:
        found = _matching(targets, word, f"module_excludes ['{word}'] match none of the {len(targets)} layers chosen")
        kept = [name for name in kept if name not in found]
    if not kept:
        raise ValueError(f"module_excludes {list(excludes)} leave none of the {len(targets)} layers chosen; drop one")
    return kept


def _ranks(targets: Sequence[str], pattern: Mapping[str, int]) -> dict[str, int]:
    """The rank of every layer that the pattern gives one."""
    ranks: dict[str, int] = {}
    for word, rank in pattern.items():
        found = _matching(targets, word, f"rank_pattern '{word}' matches none of the {len(targets)} layers chosen")
        ranks.update(dict.fromkeys(found, rank))
    return ranks


def _base(model: nn.Module, name: str) -> nn.Module:
    layer = model.get_submodule(name)
    return layer.get_base_layer() if hasattr(layer, "get_base_layer") else layer  # type: ignore[operator]


@torch.no_grad()
def _start(model: nn.Module, adapter_name: str, seed: int) -> None:
    """First factors uniform in +-1/sqrt(inputs), from a generator of their own, so that no order matters."""
    for name, parameter in model.named_parameters():
        if f".lora_A.{adapter_name}." in name:
            digest = hashlib.blake2b(f"{seed}/{name}".encode(), digest_size=8).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)
            bound = 1 / math.sqrt(parameter[0].numel())
            parameter.copy_(torch.rand(parameter.shape, generator=generator) * 2 * bound - bound)
