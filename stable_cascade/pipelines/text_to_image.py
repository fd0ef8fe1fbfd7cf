"""The whole cascade: text, and what else an image may start from or follow, to images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Unpack

import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline, ImagePipelineOutput
from PIL import Image
from torch import Generator, Tensor

from stable_cascade.adapters.loaders import StableCascadeLoraLoaderMixin

from .call import Sampling, default_side
from .control import as_component, read_control
from .decoder import StableCascadeDecoderPipeline
from .habits import OF_PRIOR, HabitsMixin, OtherName, VAETilingMixin, with_diffusers_names
from .load import FromFolderMixin
from .prior import StableCascadePriorPipeline
from .prompts import EncodePromptMixin, PromptArguments
from .source import read_source
from .stages import (
    CALLBACK_TENSORS,
    begin,
    check_call,
    check_guide,
    control_size,
    decode,
    draw_semantic,
    draw_vq,
    embed_text,
    image_conditions,
    preview_images,
    rough,
    stage_settings,
    step_callback,
)


class StableCascadePipeline(  # type: ignore[misc]
    HabitsMixin, FromFolderMixin, EncodePromptMixin, VAETilingMixin, DiffusionPipeline, StableCascadeLoraLoaderMixin
):
    """Text to images through all three stages, or to rough images through the previewer.

    What is drawn is a matter of arguments, and they combine: a text (`prompt`), images that it should resemble
    (`images`), an image to start from (`image`, `strength`), to fill in or to extend (`mask_image`), a control image
    to follow (`control_image`).

    Args:
        prior, prior_scheduler: Stage C, sampled with shift 2.
        decoder, scheduler: Stage B, sampled with shift 1.
        vqgan: Stage A.
        image_encoder: CLIP's, for reference images; `feature_extractor` is kept for folders that have one.
        semantic_encoder: the image encoder of the cascade, for images to start from.
        controlnet: a `StableCascadeControlNet`, or a list of several, which becomes `StableCascadeMultiControlNet`.
        resolution_multiple: pixels of the image per semantic latent, 42.67 as released, 10.67 embedded.
    """

    # A network makes room for the one after it alone: what every call runs comes last and without a gap.
    model_cpu_offload_seq = (  # type: ignore[assignment]
        "image_encoder->semantic_encoder->controlnet->previewer->text_encoder->prior->decoder->vqgan"
    )
    _optional_components = ["image_encoder", "feature_extractor", "semantic_encoder", "previewer", "controlnet"]
    _callback_tensor_inputs = CALLBACK_TENSORS

    prior_prior, prior_text_encoder, prior_tokenizer, prior_feature_extractor, prior_image_encoder = (
        OtherName(name) for name in OF_PRIOR.values()
    )

    @with_diffusers_names
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
        controlnet: Any = None,
        resolution_multiple: float = 42.67,
    ) -> None:
        super().__init__()
        # Stage C's parts, Stage B's and A's, and the optional ones.
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
            controlnet=as_component(controlnet),
        )
        self.register_to_config(resolution_multiple=resolution_multiple)

    @torch.no_grad()
    def __call__(
        self,
        prompt: str | list[str] | None = None, images: Any = None, height: int | None = None, width: int | None = None,
        *,
        image: Any = None, strength: float | None = None, mask_image: Any = None,
        control_image: Any = None, controlnet_conditioning_scale: float | Sequence[float] = 1.0,
        control_guidance_start: float | Sequence[float] = 0.0, control_guidance_end: float | Sequence[float] = 1.0,
        prior_num_inference_steps: int = 20, prior_guidance_scale: float = 4.0,
        num_inference_steps: int = 10, decoder_guidance_scale: float = 1.1,
        negative_prompt: str | list[str] | None = None,
        prompt_embeds: Tensor | None = None, prompt_embeds_pooled: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None, negative_prompt_embeds_pooled: Tensor | None = None,
        image_embeds: Tensor | None = None, image_weights: Sequence[float] | None = None,
        num_images_per_prompt: int = 1, generator: Generator | Sequence[Generator] | None = None,
        latents: Tensor | None = None, preview: bool = False, output_type: str = "pil", return_dict: bool = True,
        prior_callback_on_step_end: Callable[..., Any] | None = None,
        prior_callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        callback_on_step_end: Callable[..., Any] | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        guide_prior: Any = None,
        **sampling: Unpack[Sampling],
    ) -> ImagePipelineOutput | tuple[Any]:  # fmt: skip
        """Images for each prompt, `num_images_per_prompt` in a row.

        Args:
            images: reference images for CLIP, all of them shown for every prompt; or `image_embeds`, (n, D).
            image_weights: how much each reference image counts: 1 as it is, 0 like none, between and beyond in
                proportion.
            height, width: of the image, multiples of 8 from 64 up; by default those of `image`, rounded down to
                that around its middle. An image of another size is resized to cover it, and cropped.
            image: image to start from, one for all prompts or one each; PIL, array (H, W, 3), tensor (3, H, W).
            strength: how far `image` is noised: 0 rebuilds it, 1 starts from noise alone; 0.75, with a mask 1.
            mask_image: white where `image` is repainted, black where it is kept; every latent that the white touches
                is drawn anew, and the kept pixels are pasted at the end.
            control_image: what the ControlNet's filter makes of an image, best at `control_size(height, width)`, to
                which others are resized; one for all, one per prompt or one per image, with several ControlNets a list
                with that of each.
            controlnet_conditioning_scale: factor of the residuals; as the next two, one or a list for several.
            control_guidance_start, control_guidance_end: part of Stage C's steps in which a ControlNet acts.
            generator: one for the batch, or one per image, which then looks the same alone or among others.
            latents: Stage C's noise to start from.
            preview: rough images from the previewer, without Stages B and A, at the previewer's own size.
            output_type: `pil`, `np`, `pt`, or `latent` for Stage A's latents (Stage C's in a preview).
            guide_prior: a worse prior (a smaller one, an early checkpoint) on the same device: Stage C is guided away
                from its prediction, instead of from that without text (autoguidance).
            sampling: of both stages, see `pipelines.knobs.Sampling`: `guidance_method`, `guidance_rescale` (0.7),
                `guidance_interval`, the times t (1 noise, 0 clean) within which guidance acts, and `cache_interval`:
                every so many steps run the whole network; those between run its outer half of levels around what the
                last whole one made of the deeper half. 1 runs all; 2 is faster and rougher.

        Raises:
            ValueError: an argument that means nothing, in one line.
        """
        # Read and check the arguments: nothing is computed before all of them are sound.
        side = default_side(self.config["resolution_multiple"])
        source = read_source(image, mask_image, strength, height, width, side=side)
        check_call(self, source, latents, output_type, preview=preview)
        prior_settings = stage_settings(
            prior_num_inference_steps, prior_guidance_scale, sampling,
            names=("prior_num_inference_steps", "prior_guidance_scale"),
        )  # fmt: skip
        settings = stage_settings(
            num_inference_steps, decoder_guidance_scale, sampling,
            names=("num_inference_steps", "decoder_guidance_scale"),
        )  # fmt: skip
        arguments = PromptArguments(
            prompt, negative_prompt, prompt_embeds, prompt_embeds_pooled, negative_prompt_embeds,
            negative_prompt_embeds_pooled,
        )  # fmt: skip
        call = begin(self, source, arguments, num_images_per_prompt, generator)
        check_guide(self.prior, guide_prior, call)
        control = read_control(
            self, control_image, controlnet_conditioning_scale, control_guidance_start, control_guidance_end,
            count=call.count,
        )  # fmt: skip
        names = prior_callback_on_step_end_tensor_inputs
        prior_on_step = step_callback(self, prior_settings, prior_callback_on_step_end, names, "prior_")
        on_step = step_callback(self, settings, callback_on_step_end, callback_on_step_end_tensor_inputs)

        # Conditions, Stage C, then Stages B and A or the previewer.
        shown = image_conditions(self.image_encoder, images, image_embeds, image_weights, call)
        text = embed_text(self, call, prior_settings, settings)
        semantic = draw_semantic(
            self, self.prior_scheduler, call, text, shown, prior_settings, image_weights=image_weights,
            latents=latents, control=control, on_step=prior_on_step, guide_prior=guide_prior,
        )  # fmt: skip
        if preview:
            result = rough(self.previewer, semantic, output_type)
        else:
            vq_latents = draw_vq(self, call, text, semantic, settings, on_step=on_step)
            result = decode(self, call, vq_latents, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=result) if return_dict else result

    @property
    def prior_pipe(self) -> StableCascadePriorPipeline:
        """Stage C's pipeline on the same components, as diffusers' combined pipeline has it."""
        return StableCascadePriorPipeline.from_pipe(self, scheduler=self.prior_scheduler)

    @property
    def decoder_pipe(self) -> StableCascadeDecoderPipeline:
        """Stages B's and A's pipeline on the same components."""
        return StableCascadeDecoderPipeline.from_pipe(self)

    @torch.no_grad()
    def preview_images(self, clean: Tensor) -> list[Image.Image]:
        """Rough images of semantic latents, for callbacks that show how a drawing grows.

        `prior_callback_on_step_end_tensor_inputs=["clean"]` gives a callback the latents.

        Shapes: (B, 16, h, w) -> B images of 8 w x 8 h.

        Raises:
            ValueError: the pipeline has no previewer, or these are no semantic latents.
        """
        return preview_images(self.previewer, clean)

    def control_size(self, height: int | None = None, width: int | None = None) -> tuple[int, int]:
        """Height and width at which a ControlNet saw the images of this size in training: three quarters of them.

        A filter that is given an image of that size makes the control image that fits best.
        """
        side = default_side(self.config["resolution_multiple"])
        return control_size(self, side if height is None else height, side if width is None else width)[0]


StableCascadeCombinedPipeline = StableCascadePipeline  # diffusers' name of it
