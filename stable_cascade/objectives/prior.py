"""Stage C: predict the noise in semantic latents from text and, sometimes, an embedded image or a control image."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor, nn

from stable_cascade.objectives.denoising import LossTerms, chosen, denoising_loss, draw_log_snr, draw_noise
from stable_cascade.transfer import to_device

EmbedText = Callable[[Sequence[str]], tuple[Tensor, Tensor]]
"""B captions -> hidden states (B, L, D) and pooled text (B, 1, P)."""


class ConditionedPrior(nn.Module):
    """The prior with what makes its conditions in front of it, as one module to wrap, train and shard.

    Args:
        prior: Stage C, perhaps with adapters.
        text: captions -> embeddings. A module (`TextEmbedder`) where something in it trains; otherwise a function, so
            that what only serves is neither wrapped, sharded nor saved.
        controlnet: makes residuals for the prior from a control image.
    """

    def __init__(self, prior: nn.Module, text: EmbedText | nn.Module, controlnet: nn.Module | None = None):
        super().__init__()
        self.prior = prior
        self.text = text
        self.controlnet = controlnet

    def train(self, mode: bool = True) -> ConditionedPrior:
        """Training mode, except for parts in which nothing trains: a frozen prior gets no dropout."""
        super().train(mode)
        for part in self.children():
            if not any(parameter.requires_grad for parameter in part.parameters()):
                part.eval()
        return self

    def forward(
        self,
        noised: Tensor,
        timestep_ratio: Tensor,
        captions: Sequence[str],
        clip_img: Tensor | None,
        control: Tensor | None = None,
    ) -> Tensor:
        """The prior's prediction.

        Shapes: noised (B, 16, h, w), timestep_ratio (B,), B captions, clip_img (B, 1, D), control (B, c, H, W) ->
        (B, 16, h, w).
        """
        hidden, pooled = self.text(list(captions))
        residuals = self.controlnet(control) if self.controlnet is not None else None
        return self.prior(
            noised, timestep_ratio, clip_text_pooled=pooled, clip_text=hidden, clip_img=clip_img, control=residuals,
            return_dict=False,
        )[0]  # fmt: skip


def prior_loss(
    model: nn.Module,
    clean: Tensor,
    captions: Sequence[str],
    seeds: Tensor,
    *,
    weight: Callable[[Tensor], Tensor],
    clip_img: Tensor | None = None,
    control: Tensor | None = None,
    mask: Tensor | None = None,
    prediction_type: str = "epsilon",
    offset_noise: float = 0.0,
    caption_dropout: float = 0.05,
    shift: float = 1.0,
) -> LossTerms:
    """One step of training Stage C, with or without adapters or a ControlNet.

    Shapes: clean (B, 16, h, w), B captions, seeds (B,) -> loss terms (B,).

    Args:
        model: a `ConditionedPrior`, perhaps wrapped for distributed training.
        clip_img: image embeddings (B, 1, D), zero for the samples that go without.
        control: control images (B, c, H, W).
        mask: weights (B, 1, h, w) of the places of a sample.
    """
    noise = to_device(draw_noise(seeds, tuple(clean.shape[1:]), offset=offset_noise), clean.device)
    log_snr = to_device(draw_log_snr(seeds, shift=shift), clean.device)
    shown = drop_captions(captions, seeds, caption_dropout)
    conditions = (shown, clip_img) if control is None else (shown, clip_img, control)
    return denoising_loss(
        lambda noised, ratio: model(noised, ratio, *conditions),
        clean,
        noise,
        log_snr,
        weight=weight,
        prediction_type=prediction_type,
        mask=mask,
    )


def drop_captions(captions: Sequence[str], seeds: Tensor, share: float) -> list[str]:
    """The captions, a random `share` of them empty: what classifier-free guidance needs."""
    dropped = chosen(seeds, "caption", share).tolist()
    return ["" if drop else caption for caption, drop in zip(captions, dropped, strict=True)]
