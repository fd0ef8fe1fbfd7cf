"""What is allowed beyond types and ranges, and what absent keys mean.

The functions above `problems` look at one value and return None, or a clause that says what is allowed; the fields of
the settings name them. The rules below it are about several keys.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from stable_cascade.wording import brief

LARGEST_RANK = 8192


def folder_name(name: str) -> str | None:
    """The name of one folder."""
    if name in (".", "..") or not name.isprintable() or re.search(r"[/\\]", name):
        return "must be the name of one folder, without / and what does not print"
    return None


SET_KEYS = ("path", "weight", "repeats", "caption_prefix", "regularization")
"""Keys of an entry of `webdataset_path` or `dataset_name` that is a set with settings of its own."""


def image_sets(value: Any) -> str | None:
    """Names of places, or sets with settings of their own."""
    if not isinstance(value, (str, list)) or not value:
        return "must be a place, or a list of places and sets"
    for entry in value if isinstance(value, list) else []:
        clause = None if isinstance(entry, str) else _set_problem(entry)
        if clause:
            return clause
    return None


def _set_problem(entry: Any) -> str | None:
    """What is wrong with an entry that is a set."""
    if not isinstance(entry, Mapping) or not entry.get("path"):
        return f"entry {brief(repr(entry), 60)} must be a place, or a set as {{path: shards, repeats: 2}}"
    # Known keys, each of its kind.
    path = entry["path"]
    named = f"entry {brief(repr(path), 60)}"
    if not all(isinstance(one, str) for one in (path if isinstance(path, list) else [path])):
        return f"{named}: path must be a place, or a list of places"
    odd = next((key for key in entry if key not in SET_KEYS), None)
    if odd is not None:
        return f"{named} has the key {brief(repr(odd), 60)}; a set has {', '.join(SET_KEYS)}"
    for key in ("weight", "repeats"):
        number = entry.get(key, 1)
        if isinstance(number, bool) or not isinstance(number, (int, float)) or not 0 < number <= 1e6:
            return f"{named}: {key} must be a number above 0, at most 1,000,000"
    if "weight" in entry and "repeats" in entry:
        return f"{named} has weight and repeats; give one of them"
    if not isinstance(entry.get("caption_prefix", ""), str):
        return f"{named}: caption_prefix must be a text"
    if not isinstance(entry.get("regularization", False), bool):
        return f"{named}: regularization must be true or false"
    return None


def places_of(value: Any) -> list[str]:
    """The places that `webdataset_path`, `dataset_name` or `regularization_path` names."""
    if not value:
        return []
    if isinstance(value, Mapping):
        return places_of(value["path"])
    return [place for one in value for place in places_of(one)] if isinstance(value, list) else [str(value)]


def averaging_factors(betas: Sequence[float]) -> str | None:
    """Factors of AdamW's averages."""
    return None if all(0 <= beta < 1 for beta in betas) else "must be two numbers in [0, 1)"


def streaming(value: Any) -> str | None:
    """Yes, no, or as the size of the set asks for."""
    return None if isinstance(value, bool) or value == "auto" else "must be auto, True or False"


def caption_getter(getter: Sequence[str]) -> str | None:
    """A field of a sample and what to do with it."""
    return None if len(getter) == 2 else "must be a field and what to do with it, as ['txt', 'identity']"


def sample_filters(filters: Sequence[Sequence[str]]) -> str | None:
    """Pairs of a key and a condition."""
    odd = [entry for entry in filters if len(entry) != 2]
    return f"entry {odd[0]} must be a key and a condition, as ['width', 'lambda w: w >= 768']" if odd else None


def aspect_ratios(ratios: Sequence[str]) -> str | None:
    """Each is two positive whole numbers."""
    if not ratios:
        return "is empty; name at least one ratio as '1/1', or leave the key away"
    odd = [ratio for ratio in ratios if not re.fullmatch(r"[1-9]\d*/[1-9]\d*", ratio)]
    return f"entry {odd[0]!r} must be two whole numbers, as '3/4'" if odd else None


def layer_filters(filters: Sequence[str]) -> str | None:
    """Parts of layer names; an empty one would match every layer by accident."""
    whole = filters and all(name.strip() for name in filters)
    return None if whole else "must be a list of parts of layer names, as ['.attn']"


def ranks(pattern: Mapping[str, int]) -> str | None:
    """Ranks by parts of layer names."""
    odd = [part for part, rank in pattern.items() if not 1 <= rank <= LARGEST_RANK]
    if not odd:
        return None
    return f"gives '{odd[0]}' the rank {pattern[odd[0]]}; ranks are at least 1 and at most {LARGEST_RANK}"


def tokens(entries: Sequence[Sequence[str | None]]) -> str | None:
    """Pairs of a token, new in brackets or a regex, and a regex or null."""
    for entry in entries:
        if len(entry) != 2 or not entry[0] or entry[0] in ("[]", "<>") or entry[1] == "":
            return f"entry {list(entry)} must be a pair as ['[new]', '^dog</w>'] or ['^snail', null]"
        added = entry[0][0] + entry[0][-1] in ("[]", "<>")
        for pattern in ([] if added else [entry[0]]) + ([entry[1]] if entry[1] else []):
            try:
                re.compile(pattern)
            except re.error as error:
                return f"pattern {pattern!r} is not a regular expression ({error})"
    return None


def block_numbers(blocks: Sequence[int]) -> str | None:
    """Distinct and not negative."""
    if blocks and min(blocks) >= 0 and len(set(blocks)) == len(blocks):
        return None
    return "must be distinct numbers from 0 up, as [0, 4, 8, 12, 51, 55, 59, 63]"


def problems(config: Any) -> Iterator[tuple[str, str]]:
    """Which keys of a config contradict each other: pairs of key and a clause that says what is allowed."""
    values = vars(config)
    for rule in (_batch_rule, _sources_rule, _adapter_rule, _ema_rule, _objective_rule, _stage_a_rule, _speed_rule):
        yield from rule(values)


def _batch_rule(values: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """The accumulation steps must divide the global batch (the processes are checked where they are known)."""
    batch, steps = values["batch_size"], values["grad_accum_steps"]
    if batch % steps:
        yield (
            "batch_size",
            f"must be a multiple of grad_accum_steps {steps}; nearest: {max(steps, round(batch / steps) * steps)}",
        )


def _sources_rule(values: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """One source of images, and one of the network."""
    if "dataset_name" not in values:
        return
    if values["webdataset_path"] and values["dataset_name"]:
        yield "dataset_name", "is set beside webdataset_path; set one of the two"
    if not values["webdataset_path"] and not values["dataset_name"]:
        yield "webdataset_path", "or dataset_name must be set: there are no images"
    if "pretrained_model_name_or_path" in values and not (
        values["pretrained_model_name_or_path"] or values["model_version"]
    ):
        yield "model_version", "or pretrained_model_name_or_path must be set: there is no network"


def _adapter_rule(values: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Keys about the text encoder's adapters need them, and those about tokens need tokens."""
    for key in ("text_encoder_lr", "text_encoder_rank", "text_encoder_module_filters"):
        if values.get(key) is not None and not values["train_text_encoder"]:
            yield key, "needs train_text_encoder: True"
    if values.get("token_lr") is not None and not values["train_tokens"]:
        yield "token_lr", "needs train_tokens"


def _ema_rule(values: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """The moving average is on when it has a factor."""
    for key in ("ema_start_iters", "ema_iters"):
        if values[key] is not None and values["ema_beta"] is None:
            yield key, "needs ema_beta; set it (the guide: 0.9), or leave all three ema keys away"


def _objective_rule(values: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Two keys must not contradict each other."""
    if values.get("edm_objective") and values["prediction_type"] not in (None, "v_prediction"):
        yield "prediction_type", "contradicts edm_objective: True, which is v_prediction; leave one of the two away"
    if values.get("adaptive_loss_weight") and values["loss_weight"] not in (None, "adaptive"):
        yield "loss_weight", "contradicts adaptive_loss_weight: True; leave one of the two away"
    if values["tracker"] in ("wandb", "all") and not values["wandb_project"]:
        yield "tracker", "needs wandb_project"


def _stage_a_rule(values: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Stage A trains whole on every device, and keys of its discriminator need one."""
    if "quantize_share" not in values:
        return
    if values["use_fsdp"]:
        yield (
            "use_fsdp",
            "is not for Stage A, which is small; launch it with `--launch ddp` (accelerate_configs/ddp.yaml)",
        )
    if values["discriminator_lr"] is not None and not values["adversarial_weight"]:
        yield "discriminator_lr", "needs adversarial_weight above 0: without it there is no discriminator"


def _speed_rule(values: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """What float8 and torch.compile cannot be combined with."""
    # Products in float8 stand between layers in bfloat16, and need weights that are whole.
    quantization = values.get("quantization", "none")
    if values["float8"] and values["dtype"] != "bfloat16":
        yield "float8", f"needs dtype: bfloat16, not {values['dtype']}"
    if values["float8"] and quantization != "none":
        yield "float8", f"needs the weights that quantization: {quantization} takes away; set one of the two"
    if values["float8"] and values["use_fsdp"]:
        yield "float8", "is not for sharded runs (use_fsdp: True); set one of the two"
    # What torch compiles anew for every layer never ends compiling; compiled code overwrites what was kept.
    if values["compile"] and values.get("use_dora"):
        yield "compile", "is not for DoRA, whose layers end a graph each (use_dora: True); set one of the two"
    if values["compile"] and values["gradient_checkpointing"] == "selective":
        yield "compile", "cannot run under gradient_checkpointing: selective; set that to true or false"


def resolve(config: Any) -> None:
    """Fill in the keys whose absence means "as another key says"; afterwards every reader sees one value."""
    values = vars(config)
    # The run: the tracker, and the moving average's start and interval.
    if config.tracker is None:
        config.tracker = "wandb" if config.wandb_project else "none"
    if config.ema_beta is not None:
        config.ema_start_iters = config.ema_start_iters or 0
        config.ema_iters = config.ema_iters or 1
    # The objective: two keys of the guide mean what two of ours say as well.
    if "prediction_type" in values:
        config.prediction_type = config.prediction_type or ("v_prediction" if config.edm_objective else "epsilon")
        config.loss_weight = config.loss_weight or ("adaptive" if config.adaptive_loss_weight else "p2")
        config.adaptive_loss_weight = config.loss_weight == "adaptive"
    # The images: how they are cut, and how many crops each has.
    if "crop" in values and config.crop is None:
        config.crop = "random" if config.multi_aspect_ratio else "smart"
    if values.get("cache") and config.crops_per_image is None:
        config.crops_per_image = 1
    # The adapters and tokens.
    if "module_filters" in values:
        config.module_filters = config.module_filters or [".attn"]
        config.lora_alpha = config.rank if config.lora_alpha is None else config.lora_alpha
        config.train_tokens = config.train_tokens or None
