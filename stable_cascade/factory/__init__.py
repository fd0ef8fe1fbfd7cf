"""From a config to objects: the only place that knows both. Trainers' `main`s and the commands call it.

Nothing here trains or samples. The functions `…_on_meta` build without memory for weights: a trainer's check looks
with them at everything that can go wrong, before the others load.
"""

from .adapters import add_config_lora, add_config_text_lora, learned_tokens, learning_rate, trainable_text
from .cache import Cache, fill_cache, remembered
from .control import control_filter, control_images, controlnet, controlnet_on_meta, export_controlnet
from .data import batches, content, samples, shown
from .losses import Inputs, Weighting, loss_weight, prior_inputs, prior_loss_fn
from .networks import (
    SCRATCH,
    cascade_folder,
    checkpoint_gradients,
    clip_source,
    frozen,
    frozen_base,
    frozen_text,
    image_embedder,
    network,
    network_on_meta,
    on_demand,
    preview_networks,
    quantization_entry,
    source,
    source_key,
    text_encoder,
    text_encoder_on_meta,
)

__all__ = [
    "SCRATCH", "Cache", "Inputs", "Weighting", "add_config_lora", "add_config_text_lora", "batches",
    "cascade_folder", "checkpoint_gradients", "clip_source", "content", "control_filter", "control_images",
    "controlnet", "controlnet_on_meta", "export_controlnet", "fill_cache", "frozen", "frozen_base",
    "frozen_text", "image_embedder", "learned_tokens", "learning_rate", "loss_weight", "network",
    "network_on_meta", "on_demand", "preview_networks", "prior_inputs", "prior_loss_fn", "quantization_entry",
    "remembered", "samples", "shown", "source", "source_key", "text_encoder", "text_encoder_on_meta",
    "trainable_text",
]  # fmt: skip
