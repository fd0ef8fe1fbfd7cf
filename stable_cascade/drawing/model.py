"""A drawing's model and LoRAs: checked, loaded, and kept between drawings."""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

import stable_cascade
from stable_cascade.disk import local_path
from stable_cascade.files.places import describe
from stable_cascade.wording import brief, quoted

from .files import is_hub_name, lora_files
from .request import DTYPES, LoraChoice


def check_model(model: str, dtype: str = "float32", device: str | None = None) -> None:
    """Passes when a model may be loaded, as far as that is known without its weights.

    Raises:
        ValueError: no such dtype, device, folder or file.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype {quoted(dtype, 40)} is not one of {', '.join(DTYPES)}")
    if device is not None:
        chosen_device(device)
    files, parts = single_files(model)
    for file in files:
        if not file.is_file():
            raise ValueError(
                f"model file {quoted(file)} does not exist; give folders as NAME=FOLDER, files as they are"
            )
    for name, place in parts.items():
        if not place:
            raise ValueError(f"model {quoted(model)} says no place for {brief(name, 40)}; write NAME=PLACE")


def single_files(model: str) -> tuple[list[Path], dict[str, str]]:
    """The files of "stage_c.safetensors,stage_b.safetensors", and parts given as `tokenizer=FOLDER` among them.

    Both are empty where the model is the word embedded, a folder or a Hub name.
    """
    place = local_path(model)
    if model == "embedded" or place.is_dir():
        return [], {}
    if place.is_file():
        return [place], {}
    if "," not in model and not model.endswith(".safetensors"):
        return [], {}
    words = [part.strip() for part in model.split(",")]
    named = dict(word.split("=", 1) for word in words if "=" in word)
    return [local_path(word) for word in words if "=" not in word], named


def load_pipeline(model: str, dtype: str, *, lite: bool = False, variant: str | None = None) -> Any:
    """The whole cascade on the CPU.

    Raises:
        ValueError: there is no such model, or it lacks a part.
    """
    from stable_cascade import StableCascadePipeline
    from stable_cascade.embedded import embedded_path

    check_model(model, dtype)
    settings: dict[str, Any] = {"torch_dtype": getattr(torch, dtype)}
    # From single files, or from a folder or repository.
    files, parts = single_files(model)
    if files:
        if lite or variant:
            raise ValueError(
                "lite and variant choose files of a folder; these files are chosen already, leave both away"
            )
        return StableCascadePipeline.from_single_file(*files, **settings, **parts)
    if variant is not None:
        settings["variant"] = variant
    if lite:
        settings["lite"] = True
    return StableCascadePipeline.from_pretrained(embedded_path() if model == "embedded" else model, **settings)


def check_guide_prior(path: str, negative_prompt: str = "") -> None:
    """Passes for a file or folder that can be a prior, and no negative prompt, whose place it takes.

    Raises:
        ValueError: there is none, or one of both.
    """
    if negative_prompt:
        raise ValueError("negative_prompt and guide_prior are both given; Stage C is guided away from one, choose it")
    place = local_path(path)
    if not place.is_file() and not any((folder / "config.json").is_file() for folder in (place, place / "prior")):
        raise ValueError(f"guide_prior {quoted(path)} is no file and no folder of a prior or of a cascade")


def load_guide_prior(path: str, dtype: torch.dtype) -> Any:
    """A prior from a file, its own folder, or that of a cascade.

    Raises:
        ValueError: it cannot be read as one.
    """
    from stable_cascade import StableCascadePrior

    check_guide_prior(path)
    place = local_path(path)
    if place.is_file():
        return StableCascadePrior.from_single_file(place, torch_dtype=dtype)
    own = place if (place / "config.json").is_file() else place / "prior"
    return StableCascadePrior.from_pretrained(own, torch_dtype=dtype)


def chosen_device(device: str | None) -> torch.device:
    """The device of that name, or CUDA where there is one.

    Raises:
        ValueError: no such device.
    """
    try:
        chosen = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError:
        raise ValueError(f"device {quoted(device, 40)} is none; give cpu, cuda or cuda:0") from None
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"device {chosen} is not there, CUDA has {torch.cuda.device_count()}; give --device cpu")
    return chosen


def made_with(device: torch.device, dtype: str) -> dict[str, Any]:
    """Everything beside the settings on which the last bit of an image may depend."""
    import diffusers

    cuda = device.type == "cuda"
    return {
        "stable_cascade": stable_cascade.__version__,
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "device": torch.cuda.get_device_name(device) if cuda else f"{device.type} {platform.machine()}",
        "dtype": dtype,
        "threads": None if cuda else torch.get_num_threads(),
    }


def check_lora(choice: LoraChoice) -> None:
    """Passes when a local LoRA's header can be read and its keys are those of a known format.

    Raises:
        ValueError: it is another kind of file.
    """
    if is_hub_name(choice.path):
        return
    for file in lora_files(choice.path):
        found = describe(file)
        if found.kind not in ("lora", "tokens"):
            raise ValueError(f"lora {quoted(file)} is {found.short()}; give a LoRA's file or folder")


class LoraShelf:
    """Which LoRAs a pipeline carries.

    Weights change freely. Another set is loaded anew: a layer that carries an adapter, even an idle one, is computed
    along another path, and an image must not depend on what was drawn before it.
    """

    def __init__(self, pipeline: Any) -> None:
        self.pipeline = pipeline
        self.loaded: list[tuple[str, str | None]] = []

    def use(self, choices: Sequence[LoraChoice]) -> None:
        """Makes these LoRAs, and no others, act with their weights.

        Raises:
            ValueError: one does not fit the model; the pipeline then carries none.
        """
        wanted = [(choice.path, choice.sha256) for choice in choices]
        if self.loaded != wanted[: len(self.loaded)]:
            self.pipeline.unload_lora_weights()
            self.loaded = []
        try:
            for key in wanted[len(self.loaded) :]:
                self.pipeline.load_lora_weights(key[0], adapter_name=adapter_name(*key))
                self.loaded.append(key)
        except Exception as error:
            self.pipeline.unload_lora_weights()
            self.loaded = []
            if isinstance(error, ValueError):
                raise
            raise ValueError(f"lora {quoted(key[0])} cannot be loaded: {brief(error)}") from error
        present = {name for names in self.pipeline.get_list_adapters().values() for name in names}
        weights = {adapter_name(choice.path, choice.sha256): choice.weight for choice in choices}
        weights = {name: weight for name, weight in weights.items() if name in present}  # tokens alone are no adapter
        if weights:
            self.pipeline.set_adapters(list(weights), list(weights.values()))


def adapter_name(path: str, sha256: str | None) -> str:
    """A name that PEFT takes, the same for the same file."""
    return "lora_" + hashlib.sha256(f"{path}\n{sha256}".encode("utf-8", "surrogateescape")).hexdigest()[:16]
