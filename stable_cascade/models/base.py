"""What all networks of the cascade share: reading and writing folders, single files and the original's names."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from stable_cascade.compilation import expect_many_sizes
from stable_cascade.disk import local_path
from stable_cascade.files.loading import load_single_file
from stable_cascade.files.weight_names import to_original
from stable_cascade.hub import ask
from stable_cascade.wording import quoted

from .blocks import BACKENDS, SDCascadeAttention, attention_kernel
from .conditioning import blocks_of

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

    component: ClassVar[str]
    """The network's row in `components.COMPONENTS`."""

    if TYPE_CHECKING:  # what diffusers' base has

        def __getattr__(self, name: str) -> Any: ...

    @classmethod
    def from_single_file(
        cls,
        pretrained_model_link_or_path_or_dict: Place | dict[str, Tensor],
        config: dict[str, Any] | str | None = None,
        torch_dtype: torch.dtype | None = None,
        **kwargs: Any,
    ) -> Self:
        """A network from one local file with the names of the original or ours; see `load_single_file`."""
        source = pretrained_model_link_or_path_or_dict
        return load_single_file(cls, cls.component, source, config, torch_dtype, **kwargs)

    def to_original(self) -> dict[str, Tensor]:
        """The weights under the original's names."""
        return to_original(self.state_dict(), self.component)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Place, **kwargs: Any) -> Any:
        """The network in a folder, or in a repository of the Hub; arguments as diffusers has them.

        Raises:
            HubError: there is no such folder, and the Hub has no such repository or cannot be reached.
            ValueError: weights are missing, which would begin at random (unless `output_loading_info` asks for the
                list of them).
        """
        with_info = kwargs.pop("output_loading_info", False)
        load = partial(super().from_pretrained, output_loading_info=True)  # type: ignore[misc]
        place = local_path(pretrained_model_name_or_path)
        name = str(pretrained_model_name_or_path)
        # What can be no Hub name is diffusers' to refuse.
        if place.exists() or name.count("/") > 1 or name.startswith((".", "/", "~")):
            network, info = load(place, **kwargs)
        else:
            network, info = ask(name, partial(load, name), **kwargs)
        if with_info:
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


class UNetMixin(PretrainedMixin):
    """The first base of the two diffusion networks: attention, compilation, and configs of diffusers' own class."""

    def fuse_qkv_projections(self) -> None:
        """Lays query, key and value weights of each block next to each other, which makes large networks run faster.

        Names and values stay. What `from_single_file` loads from an original file lies so already; moving the network
        or changing its type undoes it.
        """
        for _, block in blocks_of(self, "attention"):
            block.attention.fuse()

    def compile_repeated_blocks(self, *args: Any, **kwargs: Any) -> None:
        """Compiles each block when it first runs; with `dynamic=True` one graph serves images of every shape."""
        expect_many_sizes()
        super().compile_repeated_blocks(*args, **kwargs)  # type: ignore[misc]

    @classmethod
    def from_config(cls, config: Any = None, return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """A network of this config, which may be that of diffusers' class: its values hold, not our defaults."""
        if isinstance(config, dict):
            config = {key: value for key, value in config.items() if key != "_use_default_values"}
        return super().from_config(config, return_unused_kwargs, **kwargs)  # type: ignore[misc]

    def set_attention_backend(self, backend: str) -> None:
        """Computes attention by one of torch's kernels: a name of `BACKENDS`, `native` for torch's own choice.

        Raises:
            ValueError: no such backend, one that is not torch's, or one that does not run on this network's device
                and type.
        """
        network: Any = self
        if backend not in BACKENDS:
            raise ValueError(f"attention backend '{backend}' is not one of torch's own: {', '.join(BACKENDS)}")
        # Tried once, since torch would refuse only in the middle of a forward.
        probe = torch.zeros(1, 1, 8, 64, device=network.device, dtype=network.dtype)
        try:
            with attention_kernel(BACKENDS[backend]):
                F.scaled_dot_product_attention(probe, probe, probe)
        except RuntimeError:
            raise ValueError(
                f"attention backend '{backend}' does not run on {network.device} in "
                f"{str(network.dtype).removeprefix('torch.')}; native always does"
            ) from None
        for module in network.modules():
            if isinstance(module, SDCascadeAttention):
                module.backend = BACKENDS[backend]

    def reset_attention_backend(self) -> None:
        """Leaves the choice of the kernel to torch again."""
        self.set_attention_backend("native")
