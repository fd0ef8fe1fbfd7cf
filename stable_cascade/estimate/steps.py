"""One training step at its real shapes on the meta device: what `report.py` traces. No weight is loaded."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from stable_cascade import factory
from stable_cascade.estimate.memory import checkpointing
from stable_cascade.factory.networks import CLIP_IMAGE, CLIP_TEXT, from_source, network_class, preset, quantizes
from stable_cascade.files.presets import clip_preset
from stable_cascade.models.checkpointing import chosen_contexts
from stable_cascade.objectives.denoising import ConditionedPrior

TEXT_TOKENS = 77


@dataclass(frozen=True)
class StepShapes:
    """What is traced: the module that trains, what calls it, its shapes, and what serves it."""

    model: nn.Module
    forward: Callable[[int], Tensor]
    serves: dict[str, nn.Module]
    encode: Callable[[int], Any]
    preview: Callable[[int], Any]


def prior_step(config: Any, trainer: str, size: tuple[int, int], autocast: torch.dtype | None) -> StepShapes:
    """Stage C in training: whole, or frozen beside adapters or a ControlNet."""
    # The prior, and what trains beside it.
    dtype = torch.float32 if trainer == "text_to_image" else getattr(torch, config.dtype)
    prior = nn.Module.to(network_shape(config, "prior"), dtype)  # diffusers' own warns
    serves, encode = _encoders(config, size)
    controlnet: nn.Module | None = None
    if trainer == "lora":
        prior.requires_grad_(False)
        if quantizes(config):
            _quantize(prior, config.quantization, autocast)
        factory.add_config_lora(config, prior)
    if trainer == "controlnet":
        prior.requires_grad_(False)
        control = factory.control_filter(config)
        controlnet = factory.controlnet_on_meta(config, prior, control)
        image = _control_shape(config, control, size)
    _checkpoint(config, autocast, prior, controlnet)

    # A step: text and image embeddings, control images, the prior.
    embed = _text(config, prior, serves)
    model = ConditionedPrior(prior, embed, controlnet)
    channels, (height, width) = prior.config.in_channels, _latents(config, size)

    def forward(rows: int) -> Tensor:
        images = None
        if config.image_embedding_share:
            images = _empty(rows, 1, prior.config.clip_image_in_channels)
        shown = _empty(rows, *image) if controlnet is not None else None
        return model(_empty(rows, channels, height, width), _empty(rows), ["a"] * rows, images, shown)

    # A preview: one sampling step with guidance, and the networks that show its result.
    def preview(rows: int) -> Tensor:
        hidden, pooled = embed(["a"] * 2 * rows)
        conditions = prior.encode_conditions(pooled, hidden, None)
        residuals = controlnet(_empty(rows, *image)) if controlnet is not None else None
        if residuals is not None:
            residuals = [r if r is None else torch.cat([r, r]) for r in residuals]
        sample = _empty(2 * rows, channels, height, width)
        return prior(sample, _empty(2 * rows), conditions=conditions, control=residuals).sample

    for name in factory.preview_networks(config):
        serves[name] = network_shape(config, name)
        if name == "decoder":
            nn.Module.to(serves[name], dtype)
    return StepShapes(model, forward, serves, encode, preview)


def decoder_step(config: Any, trainer: str, size: tuple[int, int], autocast: torch.dtype | None) -> StepShapes:
    """Stage B in training."""
    # The decoder and the networks that serve it.
    decoder, vqgan = network_shape(config, "decoder"), network_shape(config, "vqgan")
    serves, encode = _encoders(config, size)
    serves["vqgan"] = vqgan
    serves["text encoder"] = _clip_text(config)
    _checkpoint(config, autocast, decoder)
    (height, width), settings = _latents(config, size), decoder.config
    latent = (settings.in_channels, size[0] // 4, size[1] // 4)

    # A step, and a preview: one sampling step with guidance, and Stage A.
    def inputs(rows: int) -> dict[str, Tensor]:
        pooled = _empty(rows, 1, settings.clip_text_pooled_in_channels)
        return {"clip_text_pooled": pooled, "effnet": _empty(rows, settings.effnet_in_channels, height, width)}

    def preview(rows: int) -> Tensor:
        decoder(_empty(2 * rows, *latent), _empty(2 * rows), **inputs(2 * rows))
        return vqgan.decode(_empty(rows, *latent)).sample

    return StepShapes(
        decoder,
        lambda rows: decoder(_empty(rows, *latent), _empty(rows), **inputs(rows)).sample,
        serves,
        lambda rows: (encode(rows), vqgan.encode(_empty(rows, 3, *size)).latents),
        preview,
    )


def _checkpoint(config: Any, autocast: torch.dtype | None, *networks: Any) -> None:
    """Checkpointing as the config says, in every network that there is."""
    if config.gradient_checkpointing:
        function = checkpointing(autocast, chosen_contexts(config.gradient_checkpointing))
        for network in networks:
            if network is not None:
                network.enable_gradient_checkpointing(function)


def _encoders(config: Any, size: tuple[int, int]) -> tuple[dict[str, nn.Module], Callable[[int], Any]]:
    """The encoders of images that are on the device in training, none with the cache, and their work on a batch."""
    if getattr(config, "cache", False):
        return {}, lambda rows: None
    semantic = network_shape(config, "semantic_encoder").eval()
    serves: dict[str, nn.Module] = {"image encoder": semantic}
    if not getattr(config, "image_embedding_share", 0):
        return serves, lambda rows: semantic(_empty(rows, 3, *size))
    clip = serves["CLIP image encoder"] = _clip_image(config)
    side = clip.config.image_size  # type: ignore[union-attr]
    return serves, lambda rows: (semantic(_empty(rows, 3, *size)), clip(pixel_values=_empty(rows, 3, side, side)))


def _text(config: Any, prior: Any, serves: dict[str, nn.Module]) -> Any:
    """Captions to embeddings: a module where the text encoder trains, else a function that costs nothing here."""
    # A text encoder in which something trains is part of the model.
    dtype = getattr(torch, config.dtype)
    if getattr(config, "train_tokens", None) or getattr(config, "train_text_encoder", False):
        tokenizer, encoder = factory.text_encoder_on_meta(config)
        encoder = encoder.to(dtype).requires_grad_(False)
        factory.learned_tokens(config, tokenizer, encoder)
        if config.train_text_encoder:
            factory.add_config_text_lora(config, encoder)
        return _TrainedText(encoder)
    # A frozen one only takes memory, or nothing with the cache.
    if not config.cache:
        serves["text encoder"] = _clip_text(config)
    widths = prior.config.clip_text_in_channels, prior.config.clip_text_pooled_in_channels

    def embed(captions: list[str]) -> tuple[Tensor, Tensor]:
        rows = len(captions)
        return _empty(rows, TEXT_TOKENS, widths[0]).to(dtype), _empty(rows, 1, widths[1]).to(dtype)

    return embed


class _TrainedText(nn.Module):
    """`TextEmbedder` without an attention mask, whose values transformers would want to look at."""

    def __init__(self, text_encoder: Any):
        super().__init__()
        self.text_encoder = text_encoder

    def forward(self, captions: list[str]) -> tuple[Tensor, Tensor]:
        """Shapes: B captions -> (B, L, D), (B, 1, P)."""
        length = self.text_encoder.config.max_position_embeddings
        ids = torch.zeros(len(captions), length, dtype=torch.int64, device="meta")
        output = self.text_encoder(ids, output_hidden_states=True)
        return output.hidden_states[-1], output.text_embeds[:, None]


def network_shape(config: Any, name: str) -> Any:
    """A network on the meta device; where nothing says where it is, of the size that `model_version` says."""
    if not (getattr(config, factory.source_key(config, name), None) or factory.cascade_folder(config)):
        with torch.device("meta"):
            return network_class(name).from_config(preset(config, name))
    return factory.network_on_meta(config, name)


def _clip_text(config: Any) -> nn.Module:
    """CLIP's text encoder on the meta device, in the config's number format."""
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    name, _ = factory.clip_source(config, "text_encoder")
    known = name == CLIP_TEXT
    settings = (
        CLIPTextConfig(**clip_preset("text_encoder", "ViT-bigG/14"))
        if known
        else from_source(config, "text_encoder", CLIPTextConfig)
    )
    with torch.device("meta"):
        return CLIPTextModelWithProjection(settings).to(getattr(torch, config.dtype)).requires_grad_(False)


def _clip_image(config: Any) -> Any:
    """CLIP's image encoder on the meta device."""
    from transformers import CLIPVisionConfig, CLIPVisionModelWithProjection

    name, _ = factory.clip_source(config, "image_encoder")
    known = name == CLIP_IMAGE
    settings = (
        CLIPVisionConfig(**clip_preset("image_encoder", "ViT-L/14"))
        if known
        else from_source(config, "image_encoder", CLIPVisionConfig)
    )
    with torch.device("meta"):
        return CLIPVisionModelWithProjection(settings).requires_grad_(False).eval()


def _quantize(prior: nn.Module, form: str, autocast: torch.dtype | None) -> None:
    """Quantised layers in the place of linear ones; nf4's kernels know no meta device, int8 stands for them."""
    from stable_cascade.adapters.quantized import QuantizedLinear, quantize

    quantize(prior, "int8" if form == "nf4" else form)
    for layer in prior.modules():
        if isinstance(layer, QuantizedLinear) and autocast is not None:  # they ask for autocast by themselves
            layer.register_forward_pre_hook(lambda module, inputs: (inputs[0].to(autocast), *inputs[1:]))


def _control_shape(config: Any, control: Any, size: tuple[int, int]) -> tuple[int, ...]:
    """Channels and size of a control image: an image's for the effnet bottleneck, else that of the latents."""
    if config.controlnet_bottleneck_mode != "effnet":
        return control.channels, *_latents(config, size)
    side = (config.controlnet_filter_params or {}).get("resize")
    return (control.channels, side, side) if side else (control.channels, *size)


def _latents(config: Any, size: tuple[int, int]) -> tuple[int, int]:
    stride = network_shape(config, "semantic_encoder").stride
    return -(-size[0] // stride), -(-size[1] // stride)


def _empty(*shape: int) -> Tensor:
    return torch.empty(*shape, device="meta")
