"""From a config to objects: the only place that knows both. Trainers' `main`s and the commands call it.

Nothing here trains or samples. The functions `…_on_meta` build without memory for weights: `plan.py` looks with
them at everything that can go wrong, before the others load.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from stable_cascade import models
from stable_cascade.adapters import LearnedTokens, add_learned_tokens, add_lora, add_token_rows, read_learned_embeds
from stable_cascade.adapters.lora import layer_shapes, lora_path, read_lora
from stable_cascade.adapters.tokens import EMBEDS_NAME
from stable_cascade.data import Batch, SampleIndex, SampleStream, index_samples, training_batches
from stable_cascade.diffusion import weighting
from stable_cascade.formats import lora as lora_files
from stable_cascade.models.clip_image import clip_pixels
from stable_cascade.models.presets import PRESETS
from stable_cascade.objectives.denoising import chosen
from stable_cascade.training.tracking import check_launch, make_accelerator


@dataclass(frozen=True)
class Network:
    """How one network of the cascade is named in configs, folders, presets and files."""

    cls: str
    key: str
    component: str


NETWORKS = {
    "prior": Network("StableCascadePrior", "generator_checkpoint_path", "prior"),
    "decoder": Network("StableCascadeDecoder", "generator_checkpoint_path", "decoder"),
    "vqgan": Network("StableCascadeVQGAN", "stage_a_checkpoint_path", "vqgan"),
    "semantic_encoder": Network("StableCascadeImageEncoder", "effnet_checkpoint_path", "image_encoder"),
    "previewer": Network("StableCascadePreviewer", "previewer_checkpoint_path", "previewer"),
}
SCRATCH = "scratch"
CLIP_TEXT, CLIP_IMAGE = "laion/CLIP-ViT-bigG-14-laion2B-39B-b160k", "openai/clip-vit-large-patch14"
"""The CLIP networks that the released cascade was trained with."""


def network_class(name: str) -> Any:
    """The class of a network by its folder name."""
    return getattr(models, NETWORKS[name].cls)


def preset(config: Any, name: str) -> dict[str, Any]:
    """The constructor arguments of a network for the config's `model_version`."""
    versions = PRESETS[NETWORKS[name].component]
    version = config.model_version
    if version not in versions:
        version = "embedded" if version == "embedded" else "released"
    if version not in versions:
        raise ValueError(f"model_version '{config.model_version}' has no {name}; it has {', '.join(sorted(versions))}")
    return dict(versions[version])


def cascade_folder(config: Any) -> str | None:
    """`pretrained_model_name_or_path` with the word `embedded` replaced by the folder of the embedded cascade."""
    name = getattr(config, "pretrained_model_name_or_path", None)
    if name != "embedded":
        return name
    from stable_cascade.embedded import embedded_path

    return str(embedded_path())


def source(config: Any, name: str) -> str:
    """Where a network's weights come from: a file, a folder, a Hub name, or the word `scratch`.

    Raises:
        ValueError: no key names one, or the file is missing.
    """
    key = NETWORKS[name].key if name in NETWORKS else "pretrained_model_name_or_path"
    explicit = getattr(config, key, None) if name in NETWORKS else None
    if explicit:
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
    where, cls = source(config, name), network_class(name)
    description = Path(where) / "config.json"
    if description.exists():
        arguments = json.loads(description.read_text())
    elif where == SCRATCH or Path(where).exists():
        arguments = preset(config, name)
    else:
        try:
            arguments = cls.load_config(where, subfolder=name)
        except (OSError, ValueError):
            raise ValueError(
                f"pretrained_model_name_or_path '{where}' is no local folder, and the Hub has no such '{name}' or "
                f"cannot be reached; give a folder, 'embedded' or a Hub name, or set {NETWORKS[name].key}"
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
        return cls.from_single_file(where, config=preset(config, name), torch_dtype=dtype)
    if Path(where).exists():
        return cls.from_pretrained(where, torch_dtype=dtype)
    return cls.from_pretrained(where, subfolder=name, torch_dtype=dtype)


def frozen(config: Any, name: str, device: torch.device, *, dtype: torch.dtype = torch.float32) -> Any:
    """A network that only serves: no gradients, evaluation mode, on the device."""
    return network(config, name, dtype=dtype).requires_grad_(False).eval().to(device)


def clip_source(config: Any, part: str) -> tuple[str, str]:
    """Folder or Hub name, and folder in it, of `tokenizer`, `text_encoder` or `image_encoder` (CLIP's)."""
    key, default = ("clip_image_model_name", CLIP_IMAGE) if part == "image_encoder" else _TEXT
    explicit, folder = getattr(config, key), cascade_folder(config)
    if explicit:
        return explicit, ""
    return (folder, part) if folder else (default, "")


_TEXT = ("clip_text_model_name", CLIP_TEXT)


def text_encoder(config: Any, *, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    """The tokenizer and CLIP's text encoder, frozen."""
    from transformers import CLIPTextModelWithProjection, CLIPTokenizer

    name, part = clip_source(config, "tokenizer")
    tokenizer = CLIPTokenizer.from_pretrained(name, subfolder=part)
    name, part = clip_source(config, "text_encoder")
    encoder = CLIPTextModelWithProjection.from_pretrained(name, subfolder=part, dtype=dtype)
    return tokenizer, encoder.requires_grad_(False).eval()


def text_encoder_on_meta(config: Any) -> tuple[Any, Any]:
    """The tokenizer, and the text encoder without memory for its weights.

    Raises:
        ValueError: one of them is not there.
    """
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

    try:
        name, part = clip_source(config, "tokenizer")
        tokenizer = CLIPTokenizer.from_pretrained(name, subfolder=part)
        name, part = clip_source(config, "text_encoder")
        settings = CLIPTextConfig.from_pretrained(name, subfolder=part)
    except (OSError, TypeError):  # TypeError: what CLIPTokenizer says about a folder without vocabulary
        raise ValueError(
            f"there is no CLIP {part.replace('_', ' ') or 'text encoder'} in '{name}'; set clip_text_model_name"
        ) from None
    with torch.device("meta"):
        return tokenizer, CLIPTextModelWithProjection(settings)


def add_config_lora(config: Any, prior: Any) -> list[str]:
    """Names of the layers that got an adapter as the config says, started from `lora_checkpoint_path` if it is set.

    Works on the meta device too, where it is the check of these keys.

    Raises:
        ValueError: the filters match nothing, or the file is of another rank, scale or choice of layers.
    """
    targets = add_lora(
        prior,
        module_filters=config.module_filters,
        rank=config.rank,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        use_dora=config.use_dora,
        seed=config.seed,
    )
    if config.lora_checkpoint_path:
        _start_from(config, prior)
    return targets


def _start_from(config: Any, prior: Any) -> None:
    """Put the values of the config's LoRA file into the adapters."""
    from peft import get_peft_model_state_dict, set_peft_model_state_dict

    lora = read_lora(config.lora_checkpoint_path)
    where = f"lora_checkpoint_path '{config.lora_checkpoint_path}'"
    if "prior" not in lora.parts:
        raise ValueError(f"{where} has nothing for the prior, only {', '.join(sorted(lora.parts))}; name another file")
    values, alpha = lora.parts["prior"], lora.metadata.get("prior", {}).get("lora_alpha", config.rank)
    if lora.layout == "original":
        values, alpha = lora_files.from_original_lora(values, layer_shapes(prior), config.module_filters), 1
    own = get_peft_model_state_dict(prior, save_embedding_layers=False)
    wanted = {name: value.shape for name, value in own.items()}
    given = {name: value.shape for name, value in values.items()}
    odd = sorted(name for name in wanted.keys() | given.keys() if wanted.get(name) != given.get(name))
    if odd:
        shapes = [list(shapes[odd[0]]) if odd[0] in shapes else "absent" for shapes in (given, wanted)]
        raise ValueError(
            f"{where} differs from module_filters {config.module_filters}, rank {config.rank}, use_dora "
            f"{config.use_dora} in '{odd[0]}': {shapes[0]} in the file, {shapes[1]} here; set them as it was trained"
        )
    if alpha != config.lora_alpha:
        raise ValueError(
            f"{where} was trained with lora_alpha {alpha}, not {config.lora_alpha}; set lora_alpha: {alpha}"
        )
    if not next(prior.parameters()).is_meta:
        set_peft_model_state_dict(prior, values, "default")


def learned_tokens(config: Any, tokenizer: Any, text_encoder: Any) -> LearnedTokens | None:
    """The token rows that train, put into the text encoder; those beside `lora_checkpoint_path` go on from there.

    Raises:
        ValueError: `train_tokens` matches nothing, or leaves out a token of that file.
    """
    before: dict[str, Tensor] = {}
    if config.lora_checkpoint_path:
        beside = lora_path(config.lora_checkpoint_path).parent / EMBEDS_NAME
        before = read_learned_embeds(beside) if beside.exists() else {}
    if before:
        add_token_rows(tokenizer, text_encoder, before)
    tokens = add_learned_tokens(tokenizer, text_encoder, config.train_tokens)
    lost = [token for token in before if tokens is None or token not in tokens.tokens]
    if lost:
        raise ValueError(
            f"lora_checkpoint_path '{config.lora_checkpoint_path}' comes with the token '{lost[0]}', which "
            f"train_tokens leaves out; add ['{lost[0]}', null]"
        )
    return tokens


def image_embedder(config: Any, device: torch.device) -> Callable[[Tensor, Tensor], Tensor | None]:
    """(pixels, seeds) -> CLIP image embeddings (B, 1, D), zeros for all but `image_embedding_share` of the samples."""
    share = config.image_embedding_share
    if not share:
        return lambda pixels, seeds: None
    from transformers import CLIPVisionModelWithProjection

    name, part = clip_source(config, "image_encoder")
    encoder = CLIPVisionModelWithProjection.from_pretrained(name, subfolder=part).requires_grad_(False).eval()
    encoder = encoder.to(device)

    def embed(pixels: Tensor, seeds: Tensor) -> Tensor:
        kept = chosen(seeds, "image embedding", share).to(device)
        embeddings = torch.zeros(len(pixels), 1, encoder.config.projection_dim, device=device)
        if kept.any():
            shown = clip_pixels(pixels[kept], encoder.config.image_size)
            embeddings[kept] = encoder(pixel_values=shown).image_embeds.float()[:, None]
        return embeddings

    return embed


def samples(config: Any) -> SampleIndex | SampleStream:
    """The index of the training pictures; broken shards and filters end here, before any weight is read."""
    return index_samples(
        config.webdataset_path,
        dataset_name=config.dataset_name,
        image_column=config.image_column,
        caption_column=config.caption_column,
        streaming=config.streaming,
        dataset_filters=config.dataset_filters,
        captions_getter=config.captions_getter,
        max_broken_share=config.max_broken_share,
        cache_dir=config.cache_dir,
    )


def batches(
    config: Any, index: SampleIndex | SampleStream, accelerator: Any, *, factor: int
) -> Callable[[int], Iterator[Batch]]:
    """Start step -> this process's micro-batches from there on, without end."""

    def from_step(start_step: int) -> Iterator[Batch]:
        return training_batches(
            index,
            image_size=config.image_size,
            batch_size=config.batch_size,
            grad_accum_steps=config.grad_accum_steps,
            num_processes=accelerator.num_processes,
            process_index=accelerator.process_index,
            seed=config.seed,
            multi_aspect_ratio=config.multi_aspect_ratio,
            bucket_factor=factor,
            random_bucket_share=config.bucketeer_random_ratio,
            crop=config.crop,
            start_step=start_step,
            num_workers=config.num_workers,
        )

    return from_step


@dataclass(frozen=True)
class Weighting:
    """The loss weight of a config and what the loop needs to keep it up to date."""

    weight: Callable[[Tensor], Tensor]
    stateful: dict[str, Any]
    after_step: Callable[[Tensor, Tensor], None] | None


def loss_weight(config: Any) -> Weighting:
    """The loss weight by noise level: P2 as published, adaptive, min-SNR or none."""
    if config.loss_weight == "adaptive":
        adaptive = weighting.AdaptiveLossWeight()
        return Weighting(adaptive, {"adaptive_loss_weight": adaptive}, adaptive.update)
    choices: dict[str, Callable[[Tensor], Tensor]] = {
        "p2": weighting.p2_weight,
        "min_snr": lambda log_snr: weighting.min_snr_weight(log_snr, config.min_snr_gamma, config.prediction_type),
        "constant": torch.ones_like,
    }
    return Weighting(choices[config.loss_weight], {}, None)


def launch(config: Any, plan: str) -> Any:
    """The accelerator of this process, after refusing a launch that contradicts the config; prints the plan.

    Raises:
        ValueError: as `check_launch`.
    """
    accelerator = make_accelerator(config)
    check_launch(config, accelerator)
    accelerator.print(f"{plan}\nprocesses       {accelerator.num_processes}, this one on {accelerator.device}")
    return accelerator
