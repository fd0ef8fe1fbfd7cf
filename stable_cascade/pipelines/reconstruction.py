"""Pictures through the image encoder and back: what Stages B and A make of semantic latents that are right."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from diffusers.pipelines.pipeline_utils import DiffusionPipeline, ImagePipelineOutput
from torch import Generator, Tensor

from .callbacks import CALLBACK_TENSORS
from .folders import FromFolderMixin
from .inputs import check_count, check_sampling, check_size, resolve_generator
from .outputs import check_output_type, to_pictures, to_pixels
from .prompts import PromptArguments, encode
from .sampling import Settings, decode_vq, sample_vq, start_noise, vq_noise_shape


class StableCascadeReconstructionPipeline(FromFolderMixin, DiffusionPipeline):  # type: ignore[misc]
    """Pictures to semantic latents, and from them to pictures again.

    Args:
        semantic_encoder: the cascade's image encoder, `StableCascadeImageEncoder`.
        previewer: for rough pictures instead of Stages B and A.
        resolution_multiple: pixels of the picture per semantic latent, 42.67 as released, 10.67 embedded.
    """

    model_cpu_offload_seq = "text_encoder->semantic_encoder->previewer->decoder->vqgan"  # type: ignore[assignment]
    _optional_components = ["previewer"]
    _callback_tensor_inputs = CALLBACK_TENSORS

    def __init__(
        self,
        semantic_encoder: Any,
        decoder: Any,
        tokenizer: Any,
        text_encoder: Any,
        scheduler: Any,
        vqgan: Any,
        previewer: Any = None,
        resolution_multiple: float = 42.67,
    ) -> None:
        super().__init__()
        self.register_components(
            semantic_encoder=semantic_encoder,
            decoder=decoder,
            tokenizer=tokenizer,
            text_encoder=text_encoder,
            scheduler=scheduler,
            vqgan=vqgan,
            previewer=previewer,
        )
        self.register_to_config(resolution_multiple=resolution_multiple)

    @torch.no_grad()
    def encode(self, images: Any) -> Tensor:
        """Semantic latents of pictures.

        The encoder looks at them at three quarters of their size (as released: 768 px for a picture of 1024), which
        gives as many latents as the prior draws for that size.

        Shapes: B pictures -> (B, 16, ceil(H / resolution_multiple), ceil(W / resolution_multiple)).
        """
        pixels = to_pixels(images).to(self._execution_device)
        return encode_semantic(self.semantic_encoder, pixels, self.config["resolution_multiple"])

    @torch.no_grad()
    def __call__(
        self,
        images: Any,
        prompt: str | list[str] = "",
        *,
        num_inference_steps: int = 10,
        guidance_scale: float = 1.1,
        guidance_rescale: float = 0.7,
        negative_prompt: str | list[str] | None = None,
        num_images_per_prompt: int = 1,
        generator: Generator | Sequence[Generator] | None = None,
        preview: bool = False,
        output_type: str = "pil",
        return_dict: bool = True,
    ) -> ImagePipelineOutput | tuple[Any]:
        """The pictures rebuilt, at their size, `num_images_per_prompt` times each.

        Args:
            images: PIL pictures, arrays (H, W, 3) or tensors (3, H, W) in [0, 1], all of one size.
            prompt: what they show, one for all or one each; helps a little.
            preview: rough pictures from the previewer, at its own size.

        Raises:
            ValueError: an argument that means nothing, in one line.
        """
        pixels = to_pixels(images)
        height, width = pixels.shape[-2:]
        check_size(height, width)
        check_sampling(num_inference_steps, guidance_scale, guidance_rescale)
        check_count(num_images_per_prompt)
        check_output_type(output_type)
        if preview and self.previewer is None:
            raise ValueError("preview needs a previewer, and this pipeline has none; pass previewer=… when loading")
        arguments = PromptArguments(prompt, negative_prompt).for_count(len(pixels))
        count = len(pixels) * num_images_per_prompt
        generators = resolve_generator(generator, count)
        device = self._execution_device
        settings = Settings(num_inference_steps, guidance_scale, guidance_rescale)
        text = encode(
            arguments, self.text_encoder, self.tokenizer, device, guided=settings.guided, copies=num_images_per_prompt
        )
        semantic = self.encode(pixels).repeat_interleave(num_images_per_prompt, dim=0)
        if preview:
            result: Any = semantic if output_type == "latent" else to_pictures(self.previewer(semantic), output_type)
        else:
            noise = start_noise(vq_noise_shape(self.decoder, self.vqgan, height, width), count, generators, device)
            result = sample_vq(
                self.decoder, self.scheduler, noise, text, semantic, settings,
                generator=generators, progress=self.progress_bar,
            )  # fmt: skip
            if output_type != "latent":
                result = to_pictures(decode_vq(self.vqgan, result, height, width), output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=result) if return_dict else (result,)


def encode_semantic(semantic_encoder: Any, pixels: Tensor, resolution_multiple: float) -> Tensor:
    """Semantic latents at the prior's resolution for pictures of this size.

    Shapes: (B, 3, H, W) in [0, 1] -> (B, 16, ceil(H / resolution_multiple), ceil(W / resolution_multiple)).
    """
    scale = semantic_encoder.stride / resolution_multiple
    size = [max(semantic_encoder.stride, round(side * scale)) for side in pixels.shape[-2:]]
    shrunk = F.interpolate(pixels, size=size, mode="bilinear", antialias=True, align_corners=False).clamp(0, 1)
    return semantic_encoder(shrunk).float()
