"""Prompts to embeddings: the text of a call, and `encode_prompt` for whoever wants the embeddings themselves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from stable_cascade.models.prompt_windows import attended_tokens, encode_windows, prompt_windows

from .inputs import check_count, prompt_list, whole

Embedded = tuple[Tensor, Tensor]
"""Hidden states (B, L, D) and pooled text (B, 1, P)."""


class EncodePromptMixin:
    """`encode_prompt` for a pipeline that has a text encoder."""

    if TYPE_CHECKING:  # what the pipeline beside this mixin has

        def __getattr__(self, name: str) -> Any: ...

    @torch.no_grad()
    def encode_prompt(
        self,
        prompt: str | list[str],
        negative_prompt: str | list[str] | None = None,
        num_images_per_prompt: int = 1,
        weighted: bool = False,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        r"""`prompt_embeds`, `negative_prompt_embeds`, `prompt_embeds_pooled`, `negative_prompt_embeds_pooled`.

        Prompts of any length up to 20 windows of CLIP's 75 tokens; zeros fill up the shorter rows of a batch.

        Shapes: (B, L, D) twice, (B, 1, P) twice; B is prompts times `num_images_per_prompt`.

        Args:
            weighted: reads `(words:1.3)` and `(words)`; brackets that are text are written `\(`.

        Raises:
            ValueError: no text encoder, a prompt that is too long, or a mistake in the weights.
        """
        if isinstance(prompt, torch.device) or (isinstance(prompt, str) and isinstance(negative_prompt, int)):
            raise ValueError(
                "encode_prompt takes the prompt first here: encode_prompt(prompt, negative_prompt, "
                "num_images_per_prompt); docs/migration.md says what it returns"
            )
        prompts = prompt_list(prompt)
        negatives = prompt_list("" if negative_prompt is None else negative_prompt, "negative_prompt")
        if len(negatives) not in (1, len(prompts)):
            raise ValueError(
                f"negative_prompt has {len(negatives)} entries for {len(prompts)} prompts; give one, or one per prompt"
            )
        num_images_per_prompt = whole(num_images_per_prompt)
        check_count(num_images_per_prompt)
        if self.text_encoder is None:
            raise ValueError("encode_prompt needs a text_encoder, and this pipeline has none")
        negatives = negatives * len(prompts) if len(negatives) == 1 else negatives
        device = self._execution_device
        own, negative = encode_texts(self.text_encoder, self.tokenizer, prompts, negatives, device, weighted=weighted)
        assert own is not None
        assert negative is not None
        hidden, negative_hidden = same_length(own[0], negative[0])
        rows = (hidden, negative_hidden, own[1], negative[1])
        return tuple(row.repeat_interleave(num_images_per_prompt, dim=0) for row in rows)  # type: ignore[return-value]


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
