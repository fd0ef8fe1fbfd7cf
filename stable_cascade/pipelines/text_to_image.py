"""The whole cascade: text to pictures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline, ImagePipelineOutput
from torch import Generator, Tensor

from stable_cascade.adapters.loaders import StableCascadeLoraLoaderMixin

from .callbacks import CALLBACK_TENSORS, step_callback
from .folders import FromFolderMixin
from .inputs import check_count, check_sampling, check_size, default_side, resolve_generator, semantic_size
from .outputs import check_output_type, to_pictures
from .prior import image_conditions
from .prompts import PromptArguments, encode
from .sampling import Settings, decode_vq, sample_semantic, sample_vq, start_noise, vq_noise_shape


class StableCascadePipeline(FromFolderMixin, DiffusionPipeline, StableCascadeLoraLoaderMixin):  # type: ignore[misc]
    """Text to pictures through all three stages, or to rough pictures through the previewer.

    Args:
        prior, prior_scheduler: Stage C, sampled with shift 2.
        decoder, scheduler: Stage B, sampled with shift 1.
        vqgan: Stage A.
        image_encoder: CLIP's, for reference pictures; `feature_extractor` is kept for folders that have one.
        semantic_encoder: the image encoder of the cascade; carried along, reconstruction uses it.
        resolution_multiple: pixels of the picture per semantic latent, 42.67 as released, 10.67 embedded.
    """

    model_cpu_offload_seq = "text_encoder->image_encoder->prior->previewer->decoder->vqgan"  # type: ignore[assignment]
    _optional_components = ["image_encoder", "feature_extractor", "semantic_encoder", "previewer"]
    _callback_tensor_inputs = CALLBACK_TENSORS

    def __init__(
        self,
        tokenizer: Any,
        text_encoder: Any,
        prior: Any,
        prior_scheduler: Any,
        decoder: Any,
        scheduler: Any,
        vqgan: Any,
        feature_extractor: Any = None,
        image_encoder: Any = None,
        semantic_encoder: Any = None,
        previewer: Any = None,
        resolution_multiple: float = 42.67,
    ) -> None:
        super().__init__()
        self.register_components(
            tokenizer=tokenizer,
            text_encoder=text_encoder,
            prior=prior,
            prior_scheduler=prior_scheduler,
            decoder=decoder,
            scheduler=scheduler,
            vqgan=vqgan,
            feature_extractor=feature_extractor,
            image_encoder=image_encoder,
            semantic_encoder=semantic_encoder,
            previewer=previewer,
        )
        self.register_to_config(resolution_multiple=resolution_multiple)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        *,
        images: Any = None,
        height: int | None = None,
        width: int | None = None,
        prior_num_inference_steps: int = 20,
        prior_guidance_scale: float = 4.0,
        num_inference_steps: int = 10,
        decoder_guidance_scale: float = 1.1,
        guidance_rescale: float = 0.7,
        negative_prompt: str | list[str] | None = None,
        prompt_embeds: Tensor | None = None,
        prompt_embeds_pooled: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        negative_prompt_embeds_pooled: Tensor | None = None,
        image_embeds: Tensor | None = None,
        num_images_per_prompt: int = 1,
        generator: Generator | Sequence[Generator] | None = None,
        latents: Tensor | None = None,
        preview: bool = False,
        output_type: str = "pil",
        return_dict: bool = True,
        prior_callback_on_step_end: Callable[..., Any] | None = None,
        prior_callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        callback_on_step_end: Callable[..., Any] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> ImagePipelineOutput | tuple[Any]:
        """Pictures for each prompt, `num_images_per_prompt` in a row.

        Args:
            images: reference pictures for CLIP, all of them shown for every prompt.
            height, width: of the picture, multiples of 8 from 64 up.
            generator: one for the batch, or one per image, which then looks the same alone or among others.
            latents: Stage C's noise to start from.
            preview: rough pictures from the previewer, without Stages B and A, at the previewer's own size.
            output_type: `pil`, `np`, `pt`, or `latent` for Stage A's latents (Stage C's in a preview).

        Raises:
            ValueError: an argument that means nothing, in one line.
        """
        side = default_side(self.config["resolution_multiple"])
        height, width = side if height is None else height, side if width is None else width
        check_size(height, width)
        check_sampling(prior_num_inference_steps, prior_guidance_scale, guidance_rescale, "prior_")
        check_sampling(num_inference_steps, decoder_guidance_scale, guidance_rescale, "decoder_")
        check_count(num_images_per_prompt)
        check_output_type(output_type)
        if preview and self.previewer is None:
            raise ValueError("preview needs a previewer, and this pipeline has none; pass previewer=… when loading")
        arguments = PromptArguments(
            prompt, negative_prompt, prompt_embeds, prompt_embeds_pooled, negative_prompt_embeds,
            negative_prompt_embeds_pooled,
        )  # fmt: skip
        prior_names = prior_callback_on_step_end_tensor_inputs
        prior_on_step = step_callback(self, prior_callback_on_step_end, prior_names)
        on_step = step_callback(self, callback_on_step_end, callback_on_step_end_tensor_inputs)
        count = arguments.count * num_images_per_prompt
        generators = resolve_generator(generator, count)
        run = {"generator": generators, "progress": self.progress_bar}
        device = self._execution_device

        prior_settings = Settings(prior_num_inference_steps, prior_guidance_scale, guidance_rescale)
        settings = Settings(num_inference_steps, decoder_guidance_scale, guidance_rescale)
        guided = prior_settings.guided or settings.guided
        text = encode(
            arguments, self.text_encoder, self.tokenizer, device, guided=guided, copies=num_images_per_prompt
        )
        shown = image_conditions(self.image_encoder, images, image_embeds, device, count=count)
        shape = (self.prior.config.in_channels, *semantic_size(height, width, self.config["resolution_multiple"]))
        noise = start_noise(shape, count, generators, device, latents)
        semantic = sample_semantic(
            self.prior, self.prior_scheduler, noise, text, shown, prior_settings, on_step=prior_on_step, **run
        )
        if preview:
            result: Any = semantic if output_type == "latent" else to_pictures(self.previewer(semantic), output_type)
        else:
            noise = start_noise(vq_noise_shape(self.decoder, self.vqgan, height, width), count, generators, device)
            result = sample_vq(self.decoder, self.scheduler, noise, text, semantic, settings, on_step=on_step, **run)
            if output_type != "latent":
                result = to_pictures(decode_vq(self.vqgan, result, height, width), output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=result) if return_dict else (result,)
