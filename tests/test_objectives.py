"""What one step computes: laws of the losses, values worked out by hand, draws that depend on the sample alone."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from stable_cascade.diffusion.process import add_noise, target
from stable_cascade.diffusion.schedule import cosine_log_snr, cosine_t
from stable_cascade.diffusion.weighting import p2_weight
from stable_cascade.models.clip import TextEmbedder
from stable_cascade.objectives.contrast import TwoTowers, contrastive_loss
from stable_cascade.objectives.denoising import (
    ConditionedPrior,
    chosen,
    decoder_loss,
    denoising_loss,
    draw_log_snr,
    draw_noise,
    drop_captions,
    prior_loss,
    semantic_noise,
    shrink,
)
from stable_cascade.objectives.vqgan import (
    EncoderWithPreviewer,
    edge_loss,
    reconstruction_loss,
    semantic_encoder_loss,
)
from tests.tiny_cascade import tiny_decoder, tiny_parts, tiny_prior, tiny_text_encoder, tiny_tokenizer

SEEDS = torch.tensor([11, 12, 13, 14])
MANY = torch.arange(4000) * 7919 + 3
PARTS = tiny_parts()
TYPES = ["epsilon", "sample", "v_prediction", "flow"]


def pixels(count=4, height=32, width=32, seed=0):
    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(seed))


def constant(log_snr):
    return torch.ones_like(log_snr)


# ------------------------------------------------------------------------------------------------ denoising


@pytest.mark.parametrize("prediction_type", TYPES)
def test_perfect_prediction_has_no_loss(prediction_type):
    clean, noise = draw_noise(SEEDS + 50, (16, 3, 5)), draw_noise(SEEDS, (16, 3, 5))
    log_snr = draw_log_snr(SEEDS)
    terms = denoising_loss(
        lambda noised, ratio: target(prediction_type, clean, noise, log_snr), clean, noise, log_snr,
        weight=p2_weight, prediction_type=prediction_type,
    )  # fmt: skip
    assert torch.equal(terms["loss"], torch.zeros(4))


def test_loss_is_the_weighted_mean_square_per_sample():
    """Predicting all ones for noise that is all threes: squared error 4, P2 weight 1 / (1 + SNR)."""
    clean, noise = torch.zeros(2, 16, 2, 2), torch.full((2, 16, 2, 2), 3.0)
    log_snr = torch.tensor([0.0, math.log(3)])
    seen = {}

    def predict(noised, ratio):
        seen.update(noised=noised, ratio=ratio)
        return torch.ones_like(noised)

    terms = denoising_loss(predict, clean, noise, log_snr, weight=p2_weight)
    assert torch.allclose(terms["unweighted"], torch.tensor([4.0, 4.0]))
    assert torch.allclose(terms["loss"], torch.tensor([4 / 2, 4 / 4]))
    # Variance preserving: noise is scaled by sqrt(sigmoid(-log SNR)), here sqrt(1/2) and sqrt(1/4).
    assert torch.allclose(seen["noised"][:, 0, 0, 0], torch.tensor([3 * 0.5**0.5, 1.5]))
    assert torch.allclose(seen["ratio"], cosine_t(log_snr))
    assert torch.equal(terms["log_snr"], log_snr)


@pytest.mark.parametrize("share", [0.0, 0.05, 0.5, 1.0])
def test_events_happen_at_their_share(share):
    happened = chosen(MANY, "caption", share).float().mean().item()
    assert abs(happened - share) <= 3 * math.sqrt(share * (1 - share) / len(MANY))


def test_events_of_different_names_are_independent():
    one, other = chosen(MANY, "caption", 0.5).float(), chosen(MANY, "effnet", 0.5).float()
    assert abs(torch.corrcoef(torch.stack([one, other]))[0, 1]) < 0.05


def test_dropped_captions_are_empty_and_the_others_kept():
    captions = [f"image {number}" for number in range(len(MANY))]
    shown = drop_captions(captions, MANY, 0.1)
    assert {shown[i] for i in range(len(MANY)) if shown[i] != captions[i]} == {""}
    assert 0.08 < shown.count("") / len(MANY) < 0.12


def test_shift_lowers_log_snr_by_twice_its_logarithm():
    plain, shifted = draw_log_snr(MANY), draw_log_snr(MANY, shift=2.0)
    middle = (plain > -5) & (plain < 8)
    assert torch.allclose(shifted[middle], plain[middle] - 2 * math.log(2), atol=1e-4)
    # Without a shift half of the samples are noisier than log SNR at the middle of the cosine schedule.
    below = (plain < cosine_log_snr(torch.tensor([0.5]))).float().mean().item()
    assert abs(below - 0.5) < 0.03


@pytest.mark.parametrize("pyramid", [False, True])
def test_draws_depend_on_the_sample_alone(pyramid):
    whole = draw_noise(SEEDS, (4, 8, 8), offset=0.0 if pyramid else 0.1, pyramid=pyramid)
    parts = [draw_noise(part, (4, 8, 8), offset=0.0 if pyramid else 0.1, pyramid=pyramid) for part in SEEDS.split(2)]
    assert torch.equal(whole, torch.cat(parts))
    assert torch.equal(draw_log_snr(SEEDS), torch.cat([draw_log_snr(part) for part in SEEDS.split(1)]))


# ------------------------------------------------------------------------------------------------ Stage C


def prior_terms(model, places, **changes):
    captions = [f"a red {word}" for word in ("dog", "snail", "snails", "photo")]
    settings = {"weight": p2_weight, "caption_dropout": 0.5, "offset_noise": 0.1} | changes
    with torch.no_grad():
        clean = PARTS["semantic_encoder"](pixels()[places])
    return prior_loss(model, clean, captions[places], SEEDS[places], **settings)


def test_prior_loss_of_a_batch_is_that_of_its_parts():
    model = ConditionedPrior(tiny_prior(dropout=0.0), TextEmbedder(tiny_text_encoder(), tiny_tokenizer()))
    whole = prior_terms(model, slice(0, 4))
    parts = [prior_terms(model, places) for places in (slice(0, 2), slice(2, 4))]
    for name, value in whole.items():
        assert torch.allclose(value, torch.cat([part[name] for part in parts]), atol=1e-5), name
    assert not torch.equal(whole["loss"], prior_terms(model, slice(0, 4), caption_dropout=1.0)["loss"])


def test_prior_sees_noised_latents_text_and_image():
    """The loss recomputed from the pieces: encode, noise, predict, square, weight."""
    prior, encoder, tokenizer = tiny_prior(dropout=0.0), tiny_text_encoder(), tiny_tokenizer()
    image = torch.randn(4, 1, 24, generator=torch.Generator().manual_seed(5))
    terms = prior_terms(
        ConditionedPrior(prior, TextEmbedder(encoder, tokenizer)), slice(0, 4), caption_dropout=0.0,
        offset_noise=0.0, clip_img=image,
    )  # fmt: skip
    clean = PARTS["semantic_encoder"](pixels())
    noise, log_snr = draw_noise(SEEDS, tuple(clean.shape[1:])), draw_log_snr(SEEDS)
    words = tokenizer([f"a red {word}" for word in ("dog", "snail", "snails", "photo")], padding="max_length",
                      max_length=12, return_tensors="pt")  # fmt: skip
    text = encoder(**words, output_hidden_states=True)
    predicted = prior(
        add_noise(clean, noise, log_snr), cosine_t(log_snr), clip_text=text.hidden_states[-1],
        clip_text_pooled=text.text_embeds[:, None], clip_img=image,
    ).sample  # fmt: skip
    error = (predicted - noise).square().mean((1, 2, 3))
    assert torch.allclose(terms["loss"], error / (1 + log_snr.exp()), rtol=1e-4)


def test_masked_places_do_not_count():
    model = ConditionedPrior(tiny_prior(dropout=0.0), TextEmbedder(tiny_text_encoder(), tiny_tokenizer()))
    whole = prior_terms(model, slice(0, 2))["loss"]
    clean = PARTS["semantic_encoder"](pixels()[:2])
    assert torch.allclose(prior_terms(model, slice(0, 2), mask=torch.full_like(clean[:, :1], 0.3))["loss"], whole)
    left = torch.zeros_like(clean[:, :1])
    left[..., : clean.shape[-1] // 2] = 1
    halves = [prior_terms(model, slice(0, 2), mask=mask)["loss"] for mask in (left, 1 - left)]
    assert torch.allclose((halves[0] + halves[1]) / 2, whole, rtol=1e-5)
    assert not torch.allclose(halves[0], whole)


@pytest.mark.parametrize("build", [tiny_prior, tiny_decoder])
def test_no_two_gradients_share_memory(build):
    """If two did, adding to one or scaling one (accumulation, clipping) would change the other."""
    model = build(dropout=0.0).requires_grad_(True)
    given = {"clip_text_pooled": torch.ones(1, 1, 32)}
    given |= {"effnet": torch.ones(1, 16, 2, 2)} if build is tiny_decoder else {"clip_text": torch.ones(1, 12, 32)}
    model(torch.ones(1, model.config.in_channels, 8, 8), torch.ones(1), **given).sample.square().mean().backward()
    gradients = [parameter.grad for parameter in model.parameters()]
    assert all(gradient is not None for gradient in gradients)
    assert len({gradient.data_ptr() for gradient in gradients}) == len(gradients)


# ------------------------------------------------------------------------------------------------ Stage B


@pytest.mark.parametrize("interpolation", ["nearest", "bilinear"])
def test_shrunk_sides_are_multiples_of_the_stride(interpolation):
    image, heights = pixels(1, 96, 64), set()
    for step_seed in range(60):
        small = shrink(image, step_seed, stride=8, smallest=0.5, interpolation=interpolation)
        height, width = small.shape[-2:]
        assert height % 8 == width % 8 == 0
        assert 0.5 * 96 - 8 <= height <= 96
        assert 0.5 * 64 - 8 <= width <= 64
        assert 0 <= small.min()
        assert small.max() <= 1
        heights.add(height)
    assert heights >= {48, 56, 64, 72, 80, 88}
    assert shrink(pixels(1, 16, 16), 0, stride=8, smallest=0.01).shape[-1] >= 8


def test_every_part_of_a_global_batch_is_shrunk_alike():
    whole = shrink(pixels(), 77, stride=8, smallest=0.5)
    parts = [shrink(part, 77, stride=8, smallest=0.5) for part in pixels().split(2)]
    assert torch.equal(whole, torch.cat(parts))


def test_semantic_noise_has_a_strength_per_sample():
    noise = semantic_noise(MANY[:400], (16, 6, 6), 0.3)
    strengths = noise.flatten(1).std(1)
    assert strengths.max() < 0.33
    assert abs(strengths.mean().item() - 0.15) < 0.015
    assert torch.equal(noise[10:12], semantic_noise(MANY[10:12], (16, 6, 6), 0.3))
    assert not semantic_noise(SEEDS, (16, 6, 6), 0.0).any()


def decoder_terms(model, places, **changes):
    vqgan, captions = PARTS["vqgan"], ["red dog", "snail", "a photo", "snails"]
    tables = {caption: torch.full((1, 32), float(len(caption))) for caption in [*captions, ""]}
    settings = {
        "encode_vq": lambda x: vqgan.encode(x).latents / vqgan.config.scale_factor,
        "encode_semantic": PARTS["semantic_encoder"],
        "embed_text": lambda texts: torch.stack([tables[text] for text in texts]),
        "weight": constant, "stride": 8, "caption_dropout": 0.5, "effnet_dropout": 0.5, "effnet_noise": 0.2,
    } | changes  # fmt: skip
    return decoder_loss(model, pixels()[places], captions[places], SEEDS[places], 5, **settings)


def test_decoder_loss_of_a_batch_is_that_of_its_parts():
    model = tiny_decoder(dropout=0.0)
    whole = decoder_terms(model, slice(0, 4))
    parts = [decoder_terms(model, places) for places in (slice(0, 2), slice(2, 4))]
    for name, value in whole.items():
        assert torch.allclose(value, torch.cat([part[name] for part in parts]), atol=1e-5), name


def test_decoder_is_shown_what_the_settings_say():
    seen = []

    def model(noised, ratio, **conditions):
        seen.append(conditions)
        return (torch.zeros_like(noised),)

    decoder_terms(model, slice(0, 4), effnet_dropout=0.0, effnet_noise=0.0, caption_dropout=0.0, effnet_min_scale=1.0)
    decoder_terms(model, slice(0, 4), effnet_dropout=1.0, caption_dropout=1.0)
    whole, nothing = seen
    assert torch.allclose(whole["effnet"], PARTS["semantic_encoder"](pixels()), atol=1e-6)
    assert whole["clip_text_pooled"].flatten(1)[:, 0].tolist() == [7, 5, 7, 6]
    assert not nothing["effnet"].any()
    assert not nothing["clip_text_pooled"].any()


def test_decoder_that_predicts_zero_loses_the_noise():
    """Gaussian noise has mean square 1; the pyramid's is normalised to the same spread."""
    for pyramid in (False, True):
        terms = decoder_terms(lambda noised, *_, **__: (torch.zeros_like(noised),), slice(0, 4), pyramid=pyramid)
        assert torch.equal(terms["loss"], draw_noise(SEEDS, (4, 8, 8), pyramid=pyramid).square().mean((1, 2, 3)))


# ------------------------------------------------------------------------------------------------ autoencoders, CLIP


def test_reconstruction_loss_values():
    """An image that is off by a constant d loses d + d^2 and no edges; a column that is off has an edge."""
    image = torch.zeros(1, 3, 4, 4)
    assert torch.allclose(reconstruction_loss(image + 0.5, image), torch.tensor([0.75]))
    assert edge_loss(image + 0.5, image).item() == 0
    stripe = image.clone()
    stripe[..., 0] = 1.0
    assert torch.allclose(edge_loss(stripe, image), torch.tensor([1 / 3]))
    assert torch.allclose(reconstruction_loss(stripe, image, square=2.0, edges=0.3), torch.tensor([0.25 * 3 + 0.1]))
    assert reconstruction_loss(pixels(), pixels()).tolist() == [0, 0, 0, 0]


class FirstChannels(torch.nn.Module):
    """A previewer that shows the first three channels as they are."""

    def forward(self, latents):
        return F.interpolate(latents[:, :3], scale_factor=8)


def test_semantic_encoder_loss_has_noise_between_encoder_and_previewer():
    model = EncoderWithPreviewer(PARTS["semantic_encoder"], FirstChannels())
    still = semantic_encoder_loss(model, pixels(), SEEDS, stride=8, latent_noise=0.0)["loss"]
    rebuilt = FirstChannels()(PARTS["semantic_encoder"](pixels()))
    assert torch.allclose(still, reconstruction_loss(rebuilt, pixels(), square=2.0, edges=0.3), atol=1e-6)
    whole = semantic_encoder_loss(model, pixels(), SEEDS, stride=8)["loss"]
    parts = [semantic_encoder_loss(model, pixels()[i : i + 2], SEEDS[i : i + 2], stride=8)["loss"] for i in (0, 2)]
    assert torch.allclose(whole, torch.cat(parts), atol=1e-5)
    assert (whole - still).abs().min() > 1e-3


class Similar(torch.nn.Module):
    """A stand-in for both towers: the similarities it was given."""

    def __init__(self, similarity):
        super().__init__()
        self.similarity = similarity

    def forward(self, clip_pixels, captions):
        return self.similarity


def test_contrastive_loss_values():
    captions, sure = ["dog", "snail", "a photo"], 60 * torch.eye(3)
    assert torch.allclose(
        contrastive_loss(Similar(torch.zeros(3, 3)), None, captions)["loss"], torch.full((3,), math.log(3))
    )
    assert contrastive_loss(Similar(sure), None, captions)["loss"].max() < 1e-6
    known = torch.tensor([[2.0, 0.0, -1.0], [0.5, 1.0, 0.0], [0.0, 0.0, 3.0]])
    both = (
        F.cross_entropy(known, torch.arange(3), reduction="none"),
        F.cross_entropy(known.T, torch.arange(3), reduction="none"),
    )
    assert torch.allclose(contrastive_loss(Similar(known), None, captions)["loss"], (both[0] + both[1]) / 2)


def test_images_with_one_caption_are_right_answers_for_each_other():
    """With both images of a caption at both of its copies the loss is log 2; no better one exists."""
    captions = ["dog", "dog", "snail"]
    block = 60 * torch.tensor([[1.0, 1.0, 0.0], [1.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    loss = contrastive_loss(Similar(block), None, captions)["loss"]
    assert torch.allclose(loss, torch.tensor([math.log(2), math.log(2), 0.0]), atol=1e-5)
    apart = contrastive_loss(Similar(60 * torch.eye(3)), None, captions)["loss"]
    assert (apart[:2] > loss[:2]).all()


def test_two_towers_compare_normalised_embeddings():
    towers = TwoTowers(PARTS["text_encoder"], PARTS["image_encoder"], PARTS["tokenizer"])
    towers.text_encoder.text_projection = torch.nn.Linear(32, 24, bias=False)
    scores = towers(pixels(2), ["red dog", "a snail"])
    temperature = math.exp(2.659)
    assert scores.shape == (2, 2)
    assert scores.abs().max() <= temperature * 1.001
    again = towers(pixels(2), ["a snail", "red dog"])
    assert torch.allclose(scores, again.flip(1), atol=1e-4)
