"""Samples from a Hugging Face dataset: of the hub, or of a local folder."""

from __future__ import annotations

import difflib
import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import numpy as np

from stable_cascade.hub import HubError, NotAskedError, ask

from .captions import check_caption
from .filters import Filter, apply_filters
from .images import IMAGE_EXTENSIONS, image_size
from .lanes import lane_count
from .samples import (
    IndexReport,
    SampleIndex,
    check_kept,
    check_masks,
    check_unreadable,
    content_hash,
    missing_captions,
    with_masks,
)
from .stream import HubColumns, SampleStream, StreamedRow, Watches, hash_of_row

log = logging.getLogger(__name__)


class HubSource:
    """Rows of a dataset that lies on this machine."""

    def __init__(self, name: str, dataset: Any, rows: np.ndarray, columns: HubColumns):
        self.name, self.dataset, self.rows, self.columns = name, dataset, rows, columns
        self._texts: Any = None

    def key(self, index: int) -> str:
        """`dataset/17`: the row's number in the dataset."""
        return f"{self.name}/{self.rows[index]}"

    def identity(self) -> bytes:
        """All names in their order."""
        return self.name.encode() + self.rows.astype("<i8").tobytes()

    def read(self, index: int) -> tuple[bytes, str]:
        """The image file and the caption ('' where there is none)."""
        row = self.dataset[int(self.rows[index])]
        return self.columns.image_file(row), self.columns.text(row) or ""

    def caption(self, index: int) -> str:
        """The caption alone."""
        if self.columns.caption not in self.dataset.column_names:
            return ""
        if self._texts is None:
            self._texts = self.dataset.select_columns([self.columns.caption])
        return self.columns.text(self._texts[int(self.rows[index])]) or ""

    def mask(self, index: int) -> bytes | None:
        """The mask's file; None where the row has none."""
        return self.columns.mask_file(self.dataset[int(self.rows[index])])


def index_dataset(
    dataset_name: str, columns: HubColumns, filters: Sequence[Filter], max_broken_share: float
) -> SampleIndex:
    """The index of a dataset; one pass reads every image's header.

    Raises:
        ValueError: it cannot be loaded, lacks a column, or holds nothing usable.
    """
    # Read every header once, undecoded.
    dataset = _open(dataset_name, streaming=False)
    needed = _check_columns(dataset_name, dataset.column_names, columns, filters)
    dataset = _undecoded(dataset.select_columns(needed), columns)
    found = [_header(row, columns) for row in dataset]
    sizes = np.array([header.size for header in found], np.int32).reshape(-1, 2)
    source = HubSource(short_name(dataset_name), dataset, np.arange(len(sizes)), columns)
    if not len(sizes):
        raise ValueError(f"dataset_name {dataset_name!r} has no rows")
    # Keep what is readable, passes the filters and has a caption.
    keep = sizes[:, 0] > 0
    broken = [f"{source.key(int(index))}: {found[int(index)].fault}" for index in np.flatnonzero(~keep)[:10]]
    unreadable = int((~keep).sum())
    check_unreadable(unreadable, len(sizes), broken, max_broken_share, f"mend the column {columns.image!r}")
    rejected: dict[str, int] = {}
    if filters:
        keep[keep], rejected = _filtered(dataset, filters, sizes, keep)
    check_kept(int(keep.sum()), len(sizes), rejected)
    uncaptioned = keep & ~np.array([header.captioned for header in found], bool)
    if uncaptioned.any() and not columns.allow_missing_captions:
        example = source.key(int(np.flatnonzero(uncaptioned)[0]))
        raise missing_captions(int(uncaptioned.sum()), int(keep.sum()), example, f"caption_column {columns.caption}")
    # Hash the content, and count masks where they are asked for.
    images, masks, texts = np.array([header.hashes for header in found], np.uint64).reshape(-1, 3)[keep].T
    masked = None
    if columns.mask is not None:
        masked = int((masks != 0).sum())
        check_masks(masked, int(keep.sum()), f"images to mask_column {columns.mask!r}")
    # Report what was left out, and keep only the columns that are read again.
    report = IndexReport(
        int(keep.sum()), 0, unreadable, tuple(broken), rejected, int(uncaptioned.sum()), masked=masked
    )
    if broken:
        log.warning("%s", report)
    source.rows = np.flatnonzero(keep)
    source.dataset = dataset.select_columns(_own_columns(dataset.column_names, columns))
    hashes = with_masks(images, masks)
    masked_loss = columns.mask is not None
    return SampleIndex(
        source, sizes[keep, 0], sizes[keep, 1], hashes, report, max_broken_share, masked_loss, text_hashes=texts
    )


class _Header(NamedTuple):
    """What one pass learns of a row: (0, 0) for an unreadable image; hashes of image, mask, caption (0: none)."""

    size: tuple[int, int]
    captioned: bool
    hashes: tuple[int, int, int]
    fault: str = ""


def _header(row: Mapping[str, Any], columns: HubColumns) -> _Header:
    text = columns.text(row)
    captioned, text_hash = text is not None, content_hash((text or "").encode("utf-8", "surrogatepass"))
    try:
        check_caption(text or "")
        data = columns.image_file(row)
        size = image_size(data) or (0, 0)
    except (ValueError, OSError) as error:
        return _Header((0, 0), captioned, (0, 0, 0), str(error))
    mask = columns.mask_file(row)
    mask_hash = 0 if mask is None else content_hash(mask)
    return _Header(size, captioned, (content_hash(data), mask_hash, text_hash))


def _filtered(
    dataset: Any, filters: Sequence[Filter], sizes: np.ndarray, readable: np.ndarray
) -> tuple[np.ndarray, dict[str, int]]:
    keys = [key for key in dict.fromkeys(item.key for item in filters) if key in dataset.column_names]
    values: Iterator[dict[str, Any]] = iter(dataset.select_columns(keys)) if keys else ({} for _ in sizes)
    rows = ((row, size) for row, size, fine in zip(values, sizes, readable, strict=True) if fine)
    keep, counts = apply_filters(filters, rows)
    return keep, {f"{item.key}: {item.expression.text}": n for item, n in zip(filters, counts, strict=True)}


def stream_dataset(
    dataset_name: str,
    columns: HubColumns,
    filters: Sequence[Filter],
    max_broken_share: float,
    *,
    lanes: int,
    shuffle_buffer: int,
) -> SampleStream:
    """The rows of a dataset, read while training, its shards shared out among the lanes.

    Raises:
        ValueError: it cannot be opened or lacks a column.
    """
    dataset, firsts = _in_lanes(_open(dataset_name, streaming=True), lanes)
    names = dataset.column_names
    if names is not None:  # some streams learn their columns from the first row
        dataset = dataset.select_columns(_check_columns(dataset_name, names, columns, filters))
        dataset = _undecoded(dataset, columns)
    name, shards = short_name(dataset_name), dataset.num_shards
    masks = columns.mask is not None
    source = HubLanes(name, dataset, columns, firsts)
    return SampleStream(source, shards, lanes, shuffle_buffer, max_broken_share, tuple(filters), masks)


_ROWS_OF_A_LANE = 100


def _in_lanes(dataset: Any, lanes: int) -> tuple[Any, Sequence[int]]:
    """A set on this machine as an iterable one of equal parts, and the first row of each; others as they are."""
    import datasets

    if not isinstance(dataset, datasets.Dataset):
        return dataset, ()
    count = lane_count(lanes, max(1, len(dataset) // _ROWS_OF_A_LANE))
    rows, more = divmod(len(dataset), count)
    return dataset.to_iterable_dataset(num_shards=count), [rows * lane + min(lane, more) for lane in range(count)]


@dataclass(frozen=True)
class HubLanes:
    """The lanes of a dataset, split by `datasets`; a cursor is the row's number and `state_dict`.

    The shuffle buffer is the stream's own, since `datasets` lets go of what its buffer holds when it resumes.
    """

    name: str
    dataset: Any
    columns: HubColumns
    firsts: Sequence[int] = ()
    """Number of each lane's first row, where the lanes are parts of a set on this machine."""

    def lane(self, lane: int, lanes: int, seed: int, cursor: Any, watches: Watches) -> Iterator[tuple[Any, Any]]:
        """A lane's usable rows from a cursor on, without end, each with the cursor after it."""
        number, state = cursor or (0, None)
        # Rows are known by their number in the set, where that is known, or by their number in the lane.
        prefix = f"{self.name}/" if lanes == 1 or self.firsts else f"{self.name}/{lane}-"
        first = self.firsts[lane] if self.firsts else 0
        while True:
            usable = number
            own = self.dataset.shard(num_shards=lanes, index=lane)
            if state is not None:
                own.load_state_dict(state)
            for values in own:
                row = self._row(f"{prefix}{first + number}", values, watches)
                number += 1
                if row is not None:
                    usable = 1
                    yield row, (number, own.state_dict())
            if not usable:
                watches.rejections.finish()
                raise ValueError(f"dataset_name {self.name!r} has no usable row")
            number, state = 0, None

    def _row(self, key: str, values: dict[str, Any], watches: Watches) -> StreamedRow | None:
        columns = self.columns
        if columns.image not in values:
            raise ValueError(f"image_column {columns.image!r} is no column of {self.name!r} ({', '.join(values)})")
        # Readable, with a caption of a bearable length.
        fault, data, size = "", b"", None
        try:
            data = columns.image_file(values)
            size = image_size(data)
            check_caption(columns.text(values) or "")
        except (ValueError, OSError) as error:
            fault = str(error)
        # It passes the filters and has a caption.
        if not watches.keeps(key, fault, values, size):
            return None
        assert size is not None
        caption = columns.text(values)
        if caption is None and not columns.allow_missing_captions:
            raise ValueError(
                f"{key} has no caption in caption_column {columns.caption!r}; name the right column, or set "
                "allow_missing_captions to train it with ''"
            )
        mask = columns.mask_file(values)
        files = (data,) if mask is None else (data, mask)
        hashed = hash_of_row(content_hash(data), content_hash(mask) if mask else 0)
        return StreamedRow(key, caption or "", *size, hashed, files=files)


def short_name(dataset_name: str) -> str:
    """The dataset's name in sample keys: the last part of a path or hub name."""
    return os.path.basename(os.path.normpath(dataset_name))


def _open(dataset_name: str, *, streaming: bool) -> Any:
    import datasets

    _refuse_pairs(dataset_name)
    # A saved dataset, a local folder, or a dataset of the Hub.
    saved = any(os.path.isfile(os.path.join(dataset_name, name)) for name in ("dataset_dict.json", "state.json"))
    try:
        if saved:
            loaded = datasets.load_from_disk(dataset_name)
        elif os.path.exists(dataset_name):
            loaded = datasets.load_dataset(dataset_name, streaming=streaming)
        else:
            loaded = ask(dataset_name, partial(_load, dataset_name, streaming), kind="dataset")
    except NotAskedError:
        raise
    except HubError as error:
        raise ValueError(f"dataset_name {dataset_name!r} cannot be loaded: {error}") from None
    except Exception as error:
        lines = str(error).strip().splitlines() or [""]
        raise ValueError(
            f"dataset_name {dataset_name!r} cannot be loaded ({type(error).__name__}: {lines[0]}); "
            "give a dataset of the hub or a local folder"
        ) from None
    # The split to train on.
    if isinstance(loaded, dict):
        split = "train" if "train" in loaded else next(iter(loaded))
        if split != "train" and len(loaded) > 1:
            raise ValueError(f"dataset_name {dataset_name!r} has no train split, only {', '.join(map(str, loaded))}")
        loaded = loaded[split]
    return loaded


def _load(name: str, streaming: bool, *, local_files_only: bool = False) -> Any:
    """A dataset of the Hub, or of its cache."""
    import datasets

    if local_files_only and streaming:
        raise ValueError("a stream needs the Hub")
    download = datasets.DownloadConfig(local_files_only=local_files_only)
    return datasets.load_dataset(name, streaming=streaming, download_config=download)


def _refuse_pairs(dataset_name: str) -> None:
    """Passes unless it is a folder of images with text files beside them, of which `datasets` reads one kind alone.

    Raises:
        ValueError: it is.
    """
    if not os.path.isdir(dataset_name):
        return
    for folder, _, names in os.walk(dataset_name):
        lower = {name.lower() for name in names}
        if any(name.rsplit(".", 1)[0] == "metadata" for name in lower):
            return
        stems = {name.rsplit(".", 1)[0] for name in lower if name.endswith(".txt")}
        pairs = [name for name in sorted(lower) if name.rsplit(".", 1)[-1] in IMAGE_EXTENSIONS]
        if any(name.rsplit(".", 1)[0] in stems for name in pairs):
            raise ValueError(
                f"dataset_name {dataset_name!r} is a folder of images with .txt files beside them, in {folder!r}; "
                f"make shards of it with `stable-cascade prepare {dataset_name} OUT`, and set webdataset_path: OUT"
            )


def _check_columns(
    dataset_name: str, names: Sequence[str], columns: HubColumns, filters: Sequence[Filter]
) -> list[str]:
    """The columns that are needed.

    Raises:
        ValueError: one of them is missing.
    """
    wanted = {"image_column": columns.image}
    if columns.mask is not None:
        wanted["mask_column"] = columns.mask
    if not columns.allow_missing_captions:
        wanted["caption_column"] = columns.caption
    for setting, name in wanted.items():
        if name not in names:
            near = difflib.get_close_matches(name, [other for other in names if other not in wanted.values()], n=1)
            hint = f"; nearest: {near[0]!r}" if near else ""
            raise ValueError(f"{setting} {name!r} is no column of {dataset_name!r} ({', '.join(names)}){hint}")
    filtered = [item.key for item in filters if item.key in names]
    return list(dict.fromkeys([*_own_columns(names, columns), *filtered]))


def _own_columns(names: Sequence[str], columns: HubColumns) -> list[str]:
    return [name for name in (columns.image, columns.caption, columns.mask) if name is not None and name in names]


def _undecoded(dataset: Any, columns: HubColumns) -> Any:
    """The dataset with image files in place of decoded images."""
    import datasets

    for name in (columns.image, columns.mask):
        if dataset.features and isinstance(dataset.features.get(name), datasets.Image):
            dataset = dataset.cast_column(name, datasets.Image(decode=False))
    return dataset
