"""A loaded cascade that draws what it is asked for; LoRAs, ControlNets and samplers change between images."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from stable_cascade.compilation import check_compiler, compile_blocks
from stable_cascade.pipelines.call import KNOBS

from .files import with_sums
from .inputs import (
    InputImages,
    Inputs,
    check_task,
    control_view,
    fitted,
    load_controlnet,
    make_control_image,
    read_inputs,
    sized,
)
from .model import (
    LoraShelf,
    check_guide_prior,
    check_lora,
    check_model,
    chosen_device,
    load_guide_prior,
    load_pipeline,
    made_with,
)
from .request import LARGEST_SEED, Drawing

KEPT_CONTROLNETS = 4


@dataclass(frozen=True)
class Drawn:
    """An image and every setting that decided it; `save_image` writes both into one file."""

    image: Image.Image
    drawing: Drawing
    seconds: float = 0.0
    made_with: Mapping[str, Any] = field(default_factory=dict)


class Session:
    """One cascade, loaded on first use and kept. Several threads may draw with it; they take turns.

    Args:
        model: the word embedded, a folder, a Hub name, or single files, "stage_c.safetensors,stage_b.safetensors",
            with parts that no file holds as "tokenizer=FOLDER" among them.
        dtype: float32, bfloat16 or float16.
        device: by default CUDA where there is one.
        offload: keeps only the network at work on the device.
        tiling: whether Stage A works in tiles; by default from 2048 x 2048 pixels on.
        lite, variant: of the model, as in `StableCascadePipeline.from_pretrained`.
        compile: compiles the blocks of Stages C and B when they first run.

    Raises:
        ValueError: no such dtype, device, folder or file; nothing to compile with.
    """

    def __init__(
        self,
        model: str = "embedded",
        *,
        dtype: str = "float32",
        device: str | None = None,
        offload: bool = False,
        tiling: bool | None = None,
        lite: bool = False,
        variant: str | None = None,
        compile: bool = False,
    ) -> None:
        check_model(model, dtype, device)
        self.model, self.dtype, self.lite, self.variant = model, dtype, lite, variant
        self.device, self.offload, self.tiling = chosen_device(device), offload, tiling
        self.compile = compile
        if compile:
            check_compiler(self.device.type)
        self._pipeline: Any = None
        self._loras: LoraShelf | None = None
        self._controlnets: dict[tuple[str, str | None], Any] = {}
        self._guide: tuple[str, Any] | None = None
        self._lock = threading.RLock()

    @property
    def pipeline(self) -> Any:
        """The pipeline, on its device.

        Raises:
            ValueError: there is no such model, or it lacks a part.
        """
        with self._lock:
            if self._pipeline is None:
                pipeline = load_pipeline(self.model, self.dtype, lite=self.lite, variant=self.variant)
                pipeline.set_progress_bar_config(disable=True)
                if self.tiling is not None:
                    pipeline.enable_vae_tiling() if self.tiling else pipeline.disable_vae_tiling()
                self._pipeline, self._loras = pipeline, LoraShelf(pipeline)
                self._place()
                if self.compile:
                    compile_blocks(pipeline.prior)
                    compile_blocks(pipeline.decoder)
            return self._pipeline

    def drawing(self, **settings: Any) -> Drawing:
        """A drawing for this session's model and dtype."""
        return Drawing(**{**self._own(), **settings})

    def check(
        self,
        drawing: Drawing,
        in_memory: InputImages | None = None,
        *,
        count: int = 1,
        batch_size: int = 1,
        allow_changed_files: bool = False,
    ) -> None:
        """Passes when `each` may draw this, as far as that is known without the model.

        Raises:
            ValueError: an input is missing, damaged, changed or does not fit; an argument that means nothing.
        """
        _check_count(drawing, count, batch_size)
        self._checked(drawing, in_memory or InputImages(), allow_changed_files)

    def draw(self, drawing: Drawing, in_memory: InputImages | None = None, **options: Any) -> list[Drawn]:
        """The images that `each` draws, as a list."""
        return list(self.each(drawing, in_memory, **options))

    def each(
        self,
        drawing: Drawing,
        in_memory: InputImages | None = None,
        *,
        count: int = 1,
        batch_size: int = 1,
        on_step: OnStep | None = None,
        previews: bool = True,
        allow_changed_files: bool = False,
    ) -> Iterator[Drawn]:
        """`count` images, one after the other; image i has seed + i and is the one that this seed draws alone.

        Args:
            in_memory: given here, they stand for the files that the drawing names, which then need not exist.
            batch_size: images at a time; above 1 the last bit of an image may depend on it.
            on_step: called after every step; what it raises stops the drawing.
            previews: whether `on_step` gets rough images.
            allow_changed_files: draws from files whose SHA-256 is not the one that the drawing has.

        Raises:
            ValueError: an input is missing, damaged or does not fit, before the model is loaded where that is
                known; an argument that means nothing.
        """
        _check_count(drawing, count, batch_size)
        drawing, inputs = self._checked(drawing, in_memory or InputImages(), allow_changed_files)
        watching = callbacks(on_step, previews, drawing)
        seeds = range(drawing.seed, drawing.seed + count)
        groups = [seeds[start : start + batch_size] for start in range(0, count, batch_size)]
        return (drawn for group in groups for drawn in self._draw(drawing, inputs, group, watching))

    def control_images(self, drawing: Drawing, in_memory: InputImages | None = None) -> list[Image.Image]:
        """What each ControlNet is shown, as RGB images.

        Raises:
            ValueError: as `each`.
        """
        drawing, inputs = self._checked(drawing, in_memory or InputImages(), True)
        drawing, inputs = self._fitted(drawing, inputs)
        return [control_view(control) for control in self._controls(drawing, inputs)]

    def original(self, drawing: Drawing, in_memory: InputImages | None = None) -> Image.Image | None:
        """The input image at the size that is drawn; None where a task has none.

        Raises:
            ValueError: as `each`.
        """
        drawing, inputs = self._checked(drawing, in_memory or InputImages(), True)
        return self._fitted(drawing, inputs)[1].image

    def _own(self) -> dict[str, Any]:
        return {"model": self.model, "dtype": self.dtype, "lite": self.lite, "variant": self.variant}

    def _checked(self, drawing: Drawing, in_memory: InputImages, allow_changed: bool) -> tuple[Drawing, Inputs]:
        for name, own in self._own().items():
            if getattr(drawing, name) != own:
                raise ValueError(
                    f"the drawing has {name} {getattr(drawing, name)!r}, this session {own!r}; make one for it"
                )
        check_task(drawing, in_memory)
        if drawing.guide_prior is not None:
            check_guide_prior(drawing.guide_prior, drawing.negative_prompt)
        drawing = with_sums(drawing, skip=in_memory.names(), allow_changed=allow_changed)
        for choice in drawing.loras:
            check_lora(choice)
        return drawing, read_inputs(drawing, in_memory)

    def _fitted(self, drawing: Drawing, inputs: Inputs) -> tuple[Drawing, Inputs]:
        from stable_cascade.pipelines.call import default_side

        drawing = sized(drawing, inputs, default_side(self.pipeline.config["resolution_multiple"]))
        control_size = self.pipeline.control_size(drawing.height, drawing.width)
        return drawing, fitted(drawing, inputs, control_size)

    def _place(self) -> None:
        """Puts the networks where they work; again after one was added, since offloading hooks into each of them."""
        if self.offload and self.device.type != "cpu":
            self._pipeline.remove_all_hooks()
            self._pipeline.enable_model_cpu_offload(device=self.device)
        else:
            self._pipeline.to(self.device)

    @torch.no_grad()
    def _draw(self, drawing: Drawing, inputs: Inputs, seeds: Sequence[int], watching: dict[str, Any]) -> list[Drawn]:
        """A batch of images, one per seed."""
        with self._lock:
            # Put the model into the state that the drawing describes.
            pipeline = self.pipeline
            drawing, inputs = self._fitted(drawing, inputs)
            assert self._loras is not None
            self._loras.use(drawing.loras)
            self._use_controlnets(drawing, inputs)
            # Draw.
            arguments = {**sampling_arguments(drawing), **watching, **text_arguments(pipeline, drawing)}
            arguments |= image_arguments(drawing, inputs) | self._control_arguments(drawing, inputs)
            arguments["guide_prior"] = self._guide_prior(drawing)
            generators = [torch.Generator().manual_seed(seed) for seed in seeds]
            started = time.perf_counter()
            with own_sampler(pipeline, drawing):
                images = pipeline(num_images_per_prompt=len(seeds), generator=generators, **arguments).images
            seconds = (time.perf_counter() - started) / len(seeds)
            known = made_with(self.device, self.dtype) | ({"compiled": True} if self.compile else {})
        return [
            Drawn(image, replace(drawing, seed=seed), seconds, known)
            for image, seed in zip(images, seeds, strict=True)
        ]

    def _guide_prior(self, drawing: Drawing) -> Any:
        """The worse prior that the drawing names, on the device; the last one stays loaded."""
        if drawing.guide_prior is None:
            self._guide = None
        elif self._guide is None or self._guide[0] != drawing.guide_prior:
            loaded = load_guide_prior(drawing.guide_prior, getattr(torch, self.dtype))
            self._guide = drawing.guide_prior, loaded.to(self.device).eval()
        return self._guide and self._guide[1]

    def _use_controlnets(self, drawing: Drawing, inputs: Inputs) -> None:
        """Gives the pipeline the drawing's ControlNets; the last few stay loaded."""
        kept = self._controlnets
        networks = []
        for choice, source in zip(drawing.controlnets, inputs.controls, strict=True):
            key = (str(source.place), choice.sha256)
            if key not in kept:
                kept[key] = load_controlnet(choice, source, getattr(torch, self.dtype))
            kept[key] = kept.pop(key)  # the last used comes last
            networks.append(kept[key])
        while len(kept) > max(KEPT_CONTROLNETS, len(networks)):
            del kept[next(iter(kept))]
        self._register(networks)

    def _register(self, networks: list[Any]) -> None:
        from stable_cascade.models import StableCascadeMultiControlNet

        now = getattr(self._pipeline, "controlnet", None)
        held = list(now.nets) if isinstance(now, StableCascadeMultiControlNet) else [] if now is None else [now]
        if [id(one) for one in held] == [id(one) for one in networks]:
            return
        chosen = StableCascadeMultiControlNet(networks) if len(networks) > 1 else next(iter(networks), None)
        self._pipeline.register_modules(controlnet=chosen)
        if networks:
            self._place()

    def _controls(self, drawing: Drawing, inputs: Inputs) -> list[Tensor]:
        def encode(pixels: Tensor) -> Tensor:
            encoder = self.pipeline.semantic_encoder
            if encoder is None:
                raise ValueError("this filter needs a semantic_encoder, and the model has none; use another model")
            return encoder(pixels.to(encoder.device, encoder.dtype)).float().cpu()

        chosen = zip(drawing.controlnets, inputs.controls, inputs.control_images, strict=True)
        return [
            make_control_image(choice, source, image, mask=inputs.mask_image, encode=encode)
            for choice, source, image in chosen
        ]

    def _control_arguments(self, drawing: Drawing, inputs: Inputs) -> dict[str, Any]:
        if not drawing.controlnets:
            return {}
        several = len(drawing.controlnets) > 1
        columns: dict[str, list[Any]] = {
            "control_image": self._controls(drawing, inputs),
            "controlnet_conditioning_scale": [choice.scale for choice in drawing.controlnets],
            "control_guidance_start": [choice.start for choice in drawing.controlnets],
            "control_guidance_end": [choice.end for choice in drawing.controlnets],
        }
        return {name: values if several else values[0] for name, values in columns.items()}


def _check_count(drawing: Drawing, count: int, batch_size: int) -> None:
    for name, value in (("count", count), ("batch_size", batch_size)):
        if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= 10_000:
            raise ValueError(f"{name} {value!r} is not a whole number from 1 to 10000")
    if drawing.seed + count - 1 > LARGEST_SEED:
        raise ValueError(f"seed {drawing.seed} with count {count} goes beyond {LARGEST_SEED}; take a smaller one")


OnStep = Callable[[str, int, int, "Image.Image | None"], None]
"""(stage `prior` or `decoder`, step from 1, steps, a rough image of Stage C where there is a previewer)."""


def sampling_arguments(drawing: Drawing) -> dict[str, Any]:
    """Size, steps and guidance."""
    names = (
        "height", "width", "prior_num_inference_steps", "prior_guidance_scale", "num_inference_steps",
        "decoder_guidance_scale", "preview", *KNOBS,
    )  # fmt: skip
    return {name: getattr(drawing, name) for name in names}


def text_arguments(pipeline: Any, drawing: Drawing) -> dict[str, Any]:
    """The prompts, or with weights in them their embeddings."""
    negative = drawing.negative_prompt or None
    if not drawing.weighted:
        return {"prompt": drawing.prompt, "negative_prompt": negative}
    names = ("prompt_embeds", "prompt_embeds_pooled", "negative_prompt_embeds", "negative_prompt_embeds_pooled")
    embeds = pipeline.encode_prompt(prompt=drawing.prompt, negative_prompt=negative, weighted=True)
    return dict(zip(names, embeds, strict=True))


def image_arguments(drawing: Drawing, inputs: Inputs) -> dict[str, Any]:
    """The image to start from, its mask, and reference images."""
    arguments: dict[str, Any] = {}
    if inputs.images:
        weights = drawing.image_weights
        arguments |= {"images": list(inputs.images), "image_weights": None if weights is None else list(weights)}
    if inputs.image is not None:
        strength = 0.0 if drawing.task == "reconstruct" else drawing.strength
        arguments |= {"image": inputs.image, "strength": strength}
    if inputs.mask_image is not None:
        arguments["mask_image"] = inputs.mask_image
    return arguments


@contextmanager
def own_sampler(pipeline: Any, drawing: Drawing) -> Iterator[None]:
    """The drawing's sampler in both stages and its shift in Stage C, for the length of one call."""
    from stable_cascade import StableCascadeScheduler

    changes: dict[str, dict[str, Any]] = {"prior_scheduler": {}, "scheduler": {}}
    for one in changes.values():
        one |= {} if drawing.sampler is None else {"sampler": drawing.sampler}
    if drawing.shift is not None:
        changes["prior_scheduler"]["shift"] = drawing.shift
    before = {name: getattr(pipeline, name) for name in changes}
    try:
        for name, settings in changes.items():
            if settings:
                setattr(pipeline, name, StableCascadeScheduler.from_config(before[name].config, **settings))
        yield
    finally:
        for name, scheduler in before.items():
            setattr(pipeline, name, scheduler)


def callbacks(on_step: OnStep | None, previews: bool, drawing: Drawing) -> dict[str, Any]:
    """The pipeline's two callbacks that tell `on_step`."""
    if on_step is None:
        return {}
    # How many steps Stage C takes from this strength.
    share = 0.0 if drawing.task == "reconstruct" else 1.0 if drawing.strength is None else drawing.strength
    prior_steps = max(1, round(share * drawing.prior_num_inference_steps))

    def prior(pipeline: Any, step: int, _time: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        rough = None
        if previews and pipeline.previewer is not None:
            rough = pipeline.preview_images(tensors["clean"][:1])[0]
        on_step("prior", step + 1, prior_steps, rough)
        return {}

    def decoder(_pipeline: Any, step: int, _time: Any, _tensors: dict[str, Any]) -> dict[str, Any]:
        on_step("decoder", step + 1, drawing.num_inference_steps, None)
        return {}

    return {
        "prior_callback_on_step_end": prior,
        "prior_callback_on_step_end_tensor_inputs": ["clean"],
        "callback_on_step_end": decoder,
    }
