"""LoRA files as each tool writes them, made by the tools' rules and not by our writers; and the update by hand."""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass

import torch
from torch import Tensor

RANK = 2

PRIOR_LAYERS = (
    "down_blocks.0.2.attention.to_q", "down_blocks.0.2.attention.to_k", "down_blocks.0.2.attention.to_v",
    "down_blocks.0.2.attention.to_out.0", "down_blocks.0.2.kv_mapper.1", "down_blocks.0.1.mapper_sca",
    "up_blocks.1.0.channelwise.0", "up_blocks.1.2.attention.to_q", "clip_txt_mapper", "clf.1", "embedding.1",
)  # fmt: skip
TEXT_LAYERS = (
    "text_model.encoder.layers.1.self_attn.q_proj",
    "text_model.encoder.layers.0.mlp.fc2",
    "text_projection",
)

# Our name of an attention layer's end -> ComfyUI's and kohya's, kohya's before 2024-02-25, OneTrainer's newer ones.
ENDS = {
    "attention.to_q": ("attention.attn.to_q", "attention.attn.to_q", "attention.attn.in_proj.0"),
    "attention.to_k": ("attention.attn.to_k", "attention.attn.to_k", "attention.attn.in_proj.1"),
    "attention.to_v": ("attention.attn.to_v", "attention.attn.to_v", "attention.attn.in_proj.2"),
    "attention.to_out.0": ("attention.attn.out_proj", "attention.attn.to_out", "attention.attn.out_proj"),
}


@dataclass
class Update:
    """One layer's update as trained: alpha / rank * up @ down, with a magnitude where it is a DoRA."""

    down: Tensor
    up: Tensor
    alpha: float
    magnitude: Tensor | None = None
    of_inputs: bool = False

    @property
    def scale(self) -> float:
        return self.alpha / len(self.down)


def updates_for(model, layers, alpha=3.0, dora=None) -> dict[str, Update]:
    """Random updates of these layers. `dora`: None, "outputs" or "inputs"."""
    generator = torch.Generator().manual_seed(len(layers))
    found = {}
    for number, name in enumerate(layers):
        weight = model.get_submodule(name).weight
        rank = RANK + number % 2
        down = 0.3 * torch.randn((rank, *weight.shape[1:]), generator=generator)
        up = 0.3 * torch.randn((weight.shape[0], rank, *[1] * (weight.ndim - 2)), generator=generator)
        update = Update(down, up, alpha + number % 3)
        if dora:
            axis = 0 if dora == "outputs" else 1
            lengths = weight.detach().float().transpose(0, axis).flatten(1).norm(dim=1)
            update.magnitude = lengths * (1 + 0.2 * torch.rand(lengths.shape, generator=generator))
            update.of_inputs = dora == "inputs"
        found[name] = update
    return found


@torch.no_grad()
def merged_by_hand(model, updates: dict[str, Update]):
    """A copy of the network with W + scale * up @ down, in float64; a DoRA's columns or rows have their magnitudes."""
    model = copy.deepcopy(model)
    for name, update in updates.items():
        weight = model.get_submodule(name).weight
        change = (update.up.double().flatten(1) @ update.down.double().flatten(1)).reshape(weight.shape)
        whole = weight.double() + update.scale * change
        if update.magnitude is not None:
            axis = 1 if update.of_inputs else 0
            shape = [-1 if place == axis else 1 for place in range(weight.ndim)]
            lengths = whole.transpose(0, axis).flatten(1).norm(dim=1)
            whole = whole * (update.magnitude.double() / lengths).reshape(shape)
        weight.copy_(whole)
    return model


def spelled(name: str, column: int) -> str:
    for ours, theirs in ENDS.items():
        if name.endswith(ours):
            return name.removesuffix(ours) + theirs[column]
    return name


def _dora_scale(update: Update) -> Tensor:
    ones = [1] * (update.down.ndim - 2)
    return update.magnitude.reshape(1, -1, *ones) if update.of_inputs else update.magnitude.reshape(-1, 1, *ones)


def _down_up_alpha(name: str, update: Update, down="lora_down", up="lora_up") -> dict[str, Tensor]:
    values = {
        f"{name}.{down}.weight": update.down,
        f"{name}.{up}.weight": update.up,
        f"{name}.alpha": torch.tensor(update.alpha),
    }
    return values | ({} if update.magnitude is None else {f"{name}.dora_scale": _dora_scale(update)})


def _flat(prefixes: tuple[str, str], column: int):
    def build(prior: dict[str, Update], text: dict[str, Update]):
        tensors: dict[str, Tensor] = {}
        for prefix, updates in zip(prefixes, (prior, text), strict=True):
            for name, update in updates.items():
                tensors |= _down_up_alpha(prefix + spelled(name, column).replace(".", "_"), update)
        return tensors, {}

    return build


def _dotted(prefixes: tuple[str, str], column: int | None, down="lora_A", up="lora_B"):
    def build(prior: dict[str, Update], text: dict[str, Update]):
        tensors: dict[str, Tensor] = {}
        for prefix, updates in zip(prefixes, (prior, text), strict=True):
            for name, update in updates.items():
                named = name if column is None else spelled(name, column)
                tensors |= _down_up_alpha(prefix + named, update, down, up)
        return tensors, {}

    return build


def _peft(prior: dict[str, Update], text: dict[str, Update], prefix=("prior.", "text_encoder."), infix=""):
    """PEFT's keys; ranks and alphas as LoraConfigs in the header."""
    tensors: dict[str, Tensor] = {}
    config: dict = {}
    for component, start, updates in zip(("prior", "text_encoder"), prefix, (prior, text), strict=True):
        for name, update in updates.items():
            tensors[f"{start}{name}.lora_A{infix}.weight"] = update.down
            tensors[f"{start}{name}.lora_B{infix}.weight"] = update.up
            if update.magnitude is not None:
                shape = (1, -1, 1, 1) if update.down.ndim == 4 else (-1,)
                tensors[f"{start}{name}.lora_magnitude_vector{infix}"] = update.magnitude.reshape(shape)
        config |= {f"{component}.r": RANK, f"{component}.lora_alpha": 8,
                   f"{component}.alpha_pattern": {name: update.alpha for name, update in updates.items()}}  # fmt: skip
    return tensors, {"lora_adapter_metadata": json.dumps(config)}


def _onetrainer_diffusers(prior: dict[str, Update], text: dict[str, Update]):
    """OneTrainer puts alpha / rank into lora_B, and marks its files in the header."""
    tensors: dict[str, Tensor] = {}
    for prefix, updates in (("prior.", prior), ("text_encoder.", text)):
        for name, update in updates.items():
            tensors[f"{prefix}{name}.lora_A.weight"] = update.down
            tensors[f"{prefix}{name}.lora_B.weight"] = update.up * (update.alpha / update.up.shape[1])
            if update.magnitude is not None and update.of_inputs:
                tensors[f"{prefix}{name}.dora_scale"] = _dora_scale(update)
            elif update.magnitude is not None:
                shape = (1, -1, 1, 1) if update.down.ndim == 4 else (-1,)
                tensors[f"{prefix}{name}.lora_magnitude_vector.weight"] = update.magnitude.reshape(shape)
    return tensors, {"ot_revision": "23df383"}


def _joined(prior: dict[str, Update], text: dict[str, Update]):
    """One update of q, k and v together, which then share their first factor, scale and rank."""
    tensors = {}
    for name, update in prior.items():
        if name.endswith("to_q") and name.replace("to_q", "to_k") in prior:
            block = name.removesuffix("to_q")
            three = [prior[f"{block}to_{part}"] for part in "qkv"]
            for other in three[1:]:
                other.down, other.alpha = update.down, update.alpha
                other.up = other.up[:, : len(update.down)].clone()
            whole = Update(update.down, torch.cat([one.up for one in three]), update.alpha)
            tensors |= _down_up_alpha(f"diffusion_model.{block}attn.in_proj", whole)
        elif not (name.endswith(("to_k", "to_v")) and name[:-1] + "q" in prior):
            tensors |= _down_up_alpha(f"diffusion_model.{spelled(name, 0)}", update)
    return tensors, {}


COMFYUI = ("diffusion_model.", "text_encoders.clip_g.transformer.")
DOWN_UP = ("lora_down", "lora_up")

# Name -> (how the tool writes, what `detect` says, whether it can hold a part for the text encoder).
WRITTEN = {
    "peft": (_peft, "peft", True),
    "peft_wrapped": (lambda prior, text: _peft(prior, {}, ("base_model.model.", ""), ".default"), "peft", False),
    "kohya": (_flat(("lora_unet_", "lora_te_"), 0), "kohya", True),
    "kohya_before_2024_02_25": (_flat(("lora_unet_", "lora_te_"), 1), "kohya", True),
    "onetrainer": (_flat(("lora_prior_unet_", "lora_prior_te_"), 0), "onetrainer", True),
    "onetrainer_diffusers": (_onetrainer_diffusers, "onetrainer_diffusers", True),
    "onetrainer_kohya": (_flat(("lora_unet_", "lora_te_"), 2), "onetrainer_kohya", True),
    "onetrainer_original": (_dotted(("", "text_encoder."), 2), "onetrainer_original", True),
    "onetrainer_comfyui": (_dotted(("diffusion_model.", ""), 2), "onetrainer_comfyui", False),
    "onetrainer_internal": (_dotted(("prior.", "text_encoder."), None, *DOWN_UP), "onetrainer_internal", True),
    "comfyui": (_dotted(COMFYUI, 0, *DOWN_UP), "comfyui", True),
    "comfyui_newer": (_dotted(COMFYUI, 0), "comfyui", True),
    "lycoris": (_flat(("lycoris_", "lora_te_"), 0), "lycoris", False),
    "joined": (_joined, "comfyui", False),
}  # fmt: skip
