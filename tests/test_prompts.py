"""Long prompts in windows, weights of words, and rows of different lengths in one batch."""

from __future__ import annotations

import random

import pytest
import torch

from stable_cascade import StableCascadePipeline
from stable_cascade.models.blocks import attend
from stable_cascade.models.clip import (
    MOST_WINDOWS,
    attended_tokens,
    encode_prompts,
    encode_windows,
    prompt_windows,
    read_weights,
    tokenize,
)
from tests.tiny_cascade import MULTIPLE, tiny_parts

FAST = {"prior_num_inference_steps": 2, "num_inference_steps": 2, "output_type": "pt"}
PARTS = tiny_parts()
TOKENIZER, ENCODER = PARTS["tokenizer"], PARTS["text_encoder"]
ROOM = TOKENIZER.model_max_length - 2
SHORT, LONG, LONGER = "red dog", "a photo of a red dog " * 3, "snails of a red snail " * 6
KEYS = ("prompt_embeds", "prompt_embeds_pooled", "negative_prompt_embeds", "negative_prompt_embeds_pooled")


def seeds(*numbers):
    return [torch.Generator().manual_seed(number) for number in numbers]


@pytest.fixture(scope="module")
def pipeline():
    pipeline = StableCascadePipeline(**PARTS, resolution_multiple=MULTIPLE)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def windows_of(prompt, **settings):
    return [[token for token, _ in window] for window in prompt_windows(TOKENIZER, prompt, **settings)]


def embed(prompts, **settings):
    return encode_windows(ENCODER, TOKENIZER, [prompt_windows(TOKENIZER, one) for one in prompts], **settings)


def embeddings(pipeline, prompt, negative_prompt=None, **settings):
    return dict(zip(KEYS, encode(pipeline, prompt, negative_prompt, **settings), strict=True))


def encode(pipeline, prompt, negative_prompt=None, **settings):
    return pipeline.encode_prompt(prompt=prompt, negative_prompt=negative_prompt, **settings)


# Windows


@pytest.mark.parametrize("prompt", ["", SHORT, "Red  DOG, photo!", "snails " * ROOM])
def test_a_prompt_of_one_window_is_what_it_was(prompt):
    tokens = tokenize(TOKENIZER, [prompt])
    start, end = TOKENIZER.bos_token_id, TOKENIZER.eos_token_id
    (window,) = windows_of(prompt)
    length = int(tokens.attention_mask.sum())
    assert [start, *window, end] == tokens.input_ids[0, :length].tolist()
    hidden, pooled, _ = encode_prompts(ENCODER, TOKENIZER, [prompt, SHORT])
    found = embed([prompt, SHORT])
    assert torch.equal(torch.stack(found.hidden), hidden)
    assert torch.equal(found.pooled, pooled)


def test_no_token_is_lost_and_no_word_is_cut():
    prompt = "snail xyz red photograph dog " * 7
    windows = windows_of(prompt)
    whole = TOKENIZER(prompt, add_special_tokens=False).input_ids
    assert [token for window in windows for token in window] == whole
    assert len(windows) > 3
    assert all(len(window) <= ROOM for window in windows)
    for window in windows:
        assert TOKENIZER.convert_ids_to_tokens(window[-1]).endswith("</w>")


def test_the_last_token_that_fits_and_the_first_that_does_not():
    assert len(windows_of("dog " * ROOM)) == 1
    assert [len(window) for window in windows_of("dog " * (ROOM + 1))] == [ROOM, 1]


def test_a_word_longer_than_a_window_is_cut():
    windows = windows_of("dog " + "x" * (2 * ROOM + 3))
    assert [len(window) for window in windows] == [1, ROOM, ROOM, 3]


def test_a_learned_token_ends_a_word():
    from tests.tiny_cascade import tiny_tokenizer

    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["[ink]"])
    windows = prompt_windows(tokenizer, "[ink]" * (ROOM + 2))
    assert [len(window) for window in windows] == [ROOM, 2]


def test_twenty_windows_are_the_most():
    assert len(windows_of("dog " * (ROOM * MOST_WINDOWS))) == MOST_WINDOWS
    with pytest.raises(ValueError, match=r"needs 21 windows of 10 tokens; at most 20") as error:
        windows_of("dog " * (ROOM * MOST_WINDOWS + 1))
    assert "\n" not in str(error.value)


def test_each_window_is_encoded_as_a_prompt_of_its_own():
    first, second = "red " * ROOM, "snail dog"
    joined = embed([first + second]).hidden[0]
    apart = torch.cat(embed([first, second]).hidden)
    assert torch.allclose(joined, apart, atol=1e-6)
    assert torch.allclose(embed([first + second]).pooled, embed([first]).pooled, atol=1e-6)


def test_words_beyond_the_first_window_act(pipeline):
    one, two = (pipeline("red " * ROOM + word, generator=seeds(1), **FAST).images for word in ("dog", "snail"))
    assert not torch.allclose(one, two, atol=1e-3)


# A batch of prompts of different lengths


def test_an_image_does_not_depend_on_the_length_of_its_neighbours(pipeline):
    prompts, negatives = [SHORT, LONGER, LONG], ["", "", "photo " * (ROOM + 1)]
    together = pipeline(prompts, negative_prompt=negatives, generator=seeds(1, 2, 3), **FAST).images
    for i in range(3):
        alone = pipeline(prompts[i], negative_prompt=negatives[i], generator=seeds(i + 1), **FAST).images
        assert torch.allclose(together[i], alone[0], atol=1e-5), i


def test_zeros_at_the_end_of_a_row_are_padding():
    text = torch.randn(3, 6, 4, generator=seeds(0)[0])
    assert attended_tokens(text) is None
    text[0, 1:3] = 0  # not at the end
    text[1, 4:] = 0
    text[2] = 0  # no text at all
    expected = [[True] * 6, [True] * 4 + [False] * 2, [True] * 6]
    assert attended_tokens(text).tolist() == expected


@pytest.mark.parametrize("grad", [False, True])
def test_what_is_not_attended_to_might_as_well_not_be_there(grad):
    query, key, value = (torch.randn(2, 2, 7, 4, generator=generator) for generator in seeds(1, 2, 3))
    query.requires_grad_(grad)
    attended = torch.ones(2, 7, dtype=torch.bool)
    attended[1, 5:] = False
    mixed = attend(query, key, value, attended=attended)
    assert torch.allclose(mixed[0], attend(query, key, value)[0], atol=1e-6)
    assert torch.allclose(mixed[1], attend(query, key[:, :, :5], value[:, :, :5])[1], atol=1e-6)


def test_padded_text_of_the_prior_equals_shorter_text():
    prior = PARTS["prior"]
    noise, text, pooled = (torch.randn(1, *shape, generator=seeds(i)[0])
                           for i, shape in enumerate([(16, 6, 6), (24, 32), (1, 32)]))  # fmt: skip
    padded = torch.cat([text, torch.zeros_like(text)], dim=1)
    time = torch.tensor([0.5])
    expected = prior(noise, time, conditions=prior.encode_conditions(pooled, text)).sample
    actual = prior(noise, time, conditions=prior.encode_conditions(pooled, padded)).sample
    assert torch.allclose(actual, expected, atol=1e-5)
    unpadded = prior(noise, time, conditions=prior.encode_conditions(pooled, padded + 1e-6)).sample
    assert not torch.allclose(unpadded, expected, atol=1e-3)


# encode_prompt


def test_embeddings_of_a_prompt_give_its_image(pipeline):
    for prompts, negatives in ((SHORT, None), ([SHORT, LONGER], "snail"), ([LONG, SHORT], ["", LONGER])):
        count = len(prompts) if isinstance(prompts, list) else 1
        expected = pipeline(prompts, negative_prompt=negatives, generator=seeds(*range(count)), **FAST).images
        given = embeddings(pipeline, prompts, negatives)
        assert torch.equal(pipeline(**given, generator=seeds(*range(count)), **FAST).images, expected)


def test_shapes_and_order_of_the_embeddings(pipeline):
    length = TOKENIZER.model_max_length
    given = embeddings(pipeline, [SHORT, "dog " * (ROOM + 1)], "snail", num_images_per_prompt=2)
    assert [tuple(given[key].shape) for key in KEYS] == [(4, 2 * length, 32), (4, 1, 32)] * 2
    hidden, pooled, _ = encode_prompts(ENCODER, TOKENIZER, [SHORT, "snail", ""])
    assert torch.allclose(given["prompt_embeds"][:2, :length], hidden[:1], atol=1e-6)
    assert not given["prompt_embeds"][:2, length:].any()
    assert torch.allclose(given["prompt_embeds_pooled"][:2], pooled[:1], atol=1e-6)
    # A negative prompt grows with its prompt by windows of the empty prompt, and only then.
    negative = given["negative_prompt_embeds"]
    assert torch.allclose(negative[:, :length], hidden[1].expand(4, -1, -1), atol=1e-6)
    assert not negative[:2, length:].any()
    assert torch.allclose(negative[2:, length:], hidden[2].expand(2, -1, -1), atol=1e-6)
    assert torch.allclose(given["negative_prompt_embeds_pooled"], pooled[1].expand(4, 1, -1), atol=1e-6)


def test_half_of_the_embeddings_may_be_given(pipeline):
    whole = embeddings(pipeline, [SHORT, LONGER])
    expected = pipeline(**whole, generator=seeds(1, 2), **FAST).images
    own = {key: whole[key] for key in KEYS if not key.startswith("negative")}
    assert torch.allclose(pipeline(**own, generator=seeds(1, 2), **FAST).images, expected, atol=1e-5)
    against = embeddings(pipeline, [SHORT, SHORT])
    against = {key: against[key] for key in KEYS if key.startswith("negative")}
    images = pipeline([SHORT, LONGER], **against, generator=seeds(1, 2), **FAST).images
    assert torch.allclose(images[0], expected[0], atol=1e-5)
    assert images.isfinite().all()


@pytest.mark.parametrize("arguments, words", [
    ({"prompt": []}, "prompt is an empty list"),
    ({"prompt": 3}, "prompt is int"),
    ({"prompt": SHORT, "negative_prompt": ["", ""]}, "negative_prompt has 2 entries for 1 prompts"),
    ({"prompt": SHORT, "num_images_per_prompt": 0}, "num_images_per_prompt 0 is not a positive"),
    ({"prompt": "(" + SHORT, "weighted": True}, r"has a '\(' without its '\)'"),
    ({"prompt": "dog " * 500}, "needs 50 windows"),
])  # fmt: skip
def test_refusals(pipeline, arguments, words):
    with pytest.raises(ValueError, match=words) as error:
        pipeline.encode_prompt(**arguments)
    assert "\n" not in str(error.value)


# Weights


@pytest.mark.parametrize("prompt, pieces", [
    ("", [("", 1)]),
    ("a red dog", [("a red dog", 1)]),
    ("a (red) dog", [("a ", 1), ("red", 1.1), (" dog", 1)]),
    ("a ((red)) dog", [("a ", 1), ("red", 1.21), (" dog", 1)]),
    ("a (red:1.3) dog", [("a ", 1), ("red", 1.3), (" dog", 1)]),
    ("(a (red:1.5) dog:0.5)", [("a ", 0.5), ("red", 0.75), (" dog", 0.5)]),
    ("(red: 1.3 )", [("red", 1.3)]),
    ("(red:1) (dog:1.0)", [("red dog", 1)]),
    ("red: 12:30, [ink] style", [("red: 12:30, [ink] style", 1)]),
    (r"dog \(red\)", [("dog (red)", 1)]),
    (r"(12\:30:1.2) a\b\\", [("12:30", 1.2), (" a\\b\\", 1)]),
    ("(a: b (c))", [("a: b ", 1.1), ("c", 1.21)]),
    ("()(:2)x", [("x", 1)]),
])  # fmt: skip
def test_weights_are_read(prompt, pieces):
    found = read_weights(prompt)
    assert [text for text, _ in found] == [text for text, _ in pieces]
    assert [weight for _, weight in found] == pytest.approx([weight for _, weight in pieces])


@pytest.mark.parametrize("prompt, words", [
    ("(red dog", r"'\(' without"),
    ("red dog)", r"'\)' without"),
    ("red:1.3)", r"'\)' without"),
    ("((red) dog", r"'\(' without"),
    ("(red:big)", "weight 'big'"),
    ("(red:)", "weight ''"),
    ("(red:nan)", "weight 'nan'"),
    ("(red:inf)", "weight 'inf'"),
    ("(red:-1)", "weight '-1'"),
    ("(red:11)", "weight '11'"),
    ("((red:5):5)", "multiply to 25"),
    ("(" * 21 + "red" + ")" * 21, "more than 20 deep"),
])  # fmt: skip
def test_mistakes_in_weights_are_named(prompt, words):
    with pytest.raises(ValueError, match=words) as error:
        read_weights(prompt)
    assert "\n" not in str(error.value)


def test_any_text_is_read_or_refused_in_one_line():
    rng = random.Random(0)
    for _ in range(2000):
        prompt = "".join(rng.choice("()()::\\.19 ab\n") for _ in range(rng.randrange(20)))
        message = ""
        try:
            pieces = read_weights(prompt)
        except ValueError as error:
            pieces, message = [], str(error)
        assert "\n" not in message
        assert all(0 <= weight <= 10 for _, weight in pieces)


def test_weight_one_changes_no_bit(pipeline):
    plain = encode(pipeline, [SHORT, LONG], "snail")
    marked = encode(pipeline, ["(red:1) (dog:1.0)", LONG], "(snail:1)", weighted=True)
    assert all(torch.equal(one, two) for one, two in zip(plain, marked, strict=True))


@pytest.mark.parametrize("weight", [0.0, 0.5, 1.6])
def test_a_weight_moves_the_hidden_state_away_from_the_empty_prompt(pipeline, weight):
    """`dog` is token 2 after the start; nothing else moves, nor does the pooled text."""
    plain, pooled, negative, _ = encode(pipeline, SHORT)
    moved, same, still, _ = encode(pipeline, f"red (dog:{weight})", weighted=True)
    expected = plain.clone()
    expected[0, 2] = negative[0, 2] + weight * (plain[0, 2] - negative[0, 2])
    assert torch.allclose(moved, expected, atol=1e-5)
    assert torch.allclose(still, negative, atol=1e-6)
    assert torch.allclose(same, pooled, atol=1e-6)
    others = [i for i in range(moved.shape[1]) if i != 2]
    assert torch.allclose(moved[0, others], plain[0, others], atol=1e-6)


def test_weights_reach_the_second_window(pipeline):
    prompt = "red " * ROOM + "dog"
    plain = encode(pipeline, prompt)[0]
    moved = encode(pipeline, "red " * ROOM + "(dog:2)", weighted=True)[0]
    far = (moved - plain).abs().amax(-1)[0]
    assert far.argmax() == TOKENIZER.model_max_length + 1
    assert far.sum() - far.max() < 1e-4


def test_heavier_words_change_the_image_more():
    """On the embedded cascade: Stage C's latents leave the unweighted ones the further, the heavier a word is."""
    from stable_cascade.embedded import embedded_path

    trained = StableCascadePipeline.from_pretrained(embedded_path(), torch_dtype=torch.float32)
    trained.set_progress_bar_config(disable=True)
    settings = {"preview": True, "output_type": "latent", "prior_num_inference_steps": 6}
    prompt = "(red:{}) apple, flat style"
    drawn = [
        trained(**embeddings(trained, prompt.format(weight), weighted=True), generator=seeds(1), **settings).images
        for weight in (1.0, 1.2, 1.5, 2.0)
    ]
    far = [(latents - drawn[0]).norm().item() for latents in drawn]
    assert far[0] < far[1] < far[2] < far[3]
