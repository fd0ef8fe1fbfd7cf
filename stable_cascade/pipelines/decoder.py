"""Stages B and A: semantic latents to images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Unpack

import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline, ImagePipelineOutput
from torch import Generator, Tensor

from stable_cascade.adapters.loaders import StableCascadeLoraLoaderMixin

from .call import Sampling, check_output_type, check_size
from .habits import HabitsMixin, VAETilingMixin
from .load import FromFolderMixin
from .prompts import EncodePromptMixin, PromptArguments
from .source import Source, read_source
from .stages import CALLBACK_TENSORS, begin, decode, draw_vq, embed_text, stage_settings, step_callback


class StableCascadeDecoderPipeline(  # type: ignore[misc]
    HabitsMixin, FromFolderMixin, EncodePromptMixin, VAETilingMixin, DiffusionPipeline, StableCascadeLoraLoaderMixin
):
    """Semantic latents to images.

    Args:
        decoder: Stage B's network.
        scheduler: sampled with shift 1; a DDPMWuerstchenScheduler is replaced by ours.
        vqgan: Stage A.
        latent_dim_scale: Stage A's latents per semantic latent, as diffusers' configs have it; the size of an image
            whose size is not given follows from it.
    """

    model_cpu_offload_seq = "text_encoder->decoder->vqgan"  # type: ignore[assignment]
    _callback_tensor_inputs = CALLBACK_TENSORS

    def __init__(
        self,
        decoder: Any,
        tokenizer: Any,
        text_encoder: Any,
        scheduler: Any,
        vqgan: Any,
        latent_dim_scale: float = 10.67,
        resolution_multiple: float | None = None,
    ) -> None:
        super().__init__()
        self.register_components(
            decoder=decoder, tokenizer=tokenizer, text_encoder=text_encoder, scheduler=scheduler, vqgan=vqgan
        )
        self.register_to_config(latent_dim_scale=latent_dim_scale, resolution_multiple=resolution_multiple)

    @torch.no_grad()
    def __call__(
        self,
        image_embeddings: Tensor | list[Tensor],
        prompt: str | list[str] | None = None,
        num_inference_steps: int = 10,
        guidance_scale: float = 1.1,
        *,
        height: int | None = None, width: int | None = None,
        image: Any = None, mask_image: Any = None,
        negative_prompt: str | list[str] | None = None,
        prompt_embeds: Tensor | None = None, prompt_embeds_pooled: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None, negative_prompt_embeds_pooled: Tensor | None = None,
        num_images_per_prompt: int = 1, generator: Generator | Sequence[Generator] | None = None,
        latents: Tensor | None = None, output_type: str = "pil", return_dict: bool = True,
        callback_on_step_end: Callable[..., Any] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        **sampling: Unpack[Sampling],
    ) -> ImagePipelineOutput | tuple[Any]:  # fmt: skip
        """Images of semantic latents, `num_images_per_prompt` of each in a row.

        Args:
            image_embeddings: semantic latents (B, 16, h, w), what the prior pipeline returns.
            prompt: one for all latents, or one each; without any, no text.
            prompt_embeds, negative_prompt_embeds: taken as in diffusers, beside the pooled ones, which alone are read.
            height, width: of the image; by default what the latents stand for.
            image, mask_image: an image, and white where it is drawn anew; the rest of it is kept.
            latents: the noise to start from, of Stage A's latents.
            output_type: `pil`, `np`, `pt`, or `latent` for Stage A's latents.

        Raises:
            ValueError: an argument that means nothing, in one line.
        """
        # Read and check the arguments.
        semantic = semantic_batch(image_embeddings)
        multiple = self.config["resolution_multiple"] or 4 * self.config["latent_dim_scale"]
        height = _side(semantic.shape[-2], multiple) if height is None else height
        width = _side(semantic.shape[-1], multiple) if width is None else width
        source = _source(image, mask_image, height, width)
        settings = stage_settings(num_inference_steps, guidance_scale, sampling)
        check_output_type(output_type)
        _check_pair("", prompt_embeds, prompt_embeds_pooled)
        _check_pair("negative_", negative_prompt_embeds, negative_prompt_embeds_pooled)
        arguments = PromptArguments(
            prompt="" if prompt is None and prompt_embeds_pooled is None else prompt,
            negative_prompt=negative_prompt,
            prompt_embeds_pooled=prompt_embeds_pooled,
            negative_prompt_embeds_pooled=negative_prompt_embeds_pooled,
            pooled_only=True,
        ).for_count(len(semantic))
        call = begin(self, source, arguments, num_images_per_prompt, generator)
        on_step = step_callback(self, settings, callback_on_step_end, callback_on_step_end_tensor_inputs)

        # Text, Stage B, Stage A.
        text = embed_text(self, call, settings)
        semantic = semantic.repeat_interleave(num_images_per_prompt, dim=0).to(call.device)
        vq_latents = draw_vq(self, call, text, semantic, settings, latents=latents, on_step=on_step)
        images = decode(self, call, vq_latents, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else images


def semantic_batch(image_embeddings: Any) -> Tensor:
    """Semantic latents as one batch.

    Raises:
        ValueError: not (B, C, h, w), or a list of that.
    """
    if isinstance(image_embeddings, list | tuple) and image_embeddings:
        image_embeddings = torch.cat([one if one.ndim == 4 else one[None] for one in image_embeddings])
    if not isinstance(image_embeddings, Tensor) or image_embeddings.ndim != 4:
        shape = tuple(getattr(image_embeddings, "shape", ())) or type(image_embeddings).__name__
        raise ValueError(f"image_embeddings are {shape}; give semantic latents of shape (batch, channels, h, w)")
    return image_embeddings


def _check_pair(sign: str, hidden: Tensor | None, pooled: Tensor | None) -> None:
    if hidden is not None and pooled is None:
        raise ValueError(f"{sign}prompt_embeds needs {sign}prompt_embeds_pooled, which Stage B reads; give both")


def _source(image: Any, mask_image: Any, height: int, width: int) -> Source:
    if image is not None and mask_image is None:
        raise ValueError("image is given without mask_image; Stage B keeps what a mask says, give both or neither")
    check_size(height, width)
    return read_source(image, mask_image, None, height, width, side=height)


def _side(latents: int, multiple: float) -> int:
    """The side of the image that so many semantic latents stand for, a multiple of 8."""
    return max(64, round(latents * multiple / 8) * 8)
