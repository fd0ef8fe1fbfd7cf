"""The LoRAs of a loaded cascade: those of the drawing, in its order, and nothing left of earlier ones."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

from stable_cascade.files.detection import describe
from stable_cascade.wording import brief, quoted

from .files import is_hub_name, lora_files
from .request import LoraChoice


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
