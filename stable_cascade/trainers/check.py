"""What a training would do, checked before anything expensive starts; `--check` prints it."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from stable_cascade import factory
from stable_cascade.adapters import lora_ranks
from stable_cascade.compilation import check_compiler
from stable_cascade.config.rules import places_of
from stable_cascade.data import make_buckets
from stable_cascade.data.locations import is_remote
from stable_cascade.hub import NotAskedError, cache_only
from stable_cascade.redaction import bare_address, redacted
from stable_cascade.trainers.start import data_entry
from stable_cascade.training.float8 import SMALLEST, check_float8
from stable_cascade.training.optimizers import check_optimizer
from stable_cascade.training.run_folders import check_run_folders, run_folder
from stable_cascade.training.tracking import LAUNCH_SHARDED, trackers_of
from stable_cascade.wording import quoted


@dataclass(frozen=True)
class TrainingPlan:
    """What a training would do, in words, and the names of its parts that are missing or wrong."""

    text: str
    missing: tuple[str, ...] = ()

    def report(self) -> None:
        """Print the plan, all of it before anything is refused: what `--check` does.

        Raises:
            ValueError: a training would stop, because parts are missing or wrong.
        """
        sys.stdout.write(self.text + "\n")
        sys.stdout.flush()
        if self.missing:
            raise ValueError(f"a training would stop, missing or wrong: {', '.join(self.missing)}")


def plan_training(config: Any, *, trains: str, needs: Sequence[str]) -> TrainingPlan:
    """What a training would do, from shapes and file names alone; with `--check` all that is missing is in it.

    Args:
        needs: the networks, the one that trains or that the adapters are put on first.

    Raises:
        ValueError: a file is missing or the config contradicts itself, and this is no `--check`.
    """
    # What there is to look at: the networks, and what the config asks for beside them.
    lines = [f"trains          {trains}"]
    entries: list[tuple[str, Callable[[], str]]] = [(name, partial(_network_entry, config, name)) for name in needs]
    if hasattr(config, "pretrained_model_name_or_path"):
        entries.append(("text_encoder", partial(_text_entry, config)))
    if getattr(config, "image_embedding_share", 0):
        entries.append(("image_encoder", partial(_clip_weights, config, "image_encoder")))
    if hasattr(config, "train_tokens"):
        entries.append(("adapters", partial(_adapter_entry, config)))
        if config.quantization != "none":
            entries.append(("quantization", partial(_quantization_entry, config)))
    if config.optimizer != "adamw":
        entries.append(("optimizer", partial(_optimizer_entry, config)))
    if config.tracker not in (None, "none"):
        entries.append(("tracker", lambda: ", ".join(trackers_of(config))))
    if hasattr(config, "controlnet_filter"):
        entries.append(("controlnet", partial(_controlnet_entry, config)))
    if config.float8:
        entries.append(("float8", _float8_entry))
    if config.compile:
        entries.append(("compile", _compile_entry))
    if config.check:  # a training indexes its images right after this
        entries.append(("data", partial(_data_entry, config)))
        entries.append(("run folder", partial(_run_folder_entry, config)))

    # Look at each; a `--check` goes on after what is missing.
    missing: list[str] = []
    for name, entry in entries:
        try:
            with cache_only() if config.check else nullcontext():
                lines.append(f"{name:<15} {entry()}")
        except NotAskedError as problem:
            lines.append(f"{name:<15} NETWORK: {problem}")
        except ValueError as problem:
            if not config.check:
                raise
            missing.append(name)
            lines.append(f"{name:<15} MISSING: {problem}")

    # The figures of the training.
    micro = config.batch_size // config.grad_accum_steps
    lines.append(f"batch           {config.batch_size} = {config.grad_accum_steps} x {micro} over all processes")
    with cache_only() if config.check else nullcontext():
        lines.append(f"images          {_sizes(config, needs)}")
    lines.append(f"steps           {config.updates}, saved every {config.save_every}")
    if config.use_fsdp:
        lines.append("sharded         use_fsdp: True, so " + LAUNCH_SHARDED)
    return TrainingPlan(redacted("\n".join(lines)), tuple(missing))


def _sizes(config: Any, needs: Sequence[str]) -> str:
    """The sizes of the training images: one, or one per bucket."""
    factor = 1
    divider = next((name for name in ("semantic_encoder", "vqgan") if name in needs), None)
    if divider:
        try:
            factor = factory.network_on_meta(config, divider).stride  # type: ignore[assignment]
        except ValueError:  # the network's own line says it already
            return f"{config.image_size} px, ratios {config.multi_aspect_ratio or ['1/1']}"
    sizes = make_buckets(config.image_size, config.multi_aspect_ratio, factor=factor).sizes
    return ", ".join(f"{height} x {width}" for height, width in dict.fromkeys(sizes)) + " (height x width)"


def _network_entry(config: Any, name: str) -> str:
    """Size and place of a network."""
    where = factory.source(config, name)
    parameters = sum(parameter.numel() for parameter in factory.network_on_meta(config, name).parameters())
    if not factory.remembered(config, name):
        _has_weights(where, factory.source_key(config, name))
    return f"{parameters:>13,} parameters from {where}"


def _float8_entry() -> str:
    """What is computed in float8, where the machine can."""
    check_float8(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    return f"linear layers with {SMALLEST} inputs and outputs or more"


def _compile_entry() -> str:
    """What is compiled, where torch finds a compiler."""
    check_compiler("cuda" if torch.cuda.is_available() else "cpu")
    return "each block of the networks that train, in the first step"


def _text_entry(config: Any) -> str:
    """Size and place of the text encoder."""
    _, encoder = factory.text_encoder_on_meta(config)
    where = _clip_weights(config, "text_encoder")
    return f"{sum(parameter.numel() for parameter in encoder.parameters()):>13,} parameters {where}"


def _clip_weights(config: Any, part: str) -> str:
    """Place of a CLIP network."""
    name, folder = factory.clip_source(config, part)
    where = Path(name) / folder
    if Path(name).exists() and not where.exists():
        raise ValueError(f"'{name}' has no folder '{folder}'; set clip_{part.split('_')[0]}_model_name as well")
    if not factory.remembered(config, part):
        key = "pretrained_model_name_or_path" if folder else f"clip_{part.split('_')[0]}_model_name"
        _has_weights(str(where), key)
    return f"from {where if Path(name).exists() else name}"


def _has_weights(where: str, key: str) -> None:
    """Refuse a local folder that holds no weights."""
    folder = Path(where)
    if folder.is_dir() and not [*folder.glob("*.safetensors"), *folder.glob("*.bin")]:
        raise ValueError(f"{key}: '{where}' holds no .safetensors or .bin file; copy or download it again")


def _adapter_entry(config: Any) -> str:
    """How much trains beside the frozen networks."""
    prior = factory.network_on_meta(config, "prior")
    layers = factory.add_config_lora(config, prior)
    said = f"{_trained(prior):>13,} parameters in {len(layers)} layers{_ranks(prior)}"
    if config.train_tokens or config.lora_checkpoint_path or config.train_text_encoder:
        tokenizer, encoder = factory.text_encoder_on_meta(config)
        tokens = factory.learned_tokens(config, tokenizer, encoder)
        if config.train_text_encoder:
            layers = factory.add_config_text_lora(config, encoder)
            rows = tokens.rows.numel() if tokens else 0
            said += f", {_trained(encoder) - rows:,} in {len(layers)} of the text encoder{_ranks(encoder)}"
        said += f", token rows {', '.join(tokens.tokens)}" if tokens else ""
    return said


def _trained(model: Any) -> int:
    """Number of values that train."""
    return sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)


def _ranks(model: Any) -> str:
    """The ranks of the adapters and how many layers have each, as ` (rank 4: 12, rank 16: 4)`."""
    counted = sorted(Counter(lora_ranks(model).values()).items())
    return f" ({', '.join(f'rank {rank}: {count}' for rank, count in counted)})"


def _data_entry(config: Any) -> str:
    """What there is to train on, as far as it is on this machine."""
    places = places_of(config.webdataset_path) + places_of(getattr(config, "regularization_path", None))
    remote = next((place for place in places if is_remote(place)), None)
    if remote is not None:
        raise NotAskedError(f"{quoted(bare_address(remote))} is not on this machine; a run will read it")
    return data_entry(config, factory.samples(config))


def _run_folder_entry(config: Any) -> str:
    """Where the run writes, if it can."""
    check_run_folders(config)
    return str(run_folder(config))


def _optimizer_entry(config: Any) -> str:
    """The optimizer, if its package is there."""
    check_optimizer(config)
    return str(config.optimizer)


def _quantization_entry(config: Any) -> str:
    """What of the frozen prior is stored in few bits."""
    return factory.quantization_entry(config, factory.network_on_meta(config, "prior"))


def _controlnet_entry(config: Any) -> str:
    """Size of the ControlNet, where it acts, and what its control images are."""
    control = factory.control_filter(config)
    model = factory.controlnet_on_meta(config, factory.network_on_meta(config, "prior"), control)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    started = f"from {config.controlnet_checkpoint_path}" if config.controlnet_checkpoint_path else "new"
    return (
        f"{parameters:>13,} parameters, {started}, {config.controlnet_bottleneck_mode}, blocks "
        f"{', '.join(map(str, config.controlnet_blocks))}; {config.controlnet_filter} of {control.channels} channels"
    )
