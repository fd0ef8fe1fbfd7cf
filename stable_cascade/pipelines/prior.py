"""Stage C alone: text, and perhaps images, to semantic latents."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Unpack

import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline
from torch import Generator, Tensor

from stable_cascade.adapters.loaders import StableCascadeLoraLoaderMixin

from .call import Sampling, StableCascadePriorPipelineOutput, check_output_type, default_side, whole
from .control import as_component, read_control
from .habits import HabitsMixin
from .load import FromFolderMixin
from .prompts import EncodePromptMixin, PromptArguments, embed_images
from .source import read_source
from .stages import (
    CALLBACK_TENSORS,
    begin,
    check_call,
    check_guide,
    draw_semantic,
    embed_text,
    image_conditions,
    stage_settings,
    step_callback,
)


class StableCascadePriorPipeline(  # type: ignore[misc]
    HabitsMixin, FromFolderMixin, EncodePromptMixin, DiffusionPipeline, StableCascadeLoraLoaderMixin
):
    """Text to semantic latents, for `StableCascadeDecoderPipeline` or the previewer.

    Args:
        prior: Stage C's network.
        scheduler: sampled with shift 2; a DDPMWuerstchenScheduler is replaced by ours.
        resolution_multiple: pixels of the image per semantic latent, 42.67 as released.
        semantic_encoder: the image encoder of the cascade, for images to start from.
        controlnet: a `StableCascadeControlNet`, or a list of several.
    """

    # A network makes room for the one after it alone: what every call runs comes last and without a gap.
    model_cpu_offload_seq = "image_encoder->semantic_encoder->controlnet->text_encoder->prior"  # type: ignore[assignment]
    _optional_components = ["image_encoder", "feature_extractor", "semantic_encoder", "controlnet"]
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
        semantic_encoder: Any = None,
        controlnet: Any = None,
    ) -> None:
        super().__init__()
        self.register_components(
            tokenizer=tokenizer,
            text_encoder=text_encoder,
            prior=prior,
            scheduler=scheduler,
            feature_extractor=feature_extractor,
            image_encoder=image_encoder,
            semantic_encoder=semantic_encoder,
            controlnet=as_component(controlnet),
        )
        self.register_to_config(resolution_multiple=resolution_multiple)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None,
        images: Any = None,
        height: int | None = None,
        width: int | None = None,
        num_inference_steps: int = 20,
        *,
        timesteps: Sequence[float] | None = None,
        guidance_scale: float = 4.0,
        image: Any = None, strength: float | None = None, mask_image: Any = None,
        control_image: Any = None, controlnet_conditioning_scale: float | Sequence[float] = 1.0,
        control_guidance_start: float | Sequence[float] = 0.0, control_guidance_end: float | Sequence[float] = 1.0,
        negative_prompt: str | list[str] | None = None,
        prompt_embeds: Tensor | None = None, prompt_embeds_pooled: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None, negative_prompt_embeds_pooled: Tensor | None = None,
        image_embeds: Tensor | None = None, image_weights: Sequence[float] | None = None,
        num_images_per_prompt: int = 1, generator: Generator | Sequence[Generator] | None = None,
        latents: Tensor | None = None, output_type: str = "pt", return_dict: bool = True,
        callback_on_step_end: Callable[..., Any] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        guide_prior: Any = None,
        **sampling: Unpack[Sampling],
    ) -> StableCascadePriorPipelineOutput | tuple[Any, ...]:  # fmt: skip
        """Semantic latents for each prompt, `num_images_per_prompt` in a row.

        What is not said here is as in `StableCascadePipeline`; with a `mask_image` the decoder pipeline is given the
        same two images, so that it keeps what they keep.

        Args:
            timesteps: falling times, the last one where the run ends, in place of `num_inference_steps` equal steps.
            latents: the noise to start from.
            guide_prior: as in `StableCascadePipeline`.
            output_type: `pt` (or `latent`, the same), or `np` for arrays.

        Raises:
            ValueError: an argument that means nothing, in one line.
        """
        side = default_side(self.config["resolution_multiple"])
        source = read_source(image, mask_image, strength, height, width, side=side)
        check_output_type(output_type, ("pt", "latent", "np"))
        check_call(self, source, latents)
        settings = stage_settings(num_inference_steps, guidance_scale, sampling, timesteps=timesteps)
        arguments = PromptArguments(
            prompt, negative_prompt, prompt_embeds, prompt_embeds_pooled, negative_prompt_embeds,
            negative_prompt_embeds_pooled,
        )  # fmt: skip
        source.shortened(settings)  # refuses times beside a strength before anything is embedded
        call = begin(self, source, arguments, num_images_per_prompt, generator)
        check_guide(self.prior, guide_prior, call)
        control = read_control(
            self, control_image, controlnet_conditioning_scale, control_guidance_start, control_guidance_end,
            count=call.count,
        )  # fmt: skip
        on_step = step_callback(self, settings, callback_on_step_end, callback_on_step_end_tensor_inputs)

        shown = image_conditions(self.image_encoder, images, image_embeds, image_weights, call)
        text = embed_text(self, call, settings)
        semantic = draw_semantic(
            self, self.scheduler, call, text, shown, settings, image_weights=image_weights,
            latents=latents, control=control, on_step=on_step, guide_prior=guide_prior,
        )  # fmt: skip
        self.maybe_free_model_hooks()
        values = (semantic, text.hidden, text.pooled, text.negative_hidden, text.negative_pooled)
        if output_type == "np":
            values = tuple(None if value is None else value.float().cpu().numpy() for value in values)  # type: ignore[assignment]
        return StableCascadePriorPipelineOutput(*values) if return_dict else values

    @torch.no_grad()
    def encode_image(
        self, images: Any, device: str | torch.device, dtype: torch.dtype, batch_size: int, num_images_per_prompt: int
    ) -> tuple[Tensor, Tensor]:
        """CLIP's embeddings of the reference images, as the `image_embeds` of a call, and zeros of the same shape.

        Shapes: n images -> twice (batch_size * num_images_per_prompt, n, D).

        Raises:
            ValueError: the pipeline has no image encoder.
        """
        count = whole(batch_size) * whole(num_images_per_prompt)
        shown = embed_images(images, self.image_encoder, torch.device(device), count=count).to(dtype)
        return shown, torch.zeros_like(shown)
