"""Latents and embeddings computed once: `cache: true` fills the cache, and training reads it instead of encoders."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from stable_cascade.data import Batch, Plan, PlannedCrop, SampleIndex, SampleStream, crop_batches, planned_crops
from stable_cascade.data.store import StoreWriter, TensorStore, digest
from stable_cascade.files.json_files import read_json
from stable_cascade.hub import hub_file
from stable_cascade.training.processes import gathered

from .data import loading_for, make_plan, shown
from .networks import SCRATCH, clip_source, frozen, frozen_text, image_encoder, network_on_meta, preset, source

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


_FORMAT = 2  # since 2 an ICC profile is applied
"""Raise it when the same network and image give other tensors than before."""

_SOURCES = "sources.json"
_WHOLE, _PIECES, _PIECE = 256 * 2**20, 256, 65536
_READ = ("*.json", "*.txt", "*.safetensors", "*.bin", "*.pt")
PARTS = {
    "latents": ("semantic_encoder",),
    "images": ("image_encoder",),
    "texts": ("tokenizer", "text_encoder"),
}
"""The networks that make each kind of tensor."""


def cache_folder(config: Any) -> Path:
    """Where the config's cache is."""
    return Path(config.cache_dir) if config.cache_dir else Path(config.checkpoint_path) / "cache"


def fingerprint(config: Any, kind: str) -> str:
    """A hash of the networks that make one kind of tensor, and of the number format in which they do.

    A local file or folder is known by its contents, of files above 256 MB by their size and 256 pieces of 64 KB spread
    over them; a Hub name by its commit. Where a local network's weights are gone, what the cache remembers of that
    path counts: no other network can be meant.

    Raises:
        ValueError: a network is not there, and was not before.
    """
    parts = [_part(config, part) for part in PARTS[kind]]
    dtype = config.dtype if kind == "texts" else "float32"
    return _hash(json.dumps([_FORMAT, kind, dtype, parts]).encode())


def remembered(config: Any, part: str) -> bool:
    """Whether a cache was filled from this network, so that a training needs its weights no longer."""
    if part not in {part for parts in PARTS.values() for part in parts} or not getattr(config, "cache", False):
        return False
    return str(_place(config, part)) in _memory(cache_folder(config))


def remember(config: Any, kinds: Iterable[str]) -> None:
    """Write down the hashes of the networks that fill the cache."""
    folder = cache_folder(config)
    known = _memory(folder)
    for part in (part for kind in kinds for part in PARTS[kind]):
        known[str(_place(config, part))] = _part(config, part)
    folder.mkdir(parents=True, exist_ok=True)
    temporary = folder / f".tmp-{os.getpid()}-{_SOURCES}"
    temporary.write_text(json.dumps(known, indent=1))
    os.replace(temporary, folder / _SOURCES)


def _memory(folder: Path) -> dict[str, str]:
    """Path of a network -> its hash, of the networks that filled the cache."""
    try:
        return read_json(folder / _SOURCES)
    except (OSError, ValueError):
        return {}


def _place(config: Any, part: str) -> Path | str:
    """Path of a network, or what stands for it: a Hub name, the word `scratch`."""
    if part == "semantic_encoder":
        where = source(config, part)
        return Path(where).absolute() if Path(where).exists() else where
    name, folder = clip_source(config, part)
    return (Path(name) / folder).absolute() if Path(name).exists() else f"{name}:{folder}"


def _part(config: Any, part: str) -> str:
    """The hash of one network."""
    place = _place(config, part)
    if isinstance(place, str):
        if place == SCRATCH:
            return _hash(json.dumps([config.seed, preset(config, part)], sort_keys=True).encode())
        return _commit(place if ":" in place else f"{place}:{part}")
    files = [place] if place.is_file() else sorted({file for pattern in _READ for file in place.glob(pattern)})
    weights = [file for file in files if file.suffix in (".safetensors", ".bin", ".pt")]
    if part != "tokenizer" and not weights:
        known = _memory(cache_folder(config))
        if str(place) not in known:
            raise ValueError(f"'{place}' holds no weights of the {part}, and the cache was not filled from it before")
        return known[str(place)]
    return _hash(*(piece for file in files for piece in (file.name.encode(), *_pieces(file))))


def _commit(place: str) -> str:
    """Hub name and commit of a network, from its small config file."""
    name, _, folder = place.partition(":")
    file = "tokenizer_config.json" if folder == "tokenizer" else "config.json"
    parts = hub_file(name, file, subfolder=folder or None).parts
    return f"{place}@{parts[parts.index('snapshots') + 1]}"


def _pieces(file: Path) -> Iterable[bytes]:
    """The file's contents, or pieces of a large one."""
    size = file.stat().st_size
    yield size.to_bytes(8, "little")
    with file.open("rb") as opened:
        if size <= _WHOLE:
            while block := opened.read(2**22):
                yield block
            return
        for number in range(_PIECES):
            opened.seek(number * (size - _PIECE) // (_PIECES - 1))
            yield opened.read(_PIECE)


def _hash(*pieces: bytes) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for piece in pieces:
        digest.update(piece)
    return digest.hexdigest()
