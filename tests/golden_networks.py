"""Builds the prior and the decoder of the golden files from the original's constructor arguments."""

from __future__ import annotations

from functools import cache

import torch

from stable_cascade.files import from_original, to_original
from stable_cascade.models import StableCascadeDecoder, StableCascadePrior
from tests.golden import entry, fill, tensors

BLOCKS = {
    "C": "SDCascadeResBlock",
    "T": "SDCascadeTimestepBlock",
    "A": "SDCascadeAttnBlock",
    "F": "SDCascadeFeedForwardBlock",
}
CLASSES = {"prior": StableCascadePrior, "decoder": StableCascadeDecoder}


def our_config(original: dict, component: str) -> dict:
    levels = len(original["c_hidden"])
    down, up = original.get("block_repeat", [[1] * levels] * 2)
    layers = original.get("level_config", ["CTA", "CTA"] if component == "prior" else ["CT", "CT", "CTA", "CTA"])
    config = {
        "conditioning_dim": original["c_cond"],
        "block_out_channels": original["c_hidden"],
        "num_attention_heads": original["nhead"],
        "down_num_layers_per_block": original["blocks"][0],
        "up_num_layers_per_block": original["blocks"][1],
        "down_blocks_repeat_mappers": down,
        "up_blocks_repeat_mappers": up,
        "block_types_per_layer": [[BLOCKS[letter] for letter in level] for level in layers],
    }
    if component == "decoder":
        return config | {"clip_text_pooled_in_channels": original["c_clip"]}
    return config | {
        "clip_text_in_channels": original["c_clip_text"],
        "clip_text_pooled_in_channels": original["c_clip_text_pooled"],
        "clip_image_in_channels": original["c_clip_img"],
        "switch_level": original.get("switch_level", [False]),
    }


def filled(component: str, original: dict, recipe: dict):
    model = CLASSES[component](**our_config(original, component))
    shapes = {key: value.shape for key, value in to_original(model.state_dict(), component).items()}
    model.load_state_dict(from_original(fill(shapes, recipe), component))
    return model.eval()


@cache
def _golden_weights(name: str):
    info = entry(name)
    component = "prior" if "stage_c" in name else "decoder"
    recipe = info["fill"].get("stage_c", info["fill"])
    return component, filled(component, info["config"].get("stage_c", info["config"]), recipe)


def golden_network(name: str):
    """A fresh network with the weights of one golden file, and its component."""
    component, source = _golden_weights(name)
    model = CLASSES[component].from_config(source.config)
    model.load_state_dict(source.state_dict())
    return model.eval(), component


def golden_inputs(name: str, dtype: torch.dtype = torch.float32) -> dict:
    """Keyword arguments of our forward from one golden file; times stay float32 at least."""
    given = {key[3:]: value for key, value in tensors(name).items() if key.startswith("in.")}
    times = {
        key: value.to(torch.promote_types(dtype, torch.float32)) for key, value in given.items() if value.ndim == 1
    }
    cast = {key: value.to(dtype) for key, value in given.items()}
    inputs = {"sample": cast["x"], "timestep_ratio": times["r"]}
    inputs |= {key: times[key] for key in ("sca", "crp") if key in times}
    inputs |= {
        key: cast[key] for key in ("clip_text", "clip_text_pooled", "clip_img", "effnet", "pixels") if key in cast
    }
    if "clip" in cast:
        inputs["clip_text_pooled"] = cast["clip"]
    if "cnet_len" in entry(name):
        inputs["control"] = [cast.get(f"cnet.{index}") for index in range(entry(name)["cnet_len"])]
    return inputs
