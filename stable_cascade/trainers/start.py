"""The start of a training in each of its processes: the accelerator, and a last look at folders and captions."""

from __future__ import annotations

from typing import Any

import numpy as np

from stable_cascade import factory
from stable_cascade.adapters import tokens_of
from stable_cascade.data import SampleIndex, SampleStream
from stable_cascade.training.processes import broadcast
from stable_cascade.training.run_folders import check_run_folders
from stable_cascade.training.tracking import check_launch, make_accelerator
from stable_cascade.wording import quoted

LOOKED_AT, LOOKED_AT_REMOTELY = 10_000, 256
"""Captions that are read before a training; from a remote shard each is a request of its own."""


def start(config: Any, plan: str, index: SampleIndex | SampleStream, *, may_idle: bool = False) -> Any:
    """The accelerator of this process; prints the plan and what there is to train on.

    What would stop the training later stops it here, before weights are read: a launch that contradicts the config, a
    run folder that cannot be written to or is in use, a stream that the processes cannot share, tokens that no caption
    contains.

    Args:
        may_idle: some of what trains takes no part in some steps, which several processes have to expect.

    Raises:
        ValueError: as `check_launch`, `check_run_folders`, `SampleStream.check_processes` and `caption_facts`.
    """
    # Start the accelerator and check that it agrees with the config.
    options: dict[str, Any] = {}
    if may_idle:
        from accelerate import DistributedDataParallelKwargs

        options["kwargs_handlers"] = [DistributedDataParallelKwargs(find_unused_parameters=True)]
    accelerator = make_accelerator(config, **options)
    check_launch(config, accelerator)
    # The main process checks folders and captions; all stop if it finds a mistake.
    lines, error = [plan], ""
    if accelerator.is_main_process:
        try:
            check_run_folders(config)
            if isinstance(index, SampleStream):
                index.check_processes(accelerator.num_processes)
            lines.append(f"data            {data_entry(config, index)}")
        except ValueError as found:
            error = str(found)
    if error := broadcast(accelerator, error):
        raise ValueError(error)
    lines.append(f"processes       {accelerator.num_processes}, this one on {accelerator.device}")
    accelerator.print("\n".join(lines))
    return accelerator


def data_entry(config: Any, index: SampleIndex | SampleStream) -> str:
    """What there is to train on, as the plan says it.

    Raises:
        ValueError: as `caption_facts`.
    """
    if isinstance(index, SampleStream):
        return str(index)
    return "\n                ".join([str(index.report), *caption_facts(config, index)])


def caption_facts(config: Any, index: SampleIndex | SampleStream) -> list[str]:
    """Lines for the plan: in how many captions each learned token is, and how many are longer than the encoder reads.

    Of large sets a part is looked at, evenly spread; a stream is not read ahead of the training.

    Raises:
        ValueError: no caption contains one of the tokens, so that it could not learn.
    """
    if not isinstance(index, SampleIndex) or not hasattr(config, "clip_text_model_name"):
        return []
    # The tokenizer, with the tokens that are learned.
    tokenizer, encoder = factory.text_encoder_on_meta(config)
    entries = getattr(config, "train_tokens", None) or []
    if entries:
        factory.learned_tokens(config, tokenizer, encoder)
    # Count them in the captions, and the captions that are too long.
    subjects = index.subjects
    captions, whole = _captions(index, subjects)
    ids = tokenizer(captions, truncation=False, padding=False)["input_ids"] if captions else []
    among = f"{len(captions):,} captions" + ("" if whole else f" looked at, of {subjects:,}")
    lines = [_share(tokenizer, entry, ids, among, whole) for entry in entries]
    longest = tokenizer.model_max_length
    cut = sum(len(one) > longest for one in ids)
    if cut:
        lines.append(f"{cut:,} of {among} are cut: the text encoder reads {longest - 2} tokens, the longest has "
                     f"{max(map(len, ids)) - 2}")  # fmt: skip
    return lines


def _share(tokenizer: Any, entry: Any, ids: list[list[int]], among: str, whole: bool) -> str:
    """In how many captions one entry of `train_tokens` is.

    Raises:
        ValueError: in none, and all were looked at.
    """
    names = tokens_of(tokenizer, entry)
    wanted = set(tokenizer.convert_tokens_to_ids(names))
    count = sum(not wanted.isdisjoint(one) for one in ids)
    name = names[0] if len(names) == 1 else quoted(entry[0])
    line = f"{name} is in {count:,} of {among}"
    if whole and not count:
        raise ValueError(
            f"train_tokens: {line}, so it would not learn; write it into the captions as train_tokens has it"
        )
    return line


def _captions(index: SampleIndex, subjects: int) -> tuple[list[str], bool]:
    """Captions of the first `subjects` samples, and whether they are all; unreadable ones count as ''."""
    remote = any("://" in place for place in getattr(index.source, "locations", ()))
    limit = LOOKED_AT_REMOTELY if remote else LOOKED_AT
    numbers = np.unique(np.linspace(0, subjects - 1, min(limit, subjects)).round().astype(int))
    captions = []
    for number in numbers.tolist():
        try:
            captions.append(index.caption(number))
        except (ValueError, OSError):
            captions.append("")
    return captions, len(numbers) == subjects
