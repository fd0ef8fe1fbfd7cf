"""Pipelines from folders and Hub repositories, in diffusers' layout: ours, and Stability's two."""

from __future__ import annotations

import difflib
import importlib
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

INDEX = "model_index.json"

# What each component is; the class that a folder's index names is not trusted, so that nothing else is imported.
COMPONENTS = {
    "prior": ("stable_cascade.models", "StableCascadePrior"),
    "decoder": ("stable_cascade.models", "StableCascadeDecoder"),
    "vqgan": ("stable_cascade.models", "StableCascadeVQGAN"),
    "semantic_encoder": ("stable_cascade.models", "StableCascadeImageEncoder"),
    "previewer": ("stable_cascade.models", "StableCascadePreviewer"),
    "scheduler": ("stable_cascade.schedulers", "StableCascadeScheduler"),
    "prior_scheduler": ("stable_cascade.schedulers", "StableCascadeScheduler"),
    "text_encoder": ("transformers", "CLIPTextModelWithProjection"),
    "tokenizer": ("transformers", "CLIPTokenizer"),
    "image_encoder": ("transformers", "CLIPVisionModelWithProjection"),
    "feature_extractor": ("transformers", "CLIPImageProcessorPil"),
}
PRIOR_PARTS = ("prior", "prior_scheduler", "text_encoder", "tokenizer", "image_encoder", "feature_extractor")
HUB_OPTIONS = ("cache_dir", "force_download", "local_files_only", "proxies", "revision", "token")
PRIOR_SHIFT = 2.0


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
        torch_dtype: torch.dtype | None = None,
        variant: str | None = None,
        **kwargs: Any,
    ) -> Any:
        """A pipeline from a folder, or a Hub repository, in diffusers' layout.

        Args:
            pretrained_model_name_or_path: a whole cascade, or Stability's `stable-cascade` or `stable-cascade-prior`.
            prior_pretrained_model_name_or_path: where Stage C's parts are, when the first has none; by default the
                first with `-prior` appended.
            torch_dtype: of the networks; schedulers keep float32.
            variant: `bf16` and the like, part of the weights' file names.
            **kwargs: components by name to use instead of the folder's, config values, and Hub options (revision,
                token, cache_dir, local_files_only).

        Raises:
            ValueError: a component is in no folder, or an unknown keyword.
        """
        needed, settings = cls._get_signature_keys(cls)  # type: ignore[attr-defined]
        hub = {key: kwargs.pop(key) for key in HUB_OPTIONS if key in kwargs}
        unknown = sorted(set(kwargs) - set(needed) - set(settings))
        if unknown:
            nearest = difflib.get_close_matches(unknown[0], [*needed, *settings, *HUB_OPTIONS], n=1, cutoff=0)
            raise ValueError(f"from_pretrained has no argument '{unknown[0]}'; nearest: '{nearest[0]}'")
        missing = [name for name in needed if name not in kwargs]
        folder = _folder(pretrained_model_name_or_path, missing, variant, hub)
        index = _index(folder)
        prior_folder = prior_pretrained_model_name_or_path
        if prior_folder is None and "prior" in missing and _place(folder, "prior", index) is None:
            prior_folder = f"{pretrained_model_name_or_path}-prior"
        folders = [(folder, index)]
        if prior_folder is not None:
            prior_folder = _folder(prior_folder, [name for name in missing if name in PRIOR_PARTS], variant, hub)
            folders.insert(0, (prior_folder, _index(prior_folder)))
        parts = {}
        for name in missing:
            optional = name in cls._optional_components  # type: ignore[attr-defined]
            parts[name] = _component(cls.__name__, name, folders, optional, torch_dtype, variant)
        values = {key: value for key, value in index.items() if key in settings}
        return cls(**(values | parts | kwargs))

    def register_components(self, **components: Any) -> None:
        """Registers the components; a DDPMWuerstchenScheduler becomes ours."""
        for name in ("scheduler", "prior_scheduler"):
            if type(components.get(name)).__name__ == "DDPMWuerstchenScheduler":
                of_prior = name == "prior_scheduler" or ("prior" in components and "decoder" not in components)
                components[name] = _scheduler(dict(components[name].config), of_prior)
        self.register_modules(**components)


def _index(folder: Path) -> dict[str, Any]:
    path = folder / INDEX
    return json.loads(path.read_text()) if path.exists() else {}


def _folder(name: str | Path, parts: list[str], variant: str | None, hub: dict[str, Any]) -> Path:
    """The local folder, or the Hub repository's, downloaded as far as the parts need it."""
    path = Path(name)
    if path.is_dir():
        return path
    if path.is_absolute() or str(name).startswith(".") or str(name).count("/") != 1:
        raise ValueError(f"'{name}' is no folder and no Hub name; give a folder in diffusers' layout, or 'owner/name'")
    from huggingface_hub import snapshot_download

    wanted = [INDEX]
    for part in [*parts, "scheduler"]:
        weights = f"*.{variant}.safetensors*" if variant else "*model.safetensors*"
        wanted += [f"{part}/*.json", f"{part}/*.txt", f"{part}/{weights}", f"{part}/*-0000*.safetensors"]
    hub = {key: value for key, value in hub.items() if key != "proxies"}
    return Path(snapshot_download(str(name), allow_patterns=wanted, **hub))


def _place(folder: Path, name: str, index: dict[str, Any]) -> Path | None:
    """Where a folder keeps a component; None when it has none or says that there is none."""
    if index.get(name, ["", ""]) in ([None, None], None) or not (folder / name).is_dir():
        return None
    return folder / name


def _component(
    pipeline: str,
    name: str,
    folders: list[tuple[Path, dict[str, Any]]],
    optional: bool,
    dtype: torch.dtype | None,
    variant: str | None,
) -> Any:
    for position, (folder, index) in enumerate(folders):
        # Stage C's parts come from its own folder when there is one, the others never do.
        if len(folders) > 1 and position == 0 and name not in PRIOR_PARTS:
            continue
        for alias in _aliases(pipeline, name, index, own_folder=len(folders) > 1 and position == 0):
            place = _place(folder, alias, index)
            if place is not None:
                return _load(name, place, dtype, variant, of_prior=name == "prior_scheduler" or "Prior" in pipeline)
    if optional:
        return None
    where = " or ".join(f"'{folder}'" for folder, _ in folders)
    raise ValueError(f"{pipeline} needs '{name}', and {where} has no such folder; pass {name}=…")


def _aliases(pipeline: str, name: str, index: dict[str, Any], *, own_folder: bool) -> tuple[str, ...]:
    """Folders in which a component may lie: Stage C's scheduler is `scheduler` where Stage C lives alone."""
    alone = own_folder or "decoder" not in index
    if name == "prior_scheduler" and alone:
        return ("prior_scheduler", "scheduler")
    if name == "scheduler" and "Prior" in pipeline:
        return ("prior_scheduler", "scheduler") if alone else ("prior_scheduler",)
    return (name,)


def _load(name: str, place: Path, dtype: torch.dtype | None, variant: str | None, *, of_prior: bool) -> Any:
    module, cls_name = COMPONENTS[name]
    if name.endswith("scheduler"):
        return _scheduler(json.loads((place / "scheduler_config.json").read_text()), of_prior)
    cls = getattr(importlib.import_module(module), cls_name)
    if name in ("tokenizer", "feature_extractor"):
        return cls.from_pretrained(place)
    key = "dtype" if module == "transformers" else "torch_dtype"
    return cls.from_pretrained(place, variant=variant, **({key: dtype} if dtype is not None else {}))


def _scheduler(config: dict[str, Any], of_prior: bool) -> Any:
    """Our scheduler from its own config, or from diffusers', which lacks the shift that Stage C is sampled with."""
    from stable_cascade.schedulers import StableCascadeScheduler

    shift = {} if "shift" in config or not of_prior else {"shift": PRIOR_SHIFT}
    return StableCascadeScheduler.from_config(config, **shift)
