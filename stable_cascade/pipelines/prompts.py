"""From the prompt arguments of a call to embedded text, rows of different lengths side by side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from stable_cascade.models.clip import attended_tokens, clip_pixels, encode_windows, prompt_windows

from .call import check_count, prompt_list, to_pixels, whole
from .sampling import Text, repeat_text

Embedded = tuple[Tensor, Tensor]
"""Hidden states (B, L, D) and pooled text (B, 1, P)."""


def encode_texts(
    text_encoder: Any,
    tokenizer: Any,
    prompts: Sequence[str],
    negatives: Sequence[str],
    device: torch.device,
    *,
    weighted: bool = False,
    windows: Sequence[int] | None = None,
) -> tuple[Embedded | None, Embedded | None]:
    """The embedded prompts and negative prompts, None for an empty list.

    What a prompt becomes depends on nothing but its text. A negative prompt gets windows of the empty prompt until it
    has as many as its prompt, so that guidance compares texts and not lengths.

    Args:
        windows: the prompts' windows, where they come embedded already.
    """
    own = [prompt_windows(tokenizer, prompt, weighted=weighted) for prompt in prompts]
    against = [prompt_windows(tokenizer, prompt, weighted=weighted) for prompt in negatives]
    counts = [len(one) for one in own] if own else list(windows or [1] * len(against))
    missing = [max(0, count - len(one)) for count, one in zip(counts, against, strict=False)]
    encoded = encode_windows(text_encoder, tokenizer, own + against, device, with_empty=any(missing))
    hidden = encoded.hidden
    for place, more in enumerate(missing, start=len(own)):
        if more:
            assert encoded.empty is not None
            hidden[place] = torch.cat([hidden[place], *[encoded.empty] * more])
    parts = slice(None, len(own)), slice(len(own), None)
    first, second = ((stacked(hidden[part]), encoded.pooled[part]) if hidden[part] else None for part in parts)
    return first, second


def window_counts(hidden: Tensor, tokenizer: Any) -> list[int]:
    """How many windows the rows of given embeddings span, zeros at their end left out."""
    attended = attended_tokens(hidden)
    lengths = [hidden.shape[1]] * len(hidden) if attended is None else attended.sum(1).tolist()
    return [-(-length // tokenizer.model_max_length) for length in lengths]


def stacked(rows: Sequence[Tensor]) -> Tensor:
    """Rows of different lengths as one batch, zeros after the shorter ones. Shapes: (L_i, D) each -> (B, L, D)."""
    longest = max(len(row) for row in rows)
    return torch.stack([F.pad(row, (0, 0, 0, longest - len(row))) for row in rows])


def same_length(one: Tensor, two: Tensor) -> tuple[Tensor, Tensor]:
    """Two batches with zeros after the shorter one. Shapes: (B, L, D), (B, M, D) -> twice (B, max(L, M), D)."""
    length = max(one.shape[1], two.shape[1])
    first, second = (part if part.shape[1] == length else F.pad(part, (0, 0, 0, length - part.shape[1]))
                     for part in (one, two))  # fmt: skip
    return first, second


@dataclass(frozen=True)
class PromptArguments:
    """What a caller may say about the text; checked when made.

    Raises:
        ValueError: nothing or two things given for one role, half of a pair, or lengths that differ.
    """

    prompt: str | list[str] | None = None
    negative_prompt: str | list[str] | None = None
    prompt_embeds: Tensor | None = None
    prompt_embeds_pooled: Tensor | None = None
    negative_prompt_embeds: Tensor | None = None
    negative_prompt_embeds_pooled: Tensor | None = None
    pooled_only: bool = False

    def __post_init__(self) -> None:
        self._check_role("", self.prompt, self.prompt_embeds, self.prompt_embeds_pooled)
        if self.prompt is None and self.prompt_embeds_pooled is None:
            raise ValueError("prompt is missing; give prompt, or prompt_embeds with prompt_embeds_pooled")
        pooled = self.negative_prompt_embeds_pooled
        self._check_role("negative_", self.negative_prompt, self.negative_prompt_embeds, pooled)
        for name, value in (("negative_prompt", self.negative_prompt), ("negative_prompt_embeds_pooled", pooled)):
            length = 1 if value is None or isinstance(value, str) else len(value)
            if length not in (1, self.count):
                raise ValueError(f"{name} has {length} entries for {self.count} prompts; give one, or one per prompt")

    def _check_role(self, sign: str, prompt: Any, embeds: Tensor | None, pooled: Tensor | None) -> None:
        if prompt is not None:
            prompt_list(prompt, f"{sign}prompt")
            if embeds is not None or pooled is not None:
                raise ValueError(f"{sign}prompt and {sign}prompt_embeds are both given; give one of them")
        elif (embeds is None) != (pooled is None) and not (self.pooled_only and pooled is not None):
            raise ValueError(f"{sign}prompt_embeds and {sign}prompt_embeds_pooled go together; give both")
        elif embeds is not None and pooled is not None and len(embeds) != len(pooled):
            raise ValueError(f"{sign}prompt_embeds has {len(embeds)} rows, {sign}prompt_embeds_pooled {len(pooled)}")

    def prompts(self) -> list[str]:
        """The prompts as a list; empty where embeddings are given."""
        return [] if self.prompt is None else prompt_list(self.prompt)

    @property
    def count(self) -> int:
        """Number of prompts."""
        return len(self.prompts()) or len(self.prompt_embeds_pooled)  # type: ignore[arg-type]

    def for_count(self, count: int) -> PromptArguments:
        """The same text, one prompt repeated for `count` images.

        Raises:
            ValueError: neither one prompt nor `count` of them.
        """
        if self.count == count:
            return self
        if self.count != 1:
            raise ValueError(f"prompt has {self.count} entries for {count} images; give one, or one per image")
        if self.prompt is not None:
            return replace(self, prompt=self.prompts() * count)
        given = (self.prompt_embeds, self.prompt_embeds_pooled)
        hidden, pooled = (None if rows is None else rows.repeat_interleave(count, dim=0) for rows in given)
        return replace(self, prompt_embeds=hidden, prompt_embeds_pooled=pooled)

    def negatives(self) -> list[str]:
        """One negative prompt per prompt, empty where none is given."""
        given = prompt_list(self.negative_prompt if self.negative_prompt is not None else "", "negative_prompt")
        return given * self.count if len(given) == 1 else given


class EncodePromptMixin:
    """`encode_prompt` for a pipeline that has a text encoder."""

    if TYPE_CHECKING:  # what the pipeline beside this mixin has

        def __getattr__(self, name: str) -> Any: ...

    @torch.no_grad()
    def encode_prompt(
        self,
        device: torch.device | str | None = None,
        batch_size: int | None = None,
        num_images_per_prompt: int = 1,
        do_classifier_free_guidance: bool = True,
        prompt: str | list[str] | None = None,
        negative_prompt: str | list[str] | None = None,
        prompt_embeds: Tensor | None = None,
        prompt_embeds_pooled: Tensor | None = None,
        negative_prompt_embeds: Tensor | None = None,
        negative_prompt_embeds_pooled: Tensor | None = None,
        weighted: bool = False,
    ) -> tuple[Tensor | None, Tensor, Tensor | None, Tensor | None]:
        r"""`prompt_embeds`, `prompt_embeds_pooled`, `negative_prompt_embeds`, `negative_prompt_embeds_pooled`.

        Arguments and result are those of diffusers' method; `encode_prompt(prompt=…)` is enough. Prompts of any length
        up to 20 windows of CLIP's 75 tokens; zeros fill up the shorter rows of a batch.

        Shapes: (B, L, D), (B, 1, P), the same again; B is prompts times `num_images_per_prompt`.

        Args:
            device: for the embeddings, by default the pipeline's.
            batch_size: to how many rows one prompt is repeated; by default the number of prompts.
            do_classifier_free_guidance: False leaves the negative ones None.
            prompt_embeds, prompt_embeds_pooled, negative_prompt_embeds, negative_prompt_embeds_pooled: taken as they
                are in place of a text.
            weighted: reads `(words:1.3)` and `(words)`; brackets that are text are written `\(`.

        Raises:
            ValueError: no text encoder, a prompt that is too long, or a mistake in the weights.
        """
        # diffusers has two orders of arguments; only one can be recognised.
        if isinstance(device, list) or (isinstance(device, str) and prompt is None and prompt_embeds is None):
            raise ValueError(
                "encode_prompt begins with device and batch_size, as in diffusers; name the prompt: prompt=…"
            )
        # Check and encode.
        arguments = PromptArguments(
            prompt, negative_prompt, prompt_embeds, prompt_embeds_pooled, negative_prompt_embeds,
            negative_prompt_embeds_pooled, pooled_only=True,
        )  # fmt: skip
        arguments = arguments if batch_size is None else arguments.for_count(whole(batch_size))
        copies = whole(num_images_per_prompt)
        check_count(copies)
        text = encode(
            arguments, self.text_encoder, self.tokenizer, torch.device(device or self._execution_device),
            guided=do_classifier_free_guidance, copies=copies, weighted=weighted,
        )  # fmt: skip
        return text.hidden, text.pooled, text.negative_hidden, text.negative_pooled


def encode(
    arguments: PromptArguments,
    text_encoder: Any,
    tokenizer: Any,
    device: torch.device,
    *,
    guided: bool,
    copies: int = 1,
    weighted: bool = False,
) -> Text:
    """The text of a call, one row per image; rows of different lengths end in zeros, which nothing attends to.

    Raises:
        ValueError: something has to be encoded and the pipeline has no text encoder; a prompt is too long.
    """
    # What there is to encode, beside embeddings that are given.
    to_negate = guided and arguments.negative_prompt_embeds_pooled is None
    prompts, negatives = arguments.prompts(), arguments.negatives() if to_negate else []
    if (prompts or negatives) and text_encoder is None:
        raise ValueError("this pipeline has no text_encoder; give prompt_embeds and negative_prompt_embeds")
    given: tuple[Any, Any] = arguments.prompt_embeds, arguments.prompt_embeds_pooled
    negative: tuple[Any, Any] = None, None
    if guided:
        negative = arguments.negative_prompt_embeds, arguments.negative_prompt_embeds_pooled
    # Encode prompts and negative prompts at once, in as many windows.
    if prompts or negatives:
        hidden = _row(given[0], arguments.count, device)
        windows = None if hidden is None else window_counts(hidden, tokenizer)
        own, against = encode_texts(
            text_encoder, tokenizer, prompts, negatives, device, weighted=weighted, windows=windows
        )
        given, negative = own or given, against or negative
    # One row per image, all of one length.
    hidden, pooled, negative_hidden, negative_pooled = (
        _row(row, arguments.count, device) for row in (*given, *negative)
    )
    if hidden is not None and negative_hidden is not None:
        hidden, negative_hidden = same_length(hidden, negative_hidden)
    return repeat_text(Text(hidden, pooled, negative_hidden, negative_pooled), copies)  # type: ignore[arg-type]


def embed_images(images: Any, image_encoder: Any, device: torch.device, *, count: int) -> Tensor:
    """CLIP's embeddings of the reference images, the same for every one of `count` images.

    Shapes: n images -> (count, n, D).

    Raises:
        ValueError: the pipeline has no image encoder.
    """
    if image_encoder is None:
        raise ValueError("images need an image_encoder, and this pipeline has none; give image_embeds")
    images = list(images) if isinstance(images, list | tuple) else [images]
    size = image_encoder.config.image_size
    pixels = torch.cat([clip_pixels(to_pixels(image), size) for image in images])
    embeds = image_encoder(pixel_values=pixels.to(device, image_encoder.dtype)).image_embeds
    return embeds[None].expand(count, -1, -1)


def _row(row: Tensor | None, count: int, device: torch.device) -> Tensor | None:
    """Given embeddings on the device, one row per prompt; pooled ones may come without the middle axis."""
    if row is None:
        return None
    row = row[:, None] if row.ndim == 2 else row
    return row.to(device).expand(count, -1, -1) if len(row) == 1 else row.to(device)
