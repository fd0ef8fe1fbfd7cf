"""diffusers' one class of two networks, for code that was written for it."""

from __future__ import annotations

from typing import Any

from stable_cascade.files.places import describe
from stable_cascade.files.weight_names import split_checkpoint

from .decoder import StableCascadeDecoder
from .prior import StableCascadePrior


class StableCascadeUNet:
    """Loads a `StableCascadePrior` or a `StableCascadeDecoder`, whichever it is; never an object of its own."""

    def __new__(cls, **config: Any) -> Any:
        """A new network of this config, with random weights."""
        return _class_of(config)(**config)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any, **kwargs: Any) -> Any:
        """The network of a folder or Hub repository in diffusers' layout, with the arguments of its own class."""
        options = {key: kwargs[key] for key in ("subfolder", "revision", "token", "cache_dir") if key in kwargs}
        config = StableCascadePrior.load_config(pretrained_model_name_or_path, **options)
        return _class_of(config).from_pretrained(pretrained_model_name_or_path, **kwargs)

    @classmethod
    def from_config(cls, config: Any, **kwargs: Any) -> Any:
        """A network of this config, with random weights."""
        return _class_of(config).from_config(config, **kwargs)

    @classmethod
    def from_single_file(cls, pretrained_model_link_or_path_or_dict: Any, **kwargs: Any) -> Any:
        """The network of one file, of an address on the Hub or of a state dict.

        Raises:
            ValueError: it holds neither a prior nor a decoder.
        """
        source = pretrained_model_link_or_path_or_dict
        if isinstance(source, dict):
            parts = list(split_checkpoint(source).parts)
        else:
            from stable_cascade.files.loading import hub_file

            source = hub_file(str(source)) if str(source).startswith(("http:", "https:")) else source
            found = describe(source)
            parts = [str(part.component) for part in (found.parts or (found,))]
        if "decoder" in parts:
            return StableCascadeDecoder.from_single_file(source, **kwargs)
        return StableCascadePrior.from_single_file(source, **kwargs)


def _class_of(config: Any) -> type[StableCascadePrior] | type[StableCascadeDecoder]:
    """The prior alone reads whole texts."""
    return StableCascadePrior if config.get("clip_text_in_channels") else StableCascadeDecoder
