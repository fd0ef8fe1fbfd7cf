"""Stage C alone: text, and perhaps pictures, to semantic latents."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from torch import Generator, Tensor

from stable_cascade.adapters.loaders import StableCascadeLoraLoaderMixin

from .callbacks import CALLBACK_TENSORS, step_callback
from .folders import FromFolderMixin
from .inputs import check_count, check_sampling, check_size, default_side, resolve_generator, semantic_size
from .outputs import StableCascadePriorPipelineOutput, check_output_type
from .prompts import PromptArguments, embed_images, encode
from .sampling import Settings, sample_semantic, start_noise


class StableCascadePriorPipeline(FromFolderMixin, DiffusionPipeline, StableCascadeLoraLoaderMixin):  # type: ignore[misc]
    """Text to semantic latents, for `StableCascadeDecoderPipeline` or the previewer.

    Args:
        prior: Stage C's network.
        scheduler: sampled with shift 2; a DDPMWuerstchenScheduler is replaced by ours.
        resolution_multiple: pixels of the picture per semantic latent, 42.67 as released.
    """

    model_cpu_offload_seq = "text_encoder->image_encoder->prior"  # type: ignore[assignment]
    _optional_components = ["image_encoder", "feature_extractor"]
    _callback_tensor_inputs = CALLBACK_TENSORS

    def __init__(
        self,
        tokenizer: Any,
        text_encoder: Any,
        prior: Any,
        scheduler: Any,
        resolution_multiple: float = 42.67,
        feature_extractor: Any = None,
        image_encoder: Any = None,
    ) -> None:
        super().__init__()
        self.register_components(
            tokenizer=tokenizer,
            text_encoder=text_encoder,
            prior=prior,
            scheduler=scheduler,
            feature_extractor=feature_extractor,
            image_encoder=image_encoder,
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
        num_inference_steps: int = 20,
        guidance_scale: float = 4.0,
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
        controlnet: Any = None,
        control_image: Tensor | None = None,
        controlnet_conditioning_scale: float = 1.0,
        output_type: str = "pt",
        return_dict: bool = True,
        callback_on_step_end: Callable[..., Any] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
    ) -> StableCascadePriorPipelineOutput | tuple[Any, ...]:
        """Semantic latents for each prompt, `num_images_per_prompt` in a row.

        Args:
            images: reference pictures for CLIP, all of them shown for every prompt.
            height, width: of the picture, multiples of 8 from 64 up.
            generator: one for the batch, or one per image, which then looks the same alone or among others.
            latents: the noise to start from.
            controlnet: a `StableCascadeControlNet`; `control_image` (B, c, H, W) is what its filter made of a picture,
                one for all images, one per prompt or one per image.
            controlnet_conditioning_scale: factor of its residuals.
            output_type: `pt`, or `np` for arrays.

        Raises:
            ValueError: an argument that means nothing, in one line.
        """
        side = default_side(self.config["resolution_multiple"])
        height, width = side if height is None else height, side if width is None else width
        check_size(height, width)
        check_sampling(num_inference_steps, guidance_scale, guidance_rescale)
        check_count(num_images_per_prompt)
        check_output_type(output_type, ("pt", "np"))
        arguments = PromptArguments(
            prompt, negative_prompt, prompt_embeds, prompt_embeds_pooled, negative_prompt_embeds,
            negative_prompt_embeds_pooled,
        )  # fmt: skip
        on_step = step_callback(self, callback_on_step_end, callback_on_step_end_tensor_inputs)
        count = arguments.count * num_images_per_prompt
        generators = resolve_generator(generator, count)
        device = self._execution_device
        settings = Settings(num_inference_steps, guidance_scale, guidance_rescale)
        text = encode(
            arguments, self.text_encoder, self.tokenizer, device, guided=settings.guided, copies=num_images_per_prompt
        )
        shown = image_conditions(self.image_encoder, images, image_embeds, device, count=count)
        residuals = control_residuals(controlnet, control_image, controlnet_conditioning_scale, device, count=count)
        shape = (self.prior.config.in_channels, *semantic_size(height, width, self.config["resolution_multiple"]))
        noise = start_noise(shape, count, generators, device, latents)
        semantic = sample_semantic(
            self.prior, self.scheduler, noise, text, shown, settings,
            generator=generators, progress=self.progress_bar, on_step=on_step, control=residuals,
        )  # fmt: skip
        self.maybe_free_model_hooks()
        values = (semantic, text.hidden, text.pooled, text.negative_hidden, text.negative_pooled)
        if output_type == "np":
            values = tuple(None if value is None else value.float().cpu().numpy() for value in values)  # type: ignore[assignment]
        return StableCascadePriorPipelineOutput(*values) if return_dict else values


def control_residuals(
    controlnet: Any, image: Tensor | None, scale: float, device: torch.device, *, count: int
) -> list[Tensor | None] | None:
    """A ControlNet's residuals, one row per image to draw; None without a ControlNet.

    Shapes: image (n, c, H, W), where n divides count -> each (count, C, h, w).

    Raises:
        ValueError: only one of ControlNet and image is given, or the rows do not go into the images.
    """
    if (controlnet is None) != (image is None):
        raise ValueError("controlnet and control_image belong together; give both or neither")
    if controlnet is None or image is None:
        return None
    if not len(image) or count % len(image):
        raise ValueError(f"control_image has {len(image)} rows for {count} images; give 1, or one per prompt or image")
    residuals = controlnet.to(device)(image.to(device))
    return [None if one is None else scale * one.repeat_interleave(count // len(image), dim=0) for one in residuals]


def image_conditions(
    image_encoder: Any, images: Any, image_embeds: Tensor | None, device: torch.device, *, count: int
) -> Tensor | None:
    """Embedded reference pictures, one row per image to draw; None without any.

    Shapes: n pictures, or embeddings (n, D), (1, n, D) or (count, n, D) -> (count, n, D).

    Raises:
        ValueError: pictures and embeddings are both given.
    """
    if images is not None and image_embeds is not None:
        raise ValueError("images and image_embeds are both given; give one of them")
    if images is not None:
        return embed_images(images, image_encoder, device, count=count)
    if image_embeds is None:
        return None
    image_embeds = image_embeds[None] if image_embeds.ndim == 2 else image_embeds
    if len(image_embeds) not in (1, count):
        raise ValueError(f"image_embeds has {len(image_embeds)} rows for {count} images; give one, or one per image")
    return image_embeds.to(device).expand(count, -1, -1)
