"""CLIP's two encoders as a config names them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stable_cascade.hub import ask
from stable_cascade.models.base import check_whole
from stable_cascade.models.clip import TextEmbedder, clip_pixels
from stable_cascade.objectives.denoising import chosen
from stable_cascade.objectives.prior import EmbedText
from stable_cascade.transfer import to_device

from .networks import cascade_folder, on_demand

CLIP_TEXT, CLIP_IMAGE = "laion/CLIP-ViT-bigG-14-laion2B-39B-b160k", "openai/clip-vit-large-patch14"
"""The CLIP networks that the released cascade was trained with."""


def clip_source(config: Any, part: str) -> tuple[str, str]:
    """Folder or Hub name, and folder in it, of `tokenizer`, `text_encoder` or `image_encoder` (CLIP's)."""
    key, default = ("clip_image_model_name", CLIP_IMAGE) if part == "image_encoder" else _TEXT
    explicit, folder = getattr(config, key), cascade_folder(config)
    if explicit:
        return explicit, ""
    return (folder, part) if folder else (default, "")


_TEXT = ("clip_text_model_name", CLIP_TEXT)


def from_source(config: Any, part: str, cls: Any, **options: Any) -> Any:
    """`cls.from_pretrained` of one of CLIP's parts: a tokenizer, a network or its config.

    Raises:
        ValueError: it is not there, or a network lacks weights.
    """
    name, folder = clip_source(config, part)
    network = issubclass(cls, torch.nn.Module)
    if network:
        options["output_loading_info"] = True
    load = partial(cls.from_pretrained, name, subfolder=folder, **options)
    try:
        found = load() if Path(name).exists() else ask(name, load)
    except (OSError, TypeError):  # TypeError: what CLIPTokenizer says about a folder without vocabulary
        key = "clip_image_model_name" if part == "image_encoder" else "clip_text_model_name"
        raise ValueError(f"there is no CLIP {part.replace('_', ' ')} in '{name}'; set {key}") from None
    if not network:
        return found
    encoder, info = found
    check_whole(info, cls.__name__, name)
    return encoder


def text_encoder(config: Any, *, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """The tokenizer and CLIP's text encoder, frozen."""
    from transformers import CLIPTextModelWithProjection, CLIPTokenizer

    tokenizer = from_source(config, "tokenizer", CLIPTokenizer)
    encoder = from_source(config, "text_encoder", CLIPTextModelWithProjection, dtype=dtype)
    return tokenizer, encoder.requires_grad_(False).eval()


def text_encoder_on_meta(config: Any) -> tuple[Any, Any]:
    """The tokenizer, and the text encoder without memory for its weights.

    Raises:
        ValueError: one of them is not there.
    """
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

    tokenizer = from_source(config, "tokenizer", CLIPTokenizer)
    settings = from_source(config, "text_encoder", CLIPTextConfig)
    with torch.device("meta"):
        return tokenizer, CLIPTextModelWithProjection(settings)


def frozen_text(config: Any, device: torch.device) -> EmbedText:
    """The config's text encoder as a function without gradients."""
    tokenizer, encoder = text_encoder(config, dtype=getattr(torch, config.dtype))
    embedder = TextEmbedder(on_demand(config, encoder, device), tokenizer)

    @torch.no_grad()
    def embed(captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        hidden, pooled = embedder(captions, device)
        return hidden, pooled

    return embed


def image_encoder(config: Any, device: torch.device) -> tuple[Callable[[Tensor], Tensor], int]:
    """Pixels (B, 3, H, W) in [0, 1] -> CLIP image embeddings (B, 1, D) in float32; and D."""
    from transformers import CLIPVisionModelWithProjection

    encoder = from_source(config, "image_encoder", CLIPVisionModelWithProjection).requires_grad_(False).eval()
    encoder = on_demand(config, encoder, device)

    def encode(pixels: Tensor) -> Tensor:
        shown = clip_pixels(pixels, encoder.config.image_size)
        return encoder(pixel_values=shown).image_embeds.float()[:, None]

    return encode, encoder.config.projection_dim


def image_embedder(config: Any, device: torch.device) -> Callable[[Tensor, Tensor], Tensor | None]:
    """(pixels, seeds) -> CLIP image embeddings (B, 1, D), zeros for all but `image_embedding_share` of the samples."""
    share = config.image_embedding_share
    if not share:
        return lambda pixels, seeds: None
    encode, width = image_encoder(config, device)

    def embed(pixels: Tensor, seeds: Tensor) -> Tensor:
        rows = chosen(seeds, "image embedding", share).nonzero()[:, 0]  # on the host, which need not ask the device
        embeddings = torch.zeros(len(pixels), 1, width, device=device)
        if not len(rows):
            return embeddings
        kept = to_device(rows, device)
        return embeddings.index_copy(0, kept, encode(pixels[kept]))

    return embed
