"""The images of a config: their index, and the batches of every process."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from stable_cascade.data import (
    Batch,
    ImageSet,
    Plan,
    SampleIndex,
    SampleStream,
    index_samples,
    joined,
    training_batches,
    with_regularization,
)
from stable_cascade.data.images import in_unit_range
from stable_cascade.data.stream import StreamState
from stable_cascade.training.processes import gathered


def samples(config: Any) -> SampleIndex | SampleStream:
    """The index of the training images; broken shards and filters end here, before any weight is read.

    Several sets become one index. Those for regularisation are joined to it whole: masks and filters belong to the
    subject's.
    """
    # Plain shards of a list are one set together, each data set and each mapping is a set of its own.
    key = "dataset_name" if config.dataset_name else "webdataset_path"
    value = getattr(config, key)
    entries = value if isinstance(value, list) else [value]
    plain = [entry for entry in entries if isinstance(entry, str)]
    together = [plain] if plain and key == "webdataset_path" else plain
    sets = [{"path": path} for path in together] + [entry for entry in entries if not isinstance(entry, str)]
    # Index each, and join them.
    loss_weight = getattr(config, "prior_loss_weight", 1.0)
    found = []
    for entry in sets:
        aside = bool(entry.get("regularization"))
        index = _index(config, key, entry["path"], aside=aside)
        found.append(ImageSet(
            index, entry.get("weight"), entry.get("repeats", 1.0), entry.get("caption_prefix", ""), aside,
            loss_weight if aside else 1.0,
        ))  # fmt: skip
    alone = len(found) == 1 and not found[0].caption_prefix and not found[0].regularization
    try:
        whole = found[0].index if alone else joined(found)
    except ValueError as error:
        raise ValueError(f"{key}: {error}") from None
    # Images of the class under a key of their own.
    if not getattr(config, "regularization_path", None):
        return whole
    if not alone:
        raise ValueError(
            f"regularization_path is set beside several sets; make it an entry of {key}: "
            "{path: …, regularization: true}"
        )
    others = _index(config, "webdataset_path", config.regularization_path, aside=True)
    return with_regularization(whole, others, share=config.regularization_share, weight=loss_weight)


def _index(config: Any, key: str, place: Any, *, aside: bool) -> SampleIndex | SampleStream:
    """The index of one set; images for regularisation have neither filters nor masks."""
    # Several sets and a cache need random access.
    value = getattr(config, key)
    several = isinstance(value, list) and any(not isinstance(entry, str) for entry in value)
    needed = aside or several or getattr(config, "cache", False) or getattr(config, "regularization_path", None)
    streaming = False if needed and config.streaming == "auto" else config.streaming
    return index_samples(
        place if key == "webdataset_path" else None,
        dataset_name=place if key == "dataset_name" else None,
        image_column=config.image_column,
        caption_column=config.caption_column,
        streaming=streaming,
        stream_lanes=config.stream_lanes,
        shuffle_buffer=config.shuffle_buffer,
        dataset_filters=None if aside else config.dataset_filters,
        captions_getter=config.captions_getter,
        max_broken_share=config.max_broken_share,
        cache_dir=config.cache_dir,
        allow_missing_captions=config.allow_missing_captions,
        masks=getattr(config, "masked_loss", False) and not aside,
        mask_column=getattr(config, "mask_column", "mask"),
    )


def content(index: SampleIndex | SampleStream) -> dict[str, Any] | None:
    """What a checkpoint remembers of the samples; None of a stream, which nobody knows before it was read."""
    return index.content if isinstance(index, SampleIndex) else None


def batches(
    config: Any,
    index: SampleIndex | SampleStream,
    accelerator: Any,
    *,
    factor: int,
    decode: bool = True,
    known_broken: Collection[str] = (),
) -> Callable[..., Iterator[Batch]]:
    """Start step -> this process's micro-batches from there on, without end.

    Of a stream, the second argument is what all processes' `Batch.after.plain()` were at the end of the step before.

    Args:
        factor: pixels per latent along a side.
        decode: whether the batches have pixels.
        known_broken: keys of samples that are replaced untried.

    Raises:
        ValueError: the processes found different images.
    """
    check_agreement(index, accelerator)
    plan = make_plan(config, factor=factor, accelerator=accelerator, known_broken=known_broken)

    def from_step(start_step: int, after: Sequence[Mapping[str, Any]] | None = None) -> Iterator[Batch]:
        return training_batches(
            index,
            plan,
            start_step=start_step,
            after=StreamState.merged(map(StreamState.of, after)) if after else None,
            num_workers=config.num_workers,
            decode=decode,
            **loading_for(accelerator.device),
        )

    return from_step


def make_plan(config: Any, *, factor: int, accelerator: Any, known_broken: Collection[str] = ()) -> Plan:
    """What the config's steps show, and this process's part of it; `factor` and `known_broken` as in `batches`."""
    return Plan(
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
        crops_per_image=config.crops_per_image,
        known_broken=frozenset(known_broken),
    )


def loading_for(device: torch.device) -> dict[str, bool]:
    """How batches are loaded for a device: for a CUDA device as bytes in page-locked memory, which `shown` moves."""
    return {"as_stored": device.type == "cuda", "pin_memory": device.type == "cuda"}


def check_agreement(index: SampleIndex | SampleStream, accelerator: Any) -> None:
    """Passes when every process has the same index: they share out its positions without talking to each other.

    Raises:
        ValueError: a shard was skipped in one process and not in another.
    """
    if isinstance(index, SampleStream) or accelerator.num_processes == 1:  # hashing all names takes a while
        return
    if len(set(gathered(accelerator, index.fingerprint))) > 1:
        raise ValueError(
            "webdataset_path: the processes found different images, so a shard failed in some of them only; start "
            "again when all can read it"
        )


def shown(batch: Batch, device: torch.device) -> Tensor:
    """The batch's pixels on the device.

    They travel as stored, bytes mostly, while the host goes on, and become floats there.

    Shapes: -> (B, 3, H, W) float32 in [0, 1].
    """
    assert batch.pixels is not None
    return in_unit_range(batch.pixels.to(device, non_blocking=True))
