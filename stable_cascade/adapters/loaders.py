"""LoRA and learned tokens in pipelines: load, mix, fuse and remove them by diffusers' method names."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from diffusers.loaders.lora_base import LoraBaseMixin, _func_optionally_disable_offloading
from torch import Tensor, nn

from stable_cascade.disk import local_path
from stable_cascade.files.lora import Part

from .injection import carrying, check_swap, swap, take_out, tuner_layers
from .load import LoraFile, Source, fitting_part, from_hub, load_part, placed, read_with_tokens
from .lora import remove_lora
from .peft_layers import check_fusable
from .quantized import QuantizedLinear
from .tokens import EMBEDS_NAME, add_token_rows, read_learned_embeds, usable_rows


class StableCascadeLoraLoaderMixin(LoraBaseMixin):
    """LoRA methods for pipelines with a `prior`, a `decoder`, a `text_encoder`, or several of them.

    As everywhere in diffusers, the adapter loaded last is the active one; `set_adapters` mixes several.
    """

    _lora_loadable_modules = ["prior", "decoder", "text_encoder"]
    unet_name = "prior"
    text_encoder_name = "text_encoder"
    # A pipeline's registered components and methods.
    tokenizer: Any
    text_encoder: Any
    enable_model_cpu_offload: Any
    enable_sequential_cpu_offload: Any

    def load_lora_weights(  # type: ignore[override]
        self,
        pretrained_model_name_or_path_or_dict: Source,
        adapter_name: str | None = None,
        *,
        weight: float = 1.0,
        weight_name: str | None = None,
        hotswap: bool = False,
        module_filters: Sequence[str] | None = None,
        train_tokens: Sequence[Sequence[str | None]] | None = None,
        **hub: Any,
    ) -> None:
        """Loads a LoRA in any known format, with the learned tokens in it and beside it; all of it or nothing.

        Args:
            pretrained_model_name_or_path_or_dict: a file, a folder, a Hub name or a state dict.
            weight: how strongly the LoRA acts.
            weight_name: the file in a folder that holds several.
            hotswap: put it in place of the loaded adapter `adapter_name`, layer by layer and tensor by tensor. Higher
                ranks need `enable_lora_hotswap(target_rank=…)` before the first one is loaded.
            module_filters, train_tokens: of the training, for the original's files, which do not store them.
            **hub: revision, token, cache_dir and so on, for a Hub name.

        Raises:
            ValueError: unknown format, trained for another model size, or nothing in it for this pipeline.

        """
        own = {component: getattr(self, component, None) for component in self._lora_loadable_modules}
        networks = {component: network for component, network in own.items() if network is not None}
        lora = placed(read_with_tokens(pretrained_model_name_or_path_or_dict, weight_name, hub), networks)
        restore = self._without_offloading()
        try:
            rows = usable_rows(self, lora, train_tokens)
            if lora.parts and hotswap:
                self._swap_parts(lora, adapter_name, weight, module_filters)
            elif lora.parts:
                self._load_parts(lora, adapter_name, weight, module_filters)
            if rows:
                self._add_tokens(rows)
        finally:
            restore()

    def load_textual_inversion(
        self,
        pretrained_model_name_or_path: Source,
        token: str | None = None,
        *,
        weight_name: str = EMBEDS_NAME,
        **hub: Any,
    ) -> None:
        """Loads learned tokens alone; tokens that exist already get the file's row."""
        if isinstance(pretrained_model_name_or_path, Mapping):
            embeds = dict(pretrained_model_name_or_path)
        else:
            path = local_path(pretrained_model_name_or_path)
            if not path.exists():
                path = from_hub(str(pretrained_model_name_or_path), weight_name, hub)
            embeds = read_learned_embeds(path / weight_name if path.is_dir() else path, token)
        self._add_tokens(embeds)

    @classmethod
    def lora_state_dict(  # type: ignore[override]
        cls, pretrained_model_name_or_path_or_dict: Source, *, weight_name: str | None = None, **hub: Any
    ) -> dict[str, Tensor]:
        """A LoRA's tensors under PEFT's keys with their component's prefix, and `.alpha` where the scale is not 1.

        Names that only a network explains (flattened, numbered) are those of the released or the embedded one.
        """
        from .conversion import peft_state_dict

        lora = read_with_tokens(pretrained_model_name_or_path_or_dict, weight_name, hub)
        if not lora.parts:
            raise ValueError(f"'{pretrained_model_name_or_path_or_dict}' has no LoRA, only learned tokens")
        return peft_state_dict(lora)

    @classmethod
    def save_lora_weights(  # type: ignore[override]
        cls,
        save_directory: str | os.PathLike,
        prior_lora_layers: Mapping[str, Any] | None = None,
        text_encoder_lora_layers: Mapping[str, Any] | None = None,
        *,
        is_main_process: bool = True,
        weight_name: str | None = None,
        save_function: Callable | None = None,
        safe_serialization: bool = True,
        decoder_lora_layers: Mapping[str, Any] | None = None,
        prior_lora_adapter_metadata: dict[str, Any] | None = None,
        decoder_lora_adapter_metadata: dict[str, Any] | None = None,
        text_encoder_lora_adapter_metadata: dict[str, Any] | None = None,
    ) -> None:
        """Writes state dicts in PEFT's layout to one file; `save_lora` does it from the networks themselves."""
        # diffusers' arguments, one per component, as its writer wants them.
        layers = {
            "prior": prior_lora_layers, "decoder": decoder_lora_layers, "text_encoder": text_encoder_lora_layers,
        }  # fmt: skip
        given = {component: values for component, values in layers.items() if values}
        if not given:
            raise ValueError(
                "nothing to save: give prior_lora_layers, decoder_lora_layers or text_encoder_lora_layers"
            )
        metadata = {
            "prior": prior_lora_adapter_metadata, "decoder": decoder_lora_adapter_metadata,
            "text_encoder": text_encoder_lora_adapter_metadata,
        }  # fmt: skip
        cls._save_lora_weights(
            save_directory=save_directory,
            lora_layers=given,  # type: ignore[arg-type]
            lora_metadata=metadata,
            is_main_process=is_main_process,
            weight_name=weight_name,  # type: ignore[arg-type]
            save_function=save_function,  # type: ignore[arg-type]
            safe_serialization=safe_serialization,
        )

    def set_adapters(self, adapter_names: Any, adapter_weights: Any = None) -> None:
        """Makes these adapters the active ones, each with its weight.

        Args:
            adapter_weights: a number, or component -> number, for all of them; or a list with one for each.

        Raises:
            ValueError: there is no such adapter, or a weight is for none of the components.
        """
        for weights in adapter_weights if isinstance(adapter_weights, list) else [adapter_weights]:
            odd = next((key for key in weights if key not in self._lora_loadable_modules), None) \
                if isinstance(weights, dict) else None  # fmt: skip
            if odd is not None:
                raise ValueError(f"set_adapters: {odd!r} is none of {', '.join(self._lora_loadable_modules)}")
        super().set_adapters(adapter_names, adapter_weights)

    def fuse_lora(
        self,
        components: Sequence[str] | None = None,
        lora_scale: float = 1.0,
        safe_fusing: bool = False,
        adapter_names: list[str] | None = None,
        **kwargs: Any,
    ) -> None:
        """Adds the active adapters into the weights, which are kept aside for `unfuse_lora`.

        Raises:
            ValueError: the weights are quantised, or an adapter has a form that does not go into them at this scale.
        """
        components = list(components or self._lora_loadable_modules)
        layers = [layer for component in components for _, layer in _layers(getattr(self, component, None))]
        quantized = next((layer for layer in layers if isinstance(layer.get_base_layer(), QuantizedLinear)), None)
        if quantized is not None:
            quantized.merge()  # says why it cannot, before anything is kept aside
        check_fusable(layers, adapter_names)
        unscaled = next((layer for layer in layers if not hasattr(layer, "scaling")), None)
        if unscaled is not None and lora_scale != 1:
            raise ValueError(
                f"lora_scale {lora_scale} cannot weaken the adapter '{unscaled.active_adapters[0]}', whose kind has "
                "no scale; fuse it with 1.0"
            )
        kept = self.__dict__.setdefault("_before_fusing", {})
        for component in components:
            for name, layer in _layers(getattr(self, component, None)):
                weights = {key: value.detach().clone() for key, value in layer.get_base_layer().named_parameters()}
                kept.setdefault((component, name), (weights, dict(getattr(layer, "scaling", {}))))
        super().fuse_lora(components, lora_scale, safe_fusing, adapter_names, **kwargs)

    @torch.no_grad()
    def unfuse_lora(self, components: Sequence[str] | None = None, **kwargs: Any) -> None:
        """Puts back the weights of before `fuse_lora`, bit by bit; subtracting would leave rounding errors."""
        components = list(components or self._lora_loadable_modules)
        super().unfuse_lora(components, **kwargs)
        kept = self.__dict__.get("_before_fusing", {})
        for component in components:
            for name, layer in _layers(getattr(self, component, None)):
                weights, scaling = kept.pop((component, name), ({}, {}))
                for key, value in layer.get_base_layer().named_parameters():
                    if key in weights:
                        value.copy_(weights[key])
                if scaling:
                    layer.scaling.update(scaling)

    def unload_lora_weights(self) -> None:
        """Takes out every adapter and every learned token; what was fused stays in the weights, as in diffusers."""
        # The adapters.
        self.__dict__.pop("_before_fusing", None)
        for component in self._lora_loadable_modules:
            model = getattr(self, component, None)
            if model is not None:
                remove_lora(model)
        self._merged_adapters: set[str] = set()
        # The tokens: the old tokenizer and as many rows as it has.
        before = self.__dict__.pop("_before_tokens", None)
        if before is not None:
            tokenizer, weight = before
            self.tokenizer = tokenizer
            old = self.text_encoder.get_input_embeddings().weight
            embedding = nn.Embedding.from_pretrained(weight.to(old.device, old.dtype), freeze=True)
            self.text_encoder.set_input_embeddings(embedding)
            for module in self.text_encoder.modules():
                if hasattr(module, "config"):
                    module.config.vocab_size = len(weight)

    def _models_for(self, lora: LoraFile) -> dict[str, Any]:
        """Component -> network, of those that the file has parts for and this pipeline has."""
        models = {component: getattr(self, component, None) for component in lora.parts}
        models = {component: model for component, model in models.items() if model is not None}
        if not models:
            raise ValueError(
                f"'{lora.name}' has {', '.join(sorted(lora.parts))}; this {type(self).__name__} has none of them"
            )
        return models

    def _load_parts(
        self, lora: LoraFile, adapter_name: str | None, weight: float, module_filters: Sequence[str] | None
    ) -> None:
        """Loads each component's part; all or nothing, so that a misfit leaves no half of it behind."""
        models = self._models_for(lora)
        adapter_name = adapter_name or self._free_name()
        if "." in adapter_name:
            raise ValueError(f"adapter_name {adapter_name!r} has a dot, which no part of a network's names may have")
        loaded: list[Any] = []
        try:
            for component, model in models.items():
                load_part(model, lora, component, adapter_name, weight, module_filters=module_filters)
                loaded.append(model)
        except ValueError:
            for model in loaded:
                take_out(model, adapter_name)
            raise

    def _swap_parts(
        self, lora: LoraFile, adapter_name: str | None, weight: float, module_filters: Sequence[str] | None
    ) -> None:
        """Puts each component's part in place of a loaded adapter; what of the adapter the file lacks becomes 0."""
        # The adapter has to be there.
        loaded = {name for names in self.get_list_adapters().values() for name in names}
        if adapter_name is None or adapter_name not in loaded:
            raise ValueError(
                f"hotswap needs the adapter_name of a loaded LoRA, not {adapter_name!r}; loaded: "
                f"{', '.join(sorted(loaded)) or 'none'}"
            )
        # Check every component before the first is changed.
        models = self._models_for(lora)
        parts = {}
        for component, model in models.items():
            parts[component] = fitting_part(model, lora, component, module_filters)
            check_swap(model, parts[component], adapter_name, lora.name)
        for component in self._lora_loadable_modules:
            model = getattr(self, component, None)
            if model is not None and component not in parts and carrying(model, adapter_name):
                parts[component] = Part({}, {})
                check_swap(model, parts[component], adapter_name, lora.name)
        # Exchange.
        for component, part in parts.items():
            swap(getattr(self, component), part, adapter_name, weight)

    def _free_name(self) -> str:
        used = {name for names in self.get_list_adapters().values() for name in names}
        return next(f"default_{number}" for number in range(len(used) + 1) if f"default_{number}" not in used)

    def _add_tokens(self, embeds: Mapping[str, Tensor]) -> None:
        if getattr(self, "text_encoder", None) is None:
            raise ValueError("learned tokens need a text_encoder, and this pipeline has none")
        if "_before_tokens" not in self.__dict__:
            weight = self.text_encoder.get_input_embeddings().weight.detach().clone()
            self.__dict__["_before_tokens"] = (copy.deepcopy(self.tokenizer), weight)
        add_token_rows(self.tokenizer, self.text_encoder, embeds)

    def _without_offloading(self) -> Callable[[], None]:
        """Takes CPU offloading off while modules change; the returned function puts it back."""
        model, sequential, _ = _func_optionally_disable_offloading(self)
        if model:
            return self.enable_model_cpu_offload
        return self.enable_sequential_cpu_offload if sequential else lambda: None


def _layers(model: nn.Module | None) -> list[tuple[str, Any]]:
    """(name, adapter layer) of a network."""
    if model is None:
        return []
    wanted = {id(layer) for layer in tuner_layers(model)}
    return [(name, module) for name, module in model.named_modules() if id(module) in wanted]
