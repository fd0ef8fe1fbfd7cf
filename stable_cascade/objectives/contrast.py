"""CLIP: images and their captions side by side, every other pair in the batch as a counterexample."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stable_cascade.models.clip import encode_prompts
from stable_cascade.transfer import to_device


class TwoTowers(nn.Module):
    """A text and an image encoder with a learned temperature.

    Source: Radford et al. 2021, figure 3.
    """

    def __init__(self, text_encoder: nn.Module, image_encoder: nn.Module, tokenizer: Any):
        super().__init__()
        self.text_encoder = text_encoder
        self.image_encoder = image_encoder
        self.tokenizer = tokenizer
        self.log_temperature = nn.Parameter(torch.tensor(2.659))

    def forward(self, clip_pixels: Tensor, captions: Sequence[str]) -> Tensor:
        """Scaled similarities of every image with every caption.

        Shapes: (B, 3, S, S) normalised pixels and B captions -> (B, B), row = image.
        """
        _, pooled, _ = encode_prompts(self.text_encoder, self.tokenizer, captions, clip_pixels.device)
        image = self.image_encoder(pixel_values=clip_pixels).image_embeds
        scale = self.log_temperature.exp().clamp(max=100)
        return scale * F.normalize(image.float(), dim=-1) @ F.normalize(pooled[:, 0].float(), dim=-1).T


def contrastive_loss(model: nn.Module, clip_pixels: Tensor, captions: Sequence[str]) -> dict[str, Tensor]:
    """Cross entropy both ways; pairs that share a caption count as right answers together.

    Shapes: (B, 3, S, S), B captions -> `loss` (B,).
    """
    similarity = model(clip_pixels, captions)
    index = {caption: number for number, caption in enumerate(dict.fromkeys(captions))}
    group = to_device(torch.tensor([index[caption] for caption in captions]), similarity.device)
    same = (group[:, None] == group[None, :]).float()
    wanted = same / same.sum(1, keepdim=True)
    by_image = F.cross_entropy(similarity, wanted, reduction="none")
    by_caption = F.cross_entropy(similarity.T, wanted, reduction="none")
    return {"loss": (by_image + by_caption) / 2}
