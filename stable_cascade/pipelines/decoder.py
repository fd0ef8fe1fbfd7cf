"""Stages B and A: semantic latents to pictures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline, ImagePipelineOutput
from torch import Generator, Tensor

from .callbacks import CALLBACK_TENSORS, step_callback
from .folders import FromFolderMixin
from .inputs import check_count, check_sampling, check_size, resolve_generator
from .outputs import check_output_type, to_pictures
from .prompts import PromptArguments, encode
from .sampling import Settings, decode_vq, sample_vq, start_noise, vq_noise_shape


class StableCascadeDecoderPipeline(FromFolderMixin, DiffusionPipeline):  # type: ignore[misc]
    """Semantic latents to pictures.

    Args:
        decoder: Stage B's network.
        scheduler: sampled with shift 1; a DDPMWuerstchenScheduler is replaced by ours.
        vqgan: Stage A.
        latent_dim_scale: Stage A's latents per semantic latent, as diffusers' configs have it; the size of a picture
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
        *,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 10,
        guidance_scale: float = 1.1,
        guidance_rescale: float = 0.7,
        negative_prompt: str | list[str] | None = None,
        prompt_embeds_pooled: Tensor | None = None,
        negative_prompt_embeds_pooled: Tensor | None = None,
        num_images_per_prompt: int = 1,
        generator: Generator | Sequence[Generator] | None = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[..., Any] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> ImagePipelineOutput | tuple[Any]:
        """Pictures of semantic latents, `num_images_per_prompt` of each in a row.

        Args:
            image_embeddings: semantic latents (B, 16, h, w), what the prior pipeline returns.
            prompt: one for all latents, or one each; without any, no text.
            height, width: of the picture; by default what the latents stand for.
            latents: the noise to start from, of Stage A's latents.
            output_type: `pil`, `np`, `pt`, or `latent` for Stage A's latents.

        Raises:
            ValueError: an argument that means nothing, in one line.
        """
        semantic = semantic_batch(image_embeddings)
        multiple = self.config["resolution_multiple"] or 4 * self.config["latent_dim_scale"]
        height = _side(semantic.shape[-2], multiple) if height is None else height
        width = _side(semantic.shape[-1], multiple) if width is None else width
        check_size(height, width)
        check_sampling(num_inference_steps, guidance_scale, guidance_rescale)
        check_count(num_images_per_prompt)
        check_output_type(output_type)
        if prompt is None and prompt_embeds_pooled is None:
            prompt = ""
        arguments = PromptArguments(
            prompt=prompt,
            negative_prompt=negative_prompt,
            prompt_embeds_pooled=prompt_embeds_pooled,
            negative_prompt_embeds_pooled=negative_prompt_embeds_pooled,
            pooled_only=True,
        ).for_count(len(semantic))
        on_step = step_callback(self, callback_on_step_end, callback_on_step_end_tensor_inputs)
        semantic = semantic.repeat_interleave(num_images_per_prompt, dim=0)
        generators = resolve_generator(generator, len(semantic))
        device = self._execution_device
        settings = Settings(num_inference_steps, guidance_scale, guidance_rescale)
        text = encode(
            arguments, self.text_encoder, self.tokenizer, device, guided=settings.guided, copies=num_images_per_prompt
        )
        shape = vq_noise_shape(self.decoder, self.vqgan, height, width)
        noise = start_noise(shape, len(semantic), generators, device, latents)
        vq_latents = sample_vq(
            self.decoder, self.scheduler, noise, text, semantic.to(device), settings,
            generator=generators, progress=self.progress_bar, on_step=on_step,
        )  # fmt: skip
        pictures: Any = vq_latents
        if output_type != "latent":
            pictures = to_pictures(decode_vq(self.vqgan, vq_latents, height, width), output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=pictures) if return_dict else (pictures,)


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


def _side(latents: int, multiple: float) -> int:
    """The side of the picture that so many semantic latents stand for, a multiple of 8."""
    return max(64, round(latents * multiple / 8) * 8)
