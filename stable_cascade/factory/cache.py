"""Latents and embeddings computed once: `cache: true` fills the cache, and training reads it instead of encoders."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from stable_cascade.data import Batch, Plan, PlannedCrop, SampleIndex, SampleStream, crop_batches, planned_crops
from stable_cascade.data.cache import StoreWriter, TensorStore, digest
from stable_cascade.training.processes import gathered

from .clip import frozen_text, image_encoder
from .data import loading_for, make_plan, shown
from .fingerprints import cache_folder, fingerprint, remember
from .networks import frozen, network_on_meta

TEXTS_AT_ONCE, CROPS_AT_ONCE = 32, 16


@dataclass(frozen=True)
class Cache:
    """A filled cache: a store per kind of tensor, and the keys of the samples that were found broken."""

    stores: dict[str, TensorStore]
    broken: frozenset[str]
    stride: int
    folder: Path

    def __str__(self) -> str:
        parts = [f"{len(store):,} {kind} {_amount(store.size)}" for kind, store in self.stores.items()]
        lost = f", {len(self.broken):,} broken samples replaced" if self.broken else ""
        return f"{', '.join(parts)} in {self.folder}{lost}"

    def crops(self, kind: str, batch: Batch) -> Tensor:
        """One kind of tensor for the rows of a batch. Shapes: -> (B, ...)."""
        return torch.stack([_read(self.stores[kind], identity, batch.keys) for identity in batch.identities])

    def embed_text(self, captions: Sequence[str]) -> tuple[Tensor, Tensor]:
        """Hidden states and pooled text of captions. Shapes: B captions -> (B, L, D), (B, 1, P)."""
        texts = self.stores["texts"]
        hidden, pooled = (
            torch.stack([_read(texts, _text_name(part, caption), captions) for caption in captions])
            for part in ("hidden", "pooled")
        )
        return hidden, pooled


def fill_cache(config: Any, accelerator: Any, index: SampleIndex | SampleStream, *, texts: bool = True) -> Cache:
    """The cache with everything that the config's `updates` steps show; computes what is missing, nothing twice.

    Every process computes its share. Broken samples are found here: those that are shown in their place are in the
    cache, and the training gets the same ones as without it.

    Raises:
        ValueError: too many samples are broken, the data is a stream, or a cache file is damaged.
    """
    # Open a store per kind of tensor, known by the networks that make it.
    stride: int = network_on_meta(config, "semantic_encoder").stride  # type: ignore[assignment]
    plan = make_plan(config, factor=stride, accelerator=accelerator)
    kinds = ["latents", *(["images"] if config.image_embedding_share else []), *(["texts"] if texts else [])]
    folder = cache_folder(config)
    stores = {kind: TensorStore(folder / f"{kind}-{fingerprint(config, kind)[:16]}") for kind in kinds}
    if config.masked_loss:
        stores["masks"] = TensorStore(folder / f"masks-{stride}")
    everyone(accelerator, [])  # all have hashed the networks before one writes that down
    if accelerator.is_main_process:
        remember(config, kinds)
    # Fill them: crops first, which finds the broken samples, then the captions of those that are shown.
    crop_stores = {kind: store for kind, store in stores.items() if kind != "texts"}
    crops, broken = _fill_crops(
        config, accelerator, index, plan, _Encoders(config, accelerator.device, stride), crop_stores
    )
    if texts:
        captions = {index.caption(number) for number in {crop.sample for crop in crops}}  # type: ignore[union-attr]
        _fill_texts(config, accelerator, stores["texts"], {"", *captions, *(config.validation_prompts or ())})
    if accelerator.device.type == "cuda":
        torch.cuda.empty_cache()
    cache = Cache(stores, broken, stride, folder)
    accelerator.print(f"cache           {cache}")
    return cache


class _Encoders:
    """What makes each kind of tensor from a batch with pixels; a network loads when the first batch needs it."""

    def __init__(self, config: Any, device: torch.device, stride: int):
        self.config, self.device, self.stride = config, device, stride

    @functools.cached_property
    def _semantic(self) -> Any:
        return frozen(self.config, "semantic_encoder", self.device)

    @functools.cached_property
    def _image(self) -> Any:
        return image_encoder(self.config, self.device)[0]

    @torch.no_grad()
    def compute(self, kind: str, batch: Batch) -> Tensor:
        """Shapes: -> (B, ...) float32."""
        if kind == "masks":
            assert batch.masks is not None
            height, width = batch.masks.shape[-2:]
            size = (-(-height // self.stride), -(-width // self.stride))
            return F.interpolate(batch.masks, size=size, mode="area")
        pixels = shown(batch, self.device)
        return self._semantic(pixels).float() if kind == "latents" else self._image(pixels)


def _fill_crops(
    config: Any,
    accelerator: Any,
    index: Any,
    plan: Plan,
    encoders: _Encoders,
    stores: dict[str, TensorStore],
) -> tuple[list[PlannedCrop], frozenset[str]]:
    """The planned crops, all of them in the stores now, and the keys of the broken samples that they replace."""
    broken: frozenset[str] = frozenset()
    while True:
        crops = planned_crops(index, replace(plan, known_broken=broken), config.updates)
        todo = [crop for crop in crops if any(crop.identity not in store for store in stores.values())]
        if not everyone(accelerator, todo[:1]):
            return crops, broken
        mine = [crop for crop in todo if _belongs(crop.identity, accelerator)]
        lost = _encode_crops(config, accelerator, index, plan, mine, encoders, stores)
        broken |= frozenset(everyone(accelerator, lost))
        for store in stores.values():
            store.refresh()


def _encode_crops(
    config: Any,
    accelerator: Any,
    index: Any,
    plan: Plan,
    crops: list[PlannedCrop],
    encoders: _Encoders,
    stores: dict[str, TensorStore],
) -> list[str]:
    """Adds crops to the stores; returns the keys of those that are broken."""
    # Decode the crops in batches.
    done: set[str] = set()
    micro = config.batch_size // config.grad_accum_steps // accelerator.num_processes
    decoded = crop_batches(
        index,
        crops,
        plan,
        batch_size=max(1, min(micro, CROPS_AT_ONCE)),
        num_workers=config.num_workers,
        **loading_for(accelerator.device),
    )
    # Compute and write what each store lacks; a crop that no batch brought is broken.
    with contextlib.ExitStack() as stack, _bar(accelerator, "caching images", len(crops)) as bar:
        writers = {kind: stack.enter_context(StoreWriter(store.folder)) for kind, store in stores.items()}
        for batch in decoded:
            for kind, writer in writers.items():
                if stores[kind].missing(batch.identities):
                    writer.add(dict(zip(batch.identities, encoders.compute(kind, batch), strict=True)))
            done.update(batch.identities)
            bar.update(len(batch.keys) + batch.broken)
    return [crop.key for crop in crops if crop.identity not in done]


def _fill_texts(config: Any, accelerator: Any, store: TensorStore, captions: set[str]) -> None:
    """Adds the embeddings of captions."""
    todo = sorted(caption for caption in captions if _text_name("pooled", caption) not in store)
    if not everyone(accelerator, todo[:1]):
        return
    mine = [caption for caption in todo if _belongs(caption, accelerator)]
    embed = frozen_text(config, accelerator.device) if mine else None
    with StoreWriter(store.folder) as writer, _bar(accelerator, "caching captions", len(mine)) as bar:
        for start in range(0, len(mine), TEXTS_AT_ONCE):
            part = mine[start : start + TEXTS_AT_ONCE]
            assert embed is not None
            for name, tensors in zip(("hidden", "pooled"), embed(part), strict=True):
                writer.add({_text_name(name, caption): row for caption, row in zip(part, tensors, strict=True)})
            bar.update(len(part))
    everyone(accelerator, [])
    store.refresh()


def everyone(accelerator: Any, values: list[Any]) -> list[Any]:
    """The values of all processes; none goes on before all are here."""
    return [value for some in gathered(accelerator, values) for value in some]


def _belongs(name: str, accelerator: Any) -> bool:
    """Whether this process computes it: a function of the name, since others may fill the same cache meanwhile."""
    return int(digest(name)[:8], 16) % accelerator.num_processes == accelerator.process_index


def _read(store: TensorStore, name: str, about: Sequence[str]) -> Tensor:
    try:
        return store[name]
    except KeyError:
        raise ValueError(
            f"{store.folder} has nothing for {name!r} (of {list(about)[:2]}); "
            "fill it with `stable-cascade cache CONFIG`"
        ) from None


def _text_name(part: str, caption: str) -> str:
    return f"{part} {caption}"


def _bar(accelerator: Any, what: str, total: int) -> Any:
    """A progress bar of this process's share, on the main process."""
    from tqdm import tqdm

    return tqdm(total=total, desc=what, disable=not accelerator.is_main_process or not total, dynamic_ncols=True)


def _amount(size: int) -> str:
    """Bytes for people."""
    return f"({size / 2**30:.2f} GiB)" if size >= 2**30 else f"({size / 2**20:.1f} MiB)"
