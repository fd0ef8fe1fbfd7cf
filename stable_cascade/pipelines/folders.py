"""Pipelines from folders and Hub repositories, in diffusers' layout: ours, and Stability's two."""

from __future__ import annotations

import difflib
import importlib
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from stable_cascade.components import COMPONENTS
from stable_cascade.disk import local_path
from stable_cascade.files.headers import read_header
from stable_cascade.files.json_files import read_config
from stable_cascade.models.base import check_no_adapter, check_whole
from stable_cascade.wording import brief, quoted

from .habits import under_our_names, without_foreign
from .hub import HUB_OPTIONS
from .places import WITHOUT_WEIGHTS, check_places, find, folders_of, has_variant, small_networks

logger = logging.getLogger(__name__)

PRIOR_SHIFT = 2.0
_WITHOUT_EFFECT = ("low_cpu_mem_usage", "use_safetensors", "disable_mmap", "load_connected_pipeline")
"""Arguments of diffusers that ask for what is always done here."""


class FromFolderMixin:
    """`from_pretrained` that knows every component by its name, and which of Stability's folders has which."""

    if TYPE_CHECKING:  # what the pipeline beside this mixin has, its components among it

        def __getattr__(self, name: str) -> Any: ...

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str | Path,
        *,
        prior_pretrained_model_name_or_path: str | Path | None = None,
        torch_dtype: torch.dtype | dict[str, torch.dtype] | None = None,
        variant: str | None = None,
        lite: bool | str | Sequence[str] = False,
        **kwargs: Any,
    ) -> Any:
        """A pipeline from a folder, or a Hub repository, in diffusers' layout.

        Args:
            pretrained_model_name_or_path: a whole cascade, or Stability's `stable-cascade` or `stable-cascade-prior`.
            prior_pretrained_model_name_or_path: where Stage C's parts are, when the first has none; by default the
                first with `-prior` appended.
            torch_dtype: of the networks, or of each by name and of the others as `default`; a torch type, its name, or
                `auto` for what the files hold; by default float32.
            variant: `bf16` and the like, part of the weights' file names; a component without it is loaded plain.
            lite: True for the small networks of both stages, `prior_lite` and `decoder_lite`, or the names of those
                that are to be small, `("prior",)`.
            **kwargs: components by name to use instead of the folder's, config values, and Hub options (revision,
                token, cache_dir, local_files_only). `device_map`: a device to put the pipeline on.

        Raises:
            ValueError: a component is in no folder, no component has the variant, or an unknown keyword.
        """
        needed, settings = cls._get_signature_keys(cls)  # type: ignore[attr-defined]
        torch_dtype = kwargs.pop("dtype", torch_dtype)
        device = device_of(kwargs.pop("device_map", None))
        kwargs = without_foreign(under_our_names(kwargs) if "decoder" in needed and "prior" in needed else kwargs)
        hub = {key: kwargs.pop(key) for key in HUB_OPTIONS if key in kwargs}
        kwargs = {key: value for key, value in kwargs.items() if key not in _WITHOUT_EFFECT}
        unknown = sorted(set(kwargs) - set(needed) - set(settings))
        if unknown:
            nearest = difflib.get_close_matches(unknown[0], [*needed, *settings, *HUB_OPTIONS], n=1, cutoff=0)
            raise ValueError(f"from_pretrained has no argument '{unknown[0]}'; nearest: '{nearest[0]}'")
        missing = [name for name in needed if name not in kwargs]
        small = small_networks(lite, missing)
        folders = folders_of(
            pretrained_model_name_or_path, prior_pretrained_model_name_or_path, missing, small, variant, hub
        )
        optional: Sequence[str] = cls._optional_components  # type: ignore[attr-defined]
        places = {name: find(cls.__name__, name, folders, small) for name in missing}
        check_places(cls.__name__, places, optional, folders, variant, small)
        parts: dict[str, Any] = dict.fromkeys(places)
        for name, place in places.items():
            if place is not None:
                of_prior = name == "prior_scheduler" or "Prior" in cls.__name__
                dtype = dtype_of(torch_dtype, name, place)
                parts[name] = load_folder(name, place, dtype, variant, of_prior=of_prior)
        values = {key: value for _, index in folders for key, value in index.items() if key in settings}
        made = cls(**(values | parts | kwargs))
        return made if device is None else made.to(device)  # type: ignore[attr-defined]

    def save_pretrained(self, save_directory: str | Path, *args: Any, **kwargs: Any) -> None:
        """Writes every component and `model_index.json` into a folder; arguments as diffusers has them.

        Raises:
            ValueError: a component carries a LoRA.
        """
        for name, part in self.components.items():
            check_no_adapter(part, name)
        super().save_pretrained(local_path(save_directory), *args, **kwargs)  # type: ignore[misc]

    @classmethod
    def from_single_file(cls, *files: str | Path, **kwargs: Any) -> Any:
        """A pipeline from single files: ComfyUI's checkpoints, or the original's files.

        Args:
            *files: weights files, Stage C's and Stage B's first; each is recognised by what is in it, and one may hold
                several components.
            **kwargs: `stage_c`, `stage_b`: these two by name. Components by name: a file, a folder, a Hub name, or the
                component itself; `tokenizer` is in no weights file. `config`: a pipeline's folder, or component ->
                config, for networks of one's own size. `torch_dtype` as in `from_pretrained`, and config values.

        Raises:
            ValueError: a file holds something else than its name says, or components are missing.
        """
        from .single_file import pipeline_of_files

        return pipeline_of_files(cls, files, **kwargs)

    def register_components(self, **components: Any) -> None:
        """Registers the components; diffusers' scheduler and networks become ours."""
        for name in ("scheduler", "prior_scheduler"):
            if type(components.get(name)).__name__ == "DDPMWuerstchenScheduler":
                of_prior = name == "prior_scheduler" or ("prior" in components and "decoder" not in components)
                components[name] = own_scheduler(dict(components[name].config), of_prior)
        for name in ("prior", "decoder", "vqgan"):
            if type(components.get(name)).__name__ in ("StableCascadeUNet", "PaellaVQModel"):
                components[name] = _own_network(name, components[name])
        self.register_modules(**components)
        types = {name: part.dtype for name, part in components.items() if isinstance(part, torch.nn.Module)}
        if len(set(types.values())) > 1:
            told = ", ".join(f"{name} {str(dtype).removeprefix('torch.')}" for name, dtype in types.items())
            logger.warning("components of different types (%s); pass torch_dtype, or call .to(dtype)", told)

    def _own_scheduler(self, name: str, scheduler: Any) -> Any:
        """Ours in place of diffusers' one.

        Raises:
            ValueError: another kind of scheduler.
        """
        if type(scheduler).__name__ == "DDPMWuerstchenScheduler":
            alone = "prior" in self.config and "decoder" not in self.config
            return own_scheduler(dict(scheduler.config), name == "prior_scheduler" or alone)
        if not hasattr(scheduler, "noise_condition"):
            raise ValueError(
                f"{name} {type(scheduler).__name__} does not know Stable Cascade's noise; give a "
                "StableCascadeScheduler, or diffusers' DDPMWuerstchenScheduler"
            )
        return scheduler


def device_of(device_map: Any) -> torch.device | None:
    """The device that diffusers' `device_map` names.

    Raises:
        ValueError: it asks for a placement over several devices.
    """
    if device_map is None or isinstance(device_map, torch.device):
        return device_map
    try:
        return torch.device(device_map)
    except (RuntimeError, TypeError):
        raise ValueError(
            f"device_map {quoted(device_map)} is no device; name one, such as 'cuda', or load without it and call "
            "enable_model_cpu_offload()"
        ) from None


def dtype_of(dtype: Any, name: str, place: Path | None = None) -> torch.dtype:
    """The type meant for a component, float32 where none is; `auto` is that of its weights in `place`.

    Raises:
        ValueError: it is no type that networks have.
    """
    meant = dtype.get(name, dtype.get("default")) if isinstance(dtype, dict) else dtype
    if meant == "auto":
        meant = _stored_type(place)
    if isinstance(meant, str):
        meant = getattr(torch, meant.removeprefix("torch."), meant)
    if meant is None or (isinstance(meant, torch.dtype) and meant in (torch.float32, torch.bfloat16, torch.float16)):
        return meant or torch.float32
    raise ValueError(f"torch_dtype {quoted(meant)} is none of float32, bfloat16, float16, 'auto'")


def _stored_type(place: Path | None) -> torch.dtype:
    """The type of a component's first weights of floating-point numbers."""
    files = sorted(place.glob("*.safetensors")) if place is not None and place.is_dir() else [place] if place else []
    types = ("float32", "float16", "bfloat16")
    for file in files:
        found = next((info.dtype for info in read_header(file).tensors.values() if info.dtype in types), None)
        if found is not None:
            return getattr(torch, found)
    return torch.float32


def load_folder(name: str, place: Path, dtype: torch.dtype, variant: str | None, *, of_prior: bool) -> Any:
    """A component from its folder.

    Raises:
        ValueError: a file is missing, damaged or of another network.
    """
    module, cls_name = COMPONENTS[name].module, COMPONENTS[name].cls
    if name == "controlnet" and (place / "0").is_dir():
        cls_name = "StableCascadeMultiControlNet"
    if variant is not None and name not in WITHOUT_WEIGHTS and place.is_dir() and not has_variant(place, variant):
        logger.warning("%s has no weights of the variant '%s'; its plain ones are loaded", place.name, variant)
        variant = None
    try:
        if place.is_file():
            cls = getattr(importlib.import_module(module), cls_name)
            return cls.from_single_file(place, torch_dtype=dtype)
        if name.endswith("scheduler"):
            return own_scheduler(read_config(place / "scheduler_config.json"), of_prior)
        configs = [read_config(config) for config in place.glob("**/config.json")]
        if not configs and name not in WITHOUT_WEIGHTS:
            raise ValueError("it has no config.json")  # transformers would build its own default size
        cls = getattr(importlib.import_module(module), cls_name)
        if name in ("tokenizer", "feature_extractor"):
            return cls.from_pretrained(place)
        if module != "transformers":
            return cls.from_pretrained(place, variant=variant, torch_dtype=dtype)
        # transformers would take the type that config.json notes, and only warns of missing weights.
        network, info = cls.from_pretrained(place, variant=variant, dtype=dtype, output_loading_info=True)
        check_whole(info, cls_name, place)
        return network
    except MemoryError:
        raise
    except Exception as error:  # what diffusers, transformers and tokenizers make of damaged files
        reason = brief(error) if isinstance(error, ValueError) else f"{type(error).__name__}: {brief(error)}"
        raise ValueError(
            f"{quoted(place)} holds no {cls_name} that can be read ({reason}); get the folder again"
        ) from error


def own_scheduler(config: dict[str, Any], of_prior: bool) -> Any:
    """Our scheduler from its own config, or from diffusers', which lacks the shift that Stage C is sampled with."""
    from stable_cascade.schedulers import StableCascadeScheduler

    shift = {} if "shift" in config or not of_prior else {"shift": PRIOR_SHIFT}
    return StableCascadeScheduler.from_config(config, **shift)


def _own_network(name: str, network: Any) -> Any:
    """Our network with the parameters of diffusers' one, so that what changes one (`to`, training) changes both."""
    from stable_cascade.files.loading import on_meta

    # Their values hold where ours has another default, as for the scale of Stage A's latents.
    config = {key: value for key, value in network.config.items() if not key.startswith("_")}
    model = on_meta(COMPONENTS[name].load_class(), config)
    model.load_state_dict(network.state_dict(keep_vars=True), strict=True, assign=True)
    return model.train(network.training)
