"""The networks of a config: where their weights come from, their shapes on the meta device, and themselves."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stable_cascade.adapters.quantized import check_format, quantize, quantized_bytes
from stable_cascade.components import NETWORKS
from stable_cascade.files.json_files import read_config
from stable_cascade.files.loading import single_file_config
from stable_cascade.files.presets import PRESETS
from stable_cascade.hub import HubError, NotAskedError, ask
from stable_cascade.models.base import check_whole
from stable_cascade.models.checkpointing import chosen_checkpoint
from stable_cascade.models.clip import TextEmbedder, clip_pixels
from stable_cascade.objectives.denoising import EmbedText, chosen
from stable_cascade.transfer import to_device

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


CLIP_TEXT, CLIP_IMAGE = "laion/CLIP-ViT-bigG-14-laion2B-39B-b160k", "openai/clip-vit-large-patch14"
"""The CLIP networks that the released cascade was trained with."""


def clip_source(config: Any, part: str) -> tuple[str, str]:
    """Folder or Hub name, and folder in it, of `tokenizer`, `text_encoder` or `image_encoder` (CLIP's)."""
    key, default = ("clip_image_model_name", CLIP_IMAGE) if part == "image_encoder" else _TEXT
    explicit, folder = getattr(config, key), cascade_folder(config)
    if explicit:
        return explicit, ""
    return (folder, part) if folder else (default, "")


_TEXT = ("clip_text_model_name", CLIP_TEXT)


def from_source(config: Any, part: str, cls: Any, **options: Any) -> Any:
    """`cls.from_pretrained` of one of CLIP's parts: a tokenizer, a network or its config.

    Raises:
        ValueError: it is not there, or a network lacks weights.
    """
    name, folder = clip_source(config, part)
    network = issubclass(cls, torch.nn.Module)
    if network:
        options["output_loading_info"] = True
    load = partial(cls.from_pretrained, name, subfolder=folder, **options)
    try:
        found = load() if Path(name).exists() else ask(name, load)
    except (OSError, TypeError):  # TypeError: what CLIPTokenizer says about a folder without vocabulary
        key = "clip_image_model_name" if part == "image_encoder" else "clip_text_model_name"
        raise ValueError(f"there is no CLIP {part.replace('_', ' ')} in '{name}'; set {key}") from None
    if not network:
        return found
    encoder, info = found
    check_whole(info, cls.__name__, name)
    return encoder


def text_encoder(config: Any, *, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """The tokenizer and CLIP's text encoder, frozen."""
    from transformers import CLIPTextModelWithProjection, CLIPTokenizer

    tokenizer = from_source(config, "tokenizer", CLIPTokenizer)
    encoder = from_source(config, "text_encoder", CLIPTextModelWithProjection, dtype=dtype)
    return tokenizer, encoder.requires_grad_(False).eval()


def text_encoder_on_meta(config: Any) -> tuple[Any, Any]:
    """The tokenizer, and the text encoder without memory for its weights.

    Raises:
        ValueError: one of them is not there.
    """
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

    tokenizer = from_source(config, "tokenizer", CLIPTokenizer)
    settings = from_source(config, "text_encoder", CLIPTextConfig)
    with torch.device("meta"):
        return tokenizer, CLIPTextModelWithProjection(settings)


def frozen_text(config: Any, device: torch.device) -> EmbedText:
    """The config's text encoder as a function without gradients."""
    tokenizer, encoder = text_encoder(config, dtype=getattr(torch, config.dtype))
    embedder = TextEmbedder(on_demand(config, encoder, device), tokenizer)

    @torch.no_grad()
    def embed(captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        hidden, pooled = embedder(captions, device)
        return hidden, pooled

    return embed


def image_encoder(config: Any, device: torch.device) -> tuple[Callable[[Tensor], Tensor], int]:
    """Pixels (B, 3, H, W) in [0, 1] -> CLIP image embeddings (B, 1, D) in float32; and D."""
    from transformers import CLIPVisionModelWithProjection

    encoder = from_source(config, "image_encoder", CLIPVisionModelWithProjection).requires_grad_(False).eval()
    encoder = on_demand(config, encoder, device)

    def encode(pixels: Tensor) -> Tensor:
        shown = clip_pixels(pixels, encoder.config.image_size)
        return encoder(pixel_values=shown).image_embeds.float()[:, None]

    return encode, encoder.config.projection_dim


def image_embedder(config: Any, device: torch.device) -> Callable[[Tensor, Tensor], Tensor | None]:
    """(pixels, seeds) -> CLIP image embeddings (B, 1, D), zeros for all but `image_embedding_share` of the samples."""
    share = config.image_embedding_share
    if not share:
        return lambda pixels, seeds: None
    encode, width = image_encoder(config, device)

    def embed(pixels: Tensor, seeds: Tensor) -> Tensor:
        rows = chosen(seeds, "image embedding", share).nonzero()[:, 0]  # on the host, which need not ask the device
        embeddings = torch.zeros(len(pixels), 1, width, device=device)
        if not len(rows):
            return embeddings
        kept = to_device(rows, device)
        return embeddings.index_copy(0, kept, encode(pixels[kept]))

    return embed
