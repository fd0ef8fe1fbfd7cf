"""Images through the image encoder and back: what Stages B and A make of semantic latents that are right."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Unpack

import torch
from diffusers.pipelines.pipeline_utils import DiffusionPipeline, ImagePipelineOutput
from PIL import Image
from torch import Generator, Tensor

from .call import Sampling, is_number, to_pixels
from .habits import HabitsMixin, VAETilingMixin
from .load import FromFolderMixin
from .prompts import PromptArguments
from .source import read_source
from .stages import (
    CALLBACK_TENSORS,
    begin,
    check_call,
    decode,
    draw_vq,
    embed_text,
    encode_semantic,
    preview_images,
    rough,
    stage_settings,
)

MOST_COMPRESSION = 4
"""Largest `compression`, in strides of the image encoder; Stage B has seen up to 2 in training."""


class StableCascadeReconstructionPipeline(HabitsMixin, FromFolderMixin, VAETilingMixin, DiffusionPipeline):  # type: ignore[misc]
    """Images to semantic latents, and from them to images again.

    Args:
        semantic_encoder: the cascade's image encoder, `StableCascadeSemanticEncoder`.
        previewer: for rough images instead of Stages B and A.
        resolution_multiple: pixels of the image per semantic latent, 42.67 as released, 10.67 embedded.
    """

    # A network makes room for the one after it alone: what every call runs comes last and without a gap.
    model_cpu_offload_seq = "semantic_encoder->previewer->text_encoder->decoder->vqgan"  # type: ignore[assignment]
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
    def encode(self, images: Any, compression: float | None = None) -> Tensor:
        """Semantic latents of images, as many as the prior draws for their size.

        Shapes: B images -> (B, 16, ceil(H / compression), ceil(W / compression)).

        Args:
            compression: pixels per latent, a side; see the call.
        """
        pixels = to_pixels(images).to(self._execution_device)
        return encode_semantic(self.semantic_encoder, pixels, self._multiple(compression))

    @torch.no_grad()
    def __call__(
        self,
        images: Any,
        prompt: str | list[str] = "",
        *,
        compression: float | None = None,
        height: int | None = None, width: int | None = None,
        num_inference_steps: int = 10, guidance_scale: float = 1.1,
        negative_prompt: str | list[str] | None = None,
        num_images_per_prompt: int = 1, generator: Generator | Sequence[Generator] | None = None,
        preview: bool = False, output_type: str = "pil", return_dict: bool = True,
        **sampling: Unpack[Sampling],
    ) -> ImagePipelineOutput | tuple[Any]:  # fmt: skip
        """The images rebuilt, `num_images_per_prompt` times each.

        Args:
            images: PIL images, arrays (H, W, 3) or tensors (3, H, W) in [0, 1], all of one size.
            prompt: what they show, one for all or one each; helps a little.
            compression: pixels of the image per semantic latent, a side: by default `resolution_multiple`, from the
                image encoder's stride (32 as released, 8 embedded) to four times it. Less keeps more of the image;
                beyond twice the stride Stage B has seen nothing in training.
            height, width: as in `StableCascadePipeline`: by default the images' own, in multiples of 8.
            preview: rough images from the previewer, at its own size.

        Raises:
            ValueError: an argument that means nothing, in one line.
        """
        # Read and check the arguments.
        if images is None:
            raise ValueError("images is missing; give the images to rebuild")
        source = read_source(images, None, 0.0, height, width, name="images")
        check_call(self, source, None, output_type, preview=preview)
        multiple = self._multiple(compression)
        settings = stage_settings(num_inference_steps, guidance_scale, sampling)
        arguments = PromptArguments(prompt, negative_prompt)
        call = begin(self, source, arguments, num_images_per_prompt, generator)

        # Semantic latents of the images, and back: Stage B and A, or the previewer.
        text = embed_text(self, call, settings)
        assert call.source.pixels is not None
        semantic = encode_semantic(self.semantic_encoder, call.source.pixels.to(call.device), multiple)
        if preview:
            result = rough(self.previewer, semantic, output_type)
        else:
            result = decode(self, call, draw_vq(self, call, text, semantic, settings), output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=result) if return_dict else (result,)

    @torch.no_grad()
    def preview_images(self, clean: Tensor) -> list[Image.Image]:
        """Rough images of semantic latents. Shapes: (B, 16, h, w) -> B images of 8 w x 8 h.

        Raises:
            ValueError: the pipeline has no previewer, or these are no semantic latents.
        """
        return preview_images(self.previewer, clean)

    def _multiple(self, compression: float | None) -> float:
        if compression is None:
            return self.config["resolution_multiple"]
        stride = self.semantic_encoder.stride
        if not is_number(compression) or not stride <= compression <= MOST_COMPRESSION * stride:
            raise ValueError(
                f"compression {compression} is not from {stride} to {MOST_COMPRESSION * stride}, pixels per semantic "
                f"latent; {self.config['resolution_multiple']:.4g} is usual here"
            )
        return float(compression)
