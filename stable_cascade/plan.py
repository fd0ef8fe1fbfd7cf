"""What a training would do, told and checked before anything expensive starts; `--check` prints it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from stable_cascade import build
from stable_cascade.data import make_buckets


def plan_training(config: Any, *, trains: str, needs: Sequence[str]) -> str:
    """What a training would do, from shapes and file names alone; with `--check` all that is missing is in it.

    Args:
        needs: the networks, the one that trains or that the adapters are put on first.

    Raises:
        ValueError: a file is missing or the config contradicts itself, and this is no `--check`.
    """
    lines = [f"trains          {trains}"]
    entries: list[tuple[str, Callable[[], str]]] = [(name, partial(_network_entry, config, name)) for name in needs]
    if hasattr(config, "pretrained_model_name_or_path"):
        entries.append(("text_encoder", partial(_text_entry, config)))
    if getattr(config, "image_embedding_share", 0):
        entries.append(("image_encoder", partial(_clip_weights, config, "image_encoder")))
    if hasattr(config, "train_tokens"):
        entries.append(("adapters", partial(_adapter_entry, config)))
    if config.check:  # a training indexes its pictures right after this
        entries.append(("data", lambda: str(getattr(build.samples(config), "report", "a stream"))))
    missing = 0
    for name, entry in entries:
        try:
            lines.append(f"{name:<15} {entry()}")
        except ValueError as problem:
            if not config.check:
                raise
            missing += 1
            lines.append(f"{name:<15} MISSING: {problem}")
    micro = config.batch_size // config.grad_accum_steps
    lines.append(f"batch           {config.batch_size} = {config.grad_accum_steps} x {micro} over all processes")
    lines.append(f"pictures        {_sizes(config, needs)}")
    lines.append(f"steps           {config.updates}, saved every {config.save_every}")
    if missing:
        lines.append(f"A training would stop: {missing} of the parts above missing or wrong.")
    return "\n".join(lines)


def _sizes(config: Any, needs: Sequence[str]) -> str:
    """The sizes of the training pictures: one, or one per bucket."""
    factor = 1
    if "semantic_encoder" in needs:
        try:
            factor = build.network_on_meta(config, "semantic_encoder").stride  # type: ignore[assignment]
        except ValueError:  # told already, in the network's own line
            return f"{config.image_size} px, ratios {config.multi_aspect_ratio or ['1/1']}"
    sizes = make_buckets(config.image_size, config.multi_aspect_ratio, factor=factor).sizes
    return ", ".join(f"{height} x {width}" for height, width in dict.fromkeys(sizes)) + " (height x width)"


def _network_entry(config: Any, name: str) -> str:
    """Size and place of a network."""
    where = build.source(config, name)
    parameters = sum(parameter.numel() for parameter in build.network_on_meta(config, name).parameters())
    _has_weights(where, build.NETWORKS[name].key)
    return f"{parameters:>13,} parameters from {where}"


def _text_entry(config: Any) -> str:
    """Size and place of the text encoder."""
    _, encoder = build.text_encoder_on_meta(config)
    where = _clip_weights(config, "text_encoder")
    return f"{sum(parameter.numel() for parameter in encoder.parameters()):>13,} parameters {where}"


def _clip_weights(config: Any, part: str) -> str:
    """Place of a CLIP network."""
    name, folder = build.clip_source(config, part)
    where = Path(name) / folder
    if Path(name).exists() and not where.exists():
        raise ValueError(f"'{name}' has no folder '{folder}'; set clip_{part.split('_')[0]}_model_name as well")
    _has_weights(str(where), "pretrained_model_name_or_path" if folder else f"clip_{part.split('_')[0]}_model_name")
    return f"from {where if Path(name).exists() else name}"


def _has_weights(where: str, key: str) -> None:
    """Refuse a local folder that holds no weights."""
    folder = Path(where)
    if folder.is_dir() and not [*folder.glob("*.safetensors"), *folder.glob("*.bin")]:
        raise ValueError(f"{key}: '{where}' holds no .safetensors or .bin file; copy or download it again")


def _adapter_entry(config: Any) -> str:
    """How much trains beside the frozen networks."""
    prior = build.network_on_meta(config, "prior")
    layers = build.add_config_lora(config, prior)
    parameters = sum(parameter.numel() for parameter in prior.parameters() if parameter.requires_grad)
    tokens = build.learned_tokens(config, *build.text_encoder_on_meta(config)) if _names_tokens(config) else None
    names = f", token rows {', '.join(tokens.tokens)}" if tokens else ""
    return f"{parameters:>13,} parameters in {len(layers)} layers{names}"


def _names_tokens(config: Any) -> bool:
    """Whether the tokenizer is needed to check the adapters."""
    return bool(config.train_tokens or config.lora_checkpoint_path)
