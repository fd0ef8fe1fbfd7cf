"""`from_pretrained` and `save_pretrained` of the networks, by the rules for every path and Hub name."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any

from stable_cascade.disk import local_path
from stable_cascade.hub import ask
from stable_cascade.wording import quoted

Place = str | os.PathLike[str]


def check_no_adapter(network: Any, name: str) -> None:
    """Passes when a network is as it is saved: without adapters around its layers.

    Raises:
        ValueError: it has some.
    """
    adapters = getattr(network, "peft_config", None)
    if adapters:
        raise ValueError(
            f"{name} carries the adapter '{next(iter(adapters))}'; save that with save_lora_weights or save_lora, and "
            "unload_lora_weights() before saving the network (fuse_lora() first keeps what it does)"
        )


def check_whole(info: Mapping[str, Any], cls_name: str, name: Place) -> None:
    """Passes when a network was loaded with all its weights; `info` is what `output_loading_info` gives.

    Raises:
        ValueError: some are missing, which would begin at random.
    """
    keys = sorted(info["missing_keys"])
    if keys:
        raise ValueError(
            f"{len(keys):,} of the weights of {cls_name} are missing in {quoted(name)}, for example {keys[0]}; the "
            "files are incomplete, or config.json is another network's"
        )


class PretrainedMixin:
    """The first base of each network, before diffusers' own."""

    if TYPE_CHECKING:  # what diffusers' base has

        def __getattr__(self, name: str) -> Any: ...

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Place, **kwargs: Any) -> Any:
        """The network in a folder, or in a repository of the Hub; arguments as diffusers has them.

        Raises:
            HubError: there is no such folder, and the Hub has no such repository or cannot be reached.
            ValueError: weights are missing, which would begin at random (unless `output_loading_info` asks for the
                list of them).
        """
        told = kwargs.pop("output_loading_info", False)
        load = partial(super().from_pretrained, output_loading_info=True)  # type: ignore[misc]
        place = local_path(pretrained_model_name_or_path)
        name = str(pretrained_model_name_or_path)
        # What can be no Hub name is diffusers' to refuse.
        if place.exists() or name.count("/") > 1 or name.startswith((".", "/", "~")):
            network, info = load(place, **kwargs)
        else:
            network, info = ask(name, partial(load, name), **kwargs)
        if told:
            return network, info
        check_whole(info, cls.__name__, name)
        return network

    def save_pretrained(
        self,
        save_directory: Place,
        is_main_process: bool = True,
        save_function: Callable[..., Any] | None = None,
        safe_serialization: bool = True,
        variant: str | None = None,
        max_shard_size: int | str = "10GB",
        push_to_hub: bool = False,
        **kwargs: Any,
    ) -> None:
        """Writes config and weights into a folder; arguments as diffusers has them, where pipelines look for them.

        Raises:
            ValueError: adapters are in the network, whose layers would be saved under names that nothing reads.
        """
        check_no_adapter(self, type(self).__name__)
        super().save_pretrained(  # type: ignore[misc]
            local_path(save_directory), is_main_process, save_function, safe_serialization, variant, max_shard_size,
            push_to_hub, **kwargs,
        )  # fmt: skip
