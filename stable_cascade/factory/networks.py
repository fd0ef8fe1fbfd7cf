"""The networks of a config: where their weights come from, their shapes on the meta device, and themselves."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from stable_cascade.adapters.quantized import check_format, quantize, quantized_bytes
from stable_cascade.components import NETWORKS
from stable_cascade.files.json_files import read_config
from stable_cascade.files.loading import single_file_config
from stable_cascade.files.presets import PRESETS
from stable_cascade.hub import HubError, NotAskedError, ask
from stable_cascade.models.checkpointing import chosen_checkpoint

SCRATCH = "scratch"
PRETRAINED = "pretrained"


def network_class(name: str) -> Any:
    """The class of a network by its folder name."""
    return NETWORKS[name].load_class()


def preset(config: Any, name: str) -> dict[str, Any]:
    """The constructor arguments of a network for the config's `model_version`."""
    versions = PRESETS[name]
    version = config.model_version
    if version not in versions:
        version = "embedded" if version == "embedded" else "released"
    if version not in versions:
        raise ValueError(f"model_version '{config.model_version}' has no {name}; it has {', '.join(sorted(versions))}")
    return dict(versions[version])


def file_preset(config: Any, name: str) -> dict[str, Any] | None:
    """The constructor arguments for a network's single file; None where its own shapes tell them."""
    return None if source_key(config, name) == "stage_b_checkpoint_path" else preset(config, name)


def cascade_folder(config: Any) -> str | None:
    """`pretrained_model_name_or_path` with the word `embedded` replaced by the folder of the embedded cascade."""
    name = getattr(config, "pretrained_model_name_or_path", None)
    if name != "embedded":
        return name
    from stable_cascade.embedded import embedded_path

    return str(embedded_path())


def source_key(config: Any, name: str) -> str:
    """The key that says where a network's weights come from."""
    if name == "decoder" and hasattr(config, "stage_b_checkpoint_path"):  # beside Stage C, which is the generator
        return "stage_b_checkpoint_path"
    return NETWORKS[name].key if name in NETWORKS and NETWORKS[name].key else "pretrained_model_name_or_path"


def preview_networks(config: Any) -> list[str]:
    """The networks that turn Stage C's latents into images for previews."""
    if not config.num_preview_images:
        return []
    return ["decoder", "vqgan"] if config.stage_b_checkpoint_path else ["previewer"]


def source(config: Any, name: str) -> str:
    """Where a network's weights come from: a file, a folder, a Hub name, or the word `scratch`.

    Raises:
        ValueError: no key names one, or the file is missing.
    """
    key = source_key(config, name)
    named = name in NETWORKS and NETWORKS[name].key  # CLIP and the ControlNet have no key of their own here
    explicit = getattr(config, key, None) if named else None
    if explicit and explicit != PRETRAINED:
        if explicit != SCRATCH and not Path(explicit).exists():
            raise ValueError(f"{key} '{explicit}' does not exist; give a file, a folder or '{SCRATCH}'")
        return explicit
    folder = cascade_folder(config)
    if not folder:
        raise ValueError(
            f"{key} is not set, so the {name} has no weights; name a file or folder, '{SCRATCH}', "
            "or a whole cascade with pretrained_model_name_or_path"
        )
    if Path(folder).exists() and not (Path(folder) / name).exists():
        raise ValueError(f"pretrained_model_name_or_path '{folder}' has no folder '{name}'; set {key} as well")
    return str(Path(folder) / name) if Path(folder).exists() else folder


def network_on_meta(config: Any, name: str) -> nn.Module:
    """The network without memory for its weights: shapes and names for plans and checks.

    Raises:
        ValueError: nothing says what size the network has.
    """
    # The constructor's arguments: from the folder's config, the file's shapes, the size by name, or the Hub.
    where, cls = source(config, name), network_class(name)
    description = Path(where) / "config.json"
    if description.exists():
        arguments = read_config(description)
    elif Path(where).is_file() and file_preset(config, name) is None:
        arguments = single_file_config(cls, name, where)
    elif where == SCRATCH or Path(where).exists():
        arguments = preset(config, name)
    else:
        try:
            arguments = ask(where, partial(cls.load_config, where, subfolder=name))
        except NotAskedError:
            raise
        except HubError as error:
            raise ValueError(
                f"pretrained_model_name_or_path: {error}; give a folder, 'embedded' or a Hub name, or set "
                f"{source_key(config, name)}"
            ) from None
    with torch.device("meta"):
        return cls.from_config(arguments)


def network(config: Any, name: str, *, dtype: torch.dtype = torch.float32) -> Any:
    """A network with its weights, or freshly initialised from the config's seed."""
    where, cls = source(config, name), network_class(name)
    if where == SCRATCH:
        with torch.random.fork_rng():
            torch.manual_seed(config.seed)
            model = cls(**preset(config, name))
        return model if dtype == torch.float32 else model.to(dtype)
    if Path(where).is_file():
        return cls.from_single_file(where, config=file_preset(config, name), torch_dtype=dtype)
    if Path(where).exists():
        return cls.from_pretrained(where, torch_dtype=dtype)
    return ask(where, partial(cls.from_pretrained, where, subfolder=name, torch_dtype=dtype))


def frozen(config: Any, name: str, device: torch.device, *, dtype: torch.dtype = torch.float32) -> Any:
    """A network that only serves: no gradients, evaluation mode, on the device, or brought there while it works."""
    return on_demand(config, network(config, name, dtype=dtype).requires_grad_(False).eval(), device)


def on_demand(config: Any, module: nn.Module, device: torch.device) -> Any:
    """The module on the device; with `offload` its weights stay in main memory and visit the device layer by layer."""
    if not config.offload or device.type == "cpu":
        return module.to(device)
    from accelerate import cpu_offload

    return cpu_offload(module, device)


def checkpoint_gradients(config: Any, *networks: Any) -> None:
    """Let networks that train recompute activations in the backward pass, where the config asks for it."""
    if config.gradient_checkpointing:
        for one in networks:
            one.enable_gradient_checkpointing(chosen_checkpoint(config.gradient_checkpointing))


def frozen_base(config: Any, device: torch.device) -> Any:
    """The prior without gradients on the device; with `quantization` its large linear layers in few bits.

    The weights are read into main memory once, in `dtype`. Each layer goes to the device, is quantised there and
    replaces the original, so that neither memory ever holds the network twice, and the device never holds it whole.

    Raises:
        ValueError: the format's package is missing.
    """
    if quantizes(config):
        check_format(config.quantization)
    prior = network(config, "prior", dtype=getattr(torch, config.dtype)).requires_grad_(False)
    if quantizes(config):
        quantize(prior, config.quantization, device)
    return prior.to(device)


def quantizes(config: Any) -> bool:
    """Whether the config asks for a quantised base."""
    return getattr(config, "quantization", "none") != "none"


def quantization_entry(config: Any, prior: torch.nn.Module) -> str:
    """What of the prior (the meta device will do) is stored how, in words; empty without quantisation.

    Raises:
        ValueError: the format's package is missing.
    """
    if not quantizes(config):
        return ""
    check_format(config.quantization)
    weights, size = quantized_bytes(prior, config.quantization)
    return f"{weights:>13,} weights of the frozen prior as {config.quantization}, {size / 2**20:,.1f} MiB"
