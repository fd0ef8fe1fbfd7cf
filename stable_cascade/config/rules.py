"""What is allowed beyond the types, and what absent keys mean."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import Any

_AT_LEAST: dict[str, float] = {
    "updates": 1, "batch_size": 1, "grad_accum_steps": 1, "save_every": 1, "backup_every": 1, "log_every": 1,
    "checkpoints_total_limit": 1, "warmup_updates": 0, "lr": 0, "weight_decay": 0, "adam_epsilon": 0, "rank": 1,
    "image_size": 8, "num_workers": 0, "ema_start_iters": 0, "ema_iters": 1, "min_snr_gamma": 0, "offset_noise": 0,
    "num_preview_images": 0, "preview_steps": 1, "preview_decoder_steps": 1, "latent_noise": 0,
    "crops_per_image": 1, "token_lr": 0, "text_encoder_lr": 0, "text_encoder_rank": 1, "prior_loss_weight": 0,
    "codebook_weight": 0, "commitment_weight": 0, "revive_every": 1, "adversarial_weight": 0, "adversarial_start": 0,
    "discriminator_lr": 0, "discriminator_channels": 1,
}  # fmt: skip
_AT_MOST: dict[str, float] = {
    "batch_size": 65_536, "grad_accum_steps": 65_536, "rank": 8192, "text_encoder_rank": 8192, "image_size": 16_384,
    "num_workers": 512, "num_preview_images": 64, "preview_steps": 10_000, "preview_decoder_steps": 10_000,
    "crops_per_image": 65_536, "discriminator_channels": 4096, "seed": 2**63 - 1,
}  # fmt: skip
_MOST = 1e9
"""What every other number may be at most."""
_ABOVE: dict[str, float] = {"shift": 0, "max_grad_norm": 0, "lora_alpha": 0, "effnet_min_scale": 0}
_SHARES: tuple[str, ...] = (
    "bucketeer_random_ratio", "max_broken_share", "caption_dropout", "image_embedding_share", "effnet_dropout",
    "effnet_min_scale", "lr_final_share", "unmasked_weight", "regularization_share", "quantize_share",
)  # fmt: skip
_BELOW_ONE: tuple[str, ...] = ("ema_beta", "lora_dropout")


def problems(config: Any) -> Iterator[tuple[str, str]]:
    """What is wrong with the values of a config: pairs of key and a clause that says what is allowed."""
    yield from _range_problems(vars(config))
    for rule in (
        _batch_rule,
        _sources_rule,
        _ratio_rule,
        _filter_rule,
        _adapter_rule,
        _token_rule,
        _ema_rule,
        _objective_rule,
        _block_rule,
        _stage_a_rule,
        _float8_rule,
        _compile_rule,
    ):
        yield from rule(vars(config))


def _range_problems(values: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Numbers outside their range."""
    for key, value in values.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            continue
        if abs(value) > 1e300 or not math.isfinite(value):
            yield key, "must be a finite number"
        elif key in _AT_LEAST and value < _AT_LEAST[key]:
            yield key, f"must be at least {_AT_LEAST[key]}"
        elif abs(value) > _AT_MOST.get(key, _MOST):
            yield key, f"must be at most {_AT_MOST.get(key, _MOST):,.0f}"
        elif key in _ABOVE and value <= _ABOVE[key]:
            yield key, f"must be greater than {_ABOVE[key]}"
        elif key in _SHARES and not 0 <= value <= 1:
            yield key, "must lie in [0, 1]"
        elif key in _BELOW_ONE and not 0 <= value < 1:
            yield key, "must lie in [0, 1)"
    name = values.get("experiment_id")
    if isinstance(name, str) and (name in (".", "..") or not name.isprintable() or re.search(r"[/\\]", name)):
        yield "experiment_id", "must be the name of one folder, without / and what does not print"
    if not all(0 <= beta < 1 for beta in values.get("adam_betas", ())):
        yield "adam_betas", "must be two numbers in [0, 1)"


def _batch_rule(values: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """The accumulation steps must divide the global batch (the processes are checked where they are known)."""
    batch, steps = values.get("batch_size"), values.get("grad_accum_steps")
    if batch and steps and batch % steps:
        nearest = max(steps, round(batch / steps) * steps)
        yield "batch_size", f"must be a multiple of grad_accum_steps {steps}; nearest: {nearest}"


def _sources_rule(values: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """One source of pictures, and one of the network."""
    if "dataset_name" in values:
        if values["webdataset_path"] and values["dataset_name"]:
            yield "dataset_name", "stands beside webdataset_path; set one of the two"
        if not values["webdataset_path"] and not values["dataset_name"]:
            yield "webdataset_path", "or dataset_name must be set: there are no pictures"
    if "pretrained_model_name_or_path" in values and not (
        values["pretrained_model_name_or_path"] or values.get("model_version")
    ):
        yield "model_version", "or pretrained_model_name_or_path must be set: there is no network"
    getter = values.get("captions_getter")
    if getter is not None and len(getter) != 2:
        yield "captions_getter", "must be a field and what to do with it, as ['txt', 'identity']"
    for entry in values.get("dataset_filters") or ():
        if len(entry) != 2:
            yield "dataset_filters", f"entry {entry} must be a key and a condition, as ['width', 'lambda w: w >= 768']"


def _ratio_rule(values: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Aspect ratios are two positive whole numbers."""
    ratios = values.get("multi_aspect_ratio")
    if ratios is not None and not ratios:
        yield "multi_aspect_ratio", "is empty; name at least one ratio as '1/1', or leave the key away"
    for ratio in ratios or ():
        if not re.fullmatch(r"[1-9]\d*/[1-9]\d*", ratio):
            yield "multi_aspect_ratio", f"entry {ratio!r} must be two whole numbers, as '3/4'"


def _filter_rule(values: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """An empty module filter would match every layer by accident."""
    filters = values.get("module_filters")
    if filters is not None and (not filters or not all(name.strip() for name in filters)):
        yield "module_filters", "must be a list of parts of layer names, as ['.attn']"


def _adapter_rule(values: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Keys about the text encoder's adapters need them; ranks are whole numbers from 1."""
    for key in ("text_encoder_lr", "text_encoder_rank", "text_encoder_module_filters"):
        if values.get(key) is not None and not values["train_text_encoder"]:
            yield key, "needs train_text_encoder: True"
    if values.get("token_lr") is not None and not values["train_tokens"]:
        yield "token_lr", "needs train_tokens"
    for part, rank in (values.get("rank_pattern") or {}).items():
        if not 1 <= rank <= _AT_MOST["rank"]:
            yield (
                "rank_pattern",
                f"gives '{part}' the rank {rank}; ranks are at least 1 and at most {_AT_MOST['rank']}",
            )


def _token_rule(values: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Tokens are pairs of a token, new in brackets or a regex, and a regex or null."""
    form = "must be a pair as ['[new]', '^dog</w>'] or ['^snail', null]"
    for entry in values.get("train_tokens") or ():
        if len(entry) != 2 or not entry[0] or entry[0] in ("[]", "<>") or entry[1] == "":
            yield "train_tokens", f"entry {entry} {form}"
            continue
        added = entry[0][0] + entry[0][-1] in ("[]", "<>")
        for pattern in ([] if added else [entry[0]]) + ([entry[1]] if entry[1] else []):
            try:
                re.compile(pattern)
            except re.error as error:
                yield "train_tokens", f"pattern {pattern!r} is not a regular expression ({error})"


def _ema_rule(values: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """The moving average is on when it has a factor."""
    for key in ("ema_start_iters", "ema_iters"):
        if values.get(key) is not None and values["ema_beta"] is None:
            yield key, "needs ema_beta; set it (the guide: 0.9), or leave all three ema keys away"


def _objective_rule(values: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Two keys must not contradict each other."""
    if values.get("edm_objective") and values["prediction_type"] not in (None, "v_prediction"):
        yield "prediction_type", "contradicts edm_objective: True, which is v_prediction; leave one of the two away"
    if values.get("adaptive_loss_weight") and values["loss_weight"] not in (None, "adaptive"):
        yield "loss_weight", "contradicts adaptive_loss_weight: True; leave one of the two away"
    if values.get("tracker") in ("wandb", "all") and not values["wandb_project"]:
        yield "tracker", "needs wandb_project"


def _block_rule(values: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Block numbers are distinct and not negative."""
    blocks = values.get("controlnet_blocks")
    if blocks is not None and (not blocks or min(blocks) < 0 or len(set(blocks)) != len(blocks)):
        yield "controlnet_blocks", "must be distinct numbers from 0 up, as [0, 4, 8, 12, 51, 55, 59, 63]"


def _stage_a_rule(values: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Stage A trains whole on every device, and keys of its discriminator need one."""
    if "quantize_share" not in values:
        return
    if values["use_fsdp"]:
        yield "use_fsdp", "is not for Stage A, which is small; launch with accelerate_configs/ddp.yaml"
    if values["discriminator_lr"] is not None and not values["adversarial_weight"]:
        yield "discriminator_lr", "needs adversarial_weight above 0: without it there is no discriminator"


def _float8_rule(values: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Products in float8 stand between layers in bfloat16, and need weights that are whole."""
    if not values.get("float8"):
        return
    if values["dtype"] != "bfloat16":
        yield "float8", f"needs dtype: bfloat16, not {values['dtype']}"
    if values.get("quantization", "none") != "none":
        yield "float8", f"needs the weights that quantization: {values['quantization']} takes away; set one of the two"
    if values["use_fsdp"]:
        yield "float8", "is not for sharded runs (use_fsdp: True); set one of the two"


def _compile_rule(values: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """What torch compiles anew for every layer would never end compiling; generated code writes over what was kept."""
    if values.get("compile") and values.get("use_dora"):
        yield "compile", "is not for DoRA, whose layers end a graph each (use_dora: True); set one of the two"
    if values.get("compile") and values.get("gradient_checkpointing") == "selective":
        yield "compile", "cannot run under gradient_checkpointing: selective; set that to true or false"


def resolve(config: Any) -> None:
    """Fill in the keys whose absence means "as another key says"; afterwards every reader sees one value."""
    values = vars(config)
    if "tracker" in values and config.tracker is None:
        config.tracker = "wandb" if config.wandb_project else "none"
    if "ema_beta" in values and config.ema_beta is not None:
        config.ema_start_iters = config.ema_start_iters or 0
        config.ema_iters = config.ema_iters or 1
    if "prediction_type" in values:
        config.prediction_type = config.prediction_type or ("v_prediction" if config.edm_objective else "epsilon")
        config.loss_weight = config.loss_weight or ("adaptive" if config.adaptive_loss_weight else "p2")
        config.adaptive_loss_weight = config.loss_weight == "adaptive"
    if "crop" in values and config.crop is None:
        config.crop = "random" if config.multi_aspect_ratio else "smart"
    if values.get("cache") and config.crops_per_image is None:
        config.crops_per_image = 1
    if "module_filters" in values and "lora_alpha" in values:
        config.module_filters = config.module_filters or [".attn"]
        config.lora_alpha = config.rank if config.lora_alpha is None else config.lora_alpha
    if "train_tokens" in values:
        config.train_tokens = config.train_tokens or None
