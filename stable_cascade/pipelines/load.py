"""The one way to load a pipeline: from folders and Hub repositories in diffusers' layout, and from single files."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from stable_cascade.components import CLIP, COMPONENTS
from stable_cascade.disk import local_path
from stable_cascade.embedded import embedded_path
from stable_cascade.files.detection import Description
from stable_cascade.files.json_files import read_config
from stable_cascade.files.loading import hub_file, load_clip_file
from stable_cascade.files.places import describe
from stable_cascade.models.base import check_no_adapter
from stable_cascade.wording import brief, quoted

from .habits import under_our_names, without_foreign
from .layout import (
    HUB_OPTIONS,
    INDEX,
    PRIOR_SHIFT,
    check_places,
    device_of,
    dtype_of,
    find,
    folders_of,
    load_folder,
    own_network,
    own_scheduler,
    small_networks,
)

logger = logging.getLogger(__name__)

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
        # Check the keywords.
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
        # Find the folder of every component that is not given.
        missing = [name for name in needed if name not in kwargs]
        small = small_networks(lite, missing)
        folders = folders_of(
            pretrained_model_name_or_path, prior_pretrained_model_name_or_path, missing, small, variant, hub
        )
        optional: Sequence[str] = cls._optional_components  # type: ignore[attr-defined]
        places = {name: find(cls.__name__, name, folders, small) for name in missing}
        check_places(cls.__name__, places, optional, folders, variant, small)
        # Load them, and put the pipeline together.
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
        return pipeline_of_files(cls, files, **kwargs)

    def register_components(self, **components: Any) -> None:
        """Registers the components; diffusers' scheduler and networks become ours."""
        for name in ("scheduler", "prior_scheduler"):
            if type(components.get(name)).__name__ == "DDPMWuerstchenScheduler":
                of_prior = name == "prior_scheduler" or ("prior" in components and "decoder" not in components)
                components[name] = own_scheduler(dict(components[name].config), of_prior)
        for name in ("prior", "decoder", "vqgan"):
            if type(components.get(name)).__name__ in ("StableCascadeUNet", "PaellaVQModel"):
                components[name] = own_network(name, components[name])
        self.register_modules(**components)
        types = {name: part.dtype for name, part in components.items() if isinstance(part, torch.nn.Module)}
        if len(set(types.values())) > 1:
            types_text = ", ".join(f"{name} {str(dtype).removeprefix('torch.')}" for name, dtype in types.items())
            logger.warning("components of different types (%s); pass torch_dtype, or call .to(dtype)", types_text)

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


TOKENIZERS = (
    ("stabilityai/stable-cascade", "tokenizer/"),
    ("stabilityai/stable-cascade-prior", "tokenizer/"),
    ("laion/CLIP-ViT-bigG-14-laion2B-39B-b160k", ""),
    ("openai/clip-vit-large-patch14", ""),
)
"""Hub repositories with the tokenizer that the released cascade was trained with, and the folder it lies in."""
_REMEDIES = {
    "tokenizer": "tokenizer='stabilityai/stable-cascade' or a folder with one (no weights file holds it)",
    "text_encoder": "text_encoder=a file or folder of CLIP ViT-bigG/14",
    "vqgan": "vqgan='stage_a.safetensors'",
}


@dataclass
class _Parts:
    """Where the components of a pipeline come from."""

    files: dict[str, Path] = field(default_factory=dict)
    sizes: dict[str, str | None] = field(default_factory=dict)
    configs: dict[str, Any] = field(default_factory=dict)
    values: dict[str, Any] = field(default_factory=dict)


def pipeline_of_files(
    cls: Any,
    files: Sequence[str | Path],
    *,
    stage_c: str | Path | None = None,
    stage_b: str | Path | None = None,
    config: str | Path | Mapping[str, Any] | None = None,
    torch_dtype: torch.dtype | dict[str, torch.dtype] | None = None,
    **kwargs: Any,
) -> Any:
    """A pipeline of class `cls`; see `from_single_file`.

    Raises:
        ValueError: a file holds something else than its name says, or components are missing.
    """
    # Check the keywords.
    torch_dtype = kwargs.pop("dtype", torch_dtype)
    needed, settings = cls._get_signature_keys(cls)
    unknown = sorted(set(kwargs) - set(needed) - set(settings))
    if unknown:
        nearest = difflib.get_close_matches(unknown[0], [*needed, *settings], n=1, cutoff=0)
        raise ValueError(f"from_single_file has no argument '{unknown[0]}'; nearest: '{nearest[0]}'")
    # Find out what is in each file, and what is given beside them.
    parts = _Parts()
    for file, expected in [*((one, None) for one in files), (stage_c, "prior"), (stage_b, "decoder")]:
        if file is not None:
            place = hub_file(str(file)) if str(file).startswith(("http:", "https:")) else local_path(file)
            _add_file(parts, place, expected, [name for name in needed if name not in kwargs], cls.__name__)
    _add_config(parts, config)
    given = {name: kwargs.pop(name) for name in needed if name in kwargs}
    _add_tokenizer(parts, needed, given)
    _check_complete(cls, needed, {*given, *parts.files, *parts.values})
    # Load the components.
    loaded = {name: _given(name, value, torch_dtype, parts) for name, value in given.items()}
    for name, file in parts.files.items():
        loaded[name] = _of_file(name, file, parts.configs.get(name), dtype_of(torch_dtype, name))
    loaded |= {name: value for name, value in parts.values.items() if name in needed}
    _check_vocabulary(loaded)
    # Put the pipeline together.
    values = {name: value for name, value in parts.values.items() if name in settings}
    return cls(**(_schedulers(cls, needed) | values | loaded | kwargs))


def _add_file(parts: _Parts, file: Path, expected: str | None, needed: Sequence[str], pipeline: str) -> None:
    """Notes which components a file holds; the first file that holds one counts.

    Raises:
        ValueError: it holds nothing that the pipeline needs, or not what it was given for.
    """
    found = describe(file)
    networks = found.parts if found.kind == "checkpoint" else (found,) if found.kind == "network" else ()
    names = {str(one.component): one for one in networks}
    if expected is not None and expected not in names:
        stage = "stage_c" if expected == "prior" else "stage_b"
        raise ValueError(f"{stage}={quoted(file)} is {found.short()}, and a {expected} is needed")
    useful = {name: one for name, one in names.items() if name in needed}
    if not useful:
        raise ValueError(f"{quoted(file)} is {found.short()}, of which {pipeline} needs nothing{_advice(found)}")
    for name, one in useful.items():
        parts.files.setdefault(name, file)
        parts.sizes.setdefault(name, one.size)


def _advice(found: Description) -> str:
    return "; give it to load_lora_weights" if found.kind == "lora" else ""


def _add_config(parts: _Parts, config: str | Path | Mapping[str, Any] | None) -> None:
    """Notes configs of components, from a mapping or a pipeline's folder, and the embedded cascade's own values."""
    # Configs by component.
    if isinstance(config, Mapping):
        parts.configs |= config
    elif config is not None:
        # A pipeline's folder, whose weights are not read.
        folder = local_path(config)
        if not (folder / INDEX).is_file():
            raise ValueError(
                f"config {quoted(config)} is no folder of a pipeline, with {INDEX}; or give component -> config"
            )
        parts.values |= {key: value for key, value in read_config(folder / INDEX).items() if key[0] != "_"}
        parts.values = {key: value for key, value in parts.values.items() if not isinstance(value, list)}
        parts.configs |= {name: folder / name for name in COMPONENTS if (folder / name / "config.json").is_file()}
        if (folder / "tokenizer").is_dir():
            parts.values["tokenizer"] = load_folder(
                "tokenizer", folder / "tokenizer", torch.float32, None, of_prior=False
            )
    elif "embedded" in (parts.sizes.get("prior"), parts.sizes.get("decoder")):
        # The embedded cascade is known by its shapes.
        index = read_config(embedded_path() / INDEX)
        parts.values |= {key: value for key, value in index.items() if isinstance(value, float)}


def _add_tokenizer(parts: _Parts, needed: Sequence[str], given: Mapping[str, Any]) -> None:
    """The tokenizer that goes with the text encoder, if it is on this machine; nothing is downloaded."""
    if "tokenizer" not in needed or "tokenizer" in given or "tokenizer" in parts.values:
        return
    place = embedded_path() / "tokenizer" if parts.sizes.get("text_encoder") == "embedded" else _cached_tokenizer()
    if place is not None:
        parts.values["tokenizer"] = load_folder("tokenizer", place, torch.float32, None, of_prior=False)


def _cached_tokenizer() -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    for repository, folder in TOKENIZERS:
        found = try_to_load_from_cache(repository, f"{folder}tokenizer_config.json")
        if isinstance(found, str):
            return Path(found).parent
    return None


def _check_complete(cls: Any, needed: Sequence[str], have: set[str]) -> None:
    """Passes when every component has a source, before any tensor is read.

    Raises:
        ValueError: naming those that have none, and where they are.
    """
    without = [*cls._optional_components, "scheduler", "prior_scheduler"]
    missing = [name for name in needed if name not in have and name not in without]
    if missing:
        remedies = ", ".join(_REMEDIES.get(name, f"{name}=its file or folder") for name in missing)
        raise ValueError(
            f"{cls.__name__} needs {', '.join(missing)}, which the given files do not hold; pass {remedies}"
        )


def _of_file(name: str, file: Path, config: Any, dtype: torch.dtype) -> Any:
    """A component from a weights file."""
    if name in CLIP:
        return load_clip_file(name, file, config, dtype)
    config = config if config is None or isinstance(config, Mapping) else str(config)
    return COMPONENTS[name].load_class().from_single_file(file, config=config, torch_dtype=dtype)


def _given(name: str, value: Any, dtype: torch.dtype | dict[str, torch.dtype] | None, parts: _Parts) -> Any:
    """A component that was given: itself, or where it is.

    Raises:
        ValueError: there is no such file, folder or Hub name.
    """
    if not isinstance(value, str | Path):
        return value
    place, wanted = local_path(value), dtype_of(dtype, name)
    if place.is_file():
        return _of_file(name, place, parts.configs.get(name), wanted)
    if place.is_dir():
        inner = place / name
        return load_folder(name, inner if inner.is_dir() else place, wanted, None, of_prior=name == "prior_scheduler")
    if place.is_absolute() or str(value).startswith(".") or str(value).count("/") != 1:
        raise ValueError(f"{name}={quoted(value)} is no file, no folder and no Hub name")
    return _of_hub(name, str(value), wanted)


def _of_hub(name: str, repository: str, dtype: torch.dtype) -> Any:
    """A component from a Hub repository: from its own folder there, or, CLIP's parts, from the root."""
    cls = COMPONENTS[name].load_class()
    key = "dtype" if COMPONENTS[name].module == "transformers" else "torch_dtype"
    typed = {} if name == "tokenizer" else {key: dtype}
    problems = []
    for place in ({"subfolder": name}, {}):
        try:
            return cls.from_pretrained(repository, **place, **typed)
        except Exception as error:  # the libraries and their HTTP clients each have errors of their own
            problems.append(f"{type(error).__name__}: {brief(error)}")
    raise ValueError(f"{name}='{repository}' could not be loaded from the Hub ({problems[0]}); give a local folder")


def _check_vocabulary(loaded: Mapping[str, Any]) -> None:
    """Passes when the text encoder has a row for every token.

    Raises:
        ValueError: the tokenizer is another encoder's.
    """
    tokenizer, encoder = loaded.get("tokenizer"), loaded.get("text_encoder")
    if tokenizer is None or encoder is None:
        return
    rows = encoder.get_input_embeddings().num_embeddings
    if len(tokenizer) > rows:
        raise ValueError(
            f"the tokenizer has {len(tokenizer)} tokens, the text encoder {rows} rows; pass its own tokenizer="
        )


def _schedulers(cls: Any, needed: Sequence[str]) -> dict[str, Any]:
    """The schedulers that the released cascade is sampled with."""
    from stable_cascade.schedulers import StableCascadeScheduler

    of_prior = "prior_scheduler" if "prior_scheduler" in needed else "scheduler" if "Prior" in cls.__name__ else ""
    return {
        name: StableCascadeScheduler(shift=PRIOR_SHIFT) if name == of_prior else StableCascadeScheduler()
        for name in ("prior_scheduler", "scheduler")
        if name in needed
    }
