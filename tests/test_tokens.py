"""Learned tokens: which rows train, what they start from, and that a file brings them back."""

from __future__ import annotations

import json
import logging

import pytest
import torch
from torch import nn

from stable_cascade.adapters import (
    LearnedTokens,
    add_learned_tokens,
    add_lora,
    add_token_rows,
    read_learned_embeds,
    save_lora,
)
from stable_cascade.adapters.tokens import restart_rows
from stable_cascade.models.clip import encode_prompts
from tests.golden import entry, fill_value, tensors
from tests.tiny_cascade import tiny_text_encoder, tiny_tokenizer


def row_of(encoder, tokenizer, token):
    return encoder.get_input_embeddings()(torch.tensor([tokenizer.get_vocab()[token]]))[0]


def test_golden_lookup():
    recipe = entry("io_lora")["fill"]["token_embedding"]
    table = fill_value(recipe["key"], tuple(recipe["shape"]), recipe)
    lora = tensors("ckpt_lora")
    indices = lora["embeddings.indices"]
    tokens = {str(index): index for index in indices.tolist()}
    learned = LearnedTokens(table, tokens, table[indices] + lora["embeddings.embeddings"])
    data = tensors("io_lora")
    assert (learned(data["in.token_ids"]) - data["out.token_embeddings"]).abs().max() <= 1e-6
    assert (learned.merged()(data["in.token_ids"]) - data["out.token_embeddings"]).abs().max() <= 1e-6


def test_new_token_starts_as_the_mean_of_what_the_regex_matches():
    tokenizer, encoder = tiny_tokenizer(), tiny_text_encoder()
    table = encoder.get_input_embeddings().weight.clone()
    vocabulary = tokenizer.get_vocab()
    learned = add_learned_tokens(tokenizer, encoder, [["[fernando]", "^dog</w>"], ["<slug>", "^snail"]])
    assert list(learned.tokens) == ["[fernando]", "<slug>"]
    assert torch.equal(row_of(encoder, tokenizer, "[fernando]"), table[vocabulary["dog</w>"]])
    found = [vocabulary[token] for token in vocabulary if token.startswith("snail")]
    assert len(found) >= 2
    assert torch.allclose(row_of(encoder, tokenizer, "<slug>"), table[found].mean(0))
    assert len(tokenizer("a photo of [fernando]").input_ids) == len(tokenizer("a photo of dog").input_ids)
    assert encoder.config.vocab_size == len(tokenizer) == learned.num_embeddings


def test_bare_regex_trains_existing_rows():
    tokenizer, encoder = tiny_tokenizer(), tiny_text_encoder()
    before, size = encoder.get_input_embeddings().weight.clone(), len(tokenizer)
    learned = add_learned_tokens(tokenizer, encoder, [["^snail", None]])
    assert len(tokenizer) == size
    assert set(learned.tokens) == {token for token in tokenizer.get_vocab() if token.startswith("snail")}
    assert torch.equal(learned(torch.arange(size)), before)


def test_no_match_is_zeros_with_a_warning_and_null_without(caplog):
    tokenizer, encoder = tiny_tokenizer(), tiny_text_encoder()
    with caplog.at_level(logging.WARNING):
        learned = add_learned_tokens(tokenizer, encoder, [["[one]", "^zebra"], ["[two]", None]])
    assert not learned.rows.any()
    assert len(caplog.records) == 1
    assert "[one]" in caplog.text


def test_only_the_rows_train_and_gradients_reach_them():
    tokenizer, encoder = tiny_tokenizer(), tiny_text_encoder()
    learned = add_learned_tokens(tokenizer, encoder, [["[fernando]", "^dog</w>"], ["^snail", None]])
    trainable = [name for name, parameter in encoder.named_parameters() if parameter.requires_grad]
    assert trainable == ["text_model.embeddings.token_embedding.rows"]
    hidden, pooled, _ = encode_prompts(encoder, tokenizer, ["a photo of [fernando]", "red"])
    (hidden.square().mean() + pooled.square().mean()).backward()
    touched = learned.rows.grad.abs().sum(1) > 0
    assert touched.tolist() == [token == "[fernando]" for token in learned.tokens]


def test_lora_beside_tokens_keeps_the_rows_trainable(tmp_path):
    tokenizer, encoder = tiny_tokenizer(), tiny_text_encoder()
    add_learned_tokens(tokenizer, encoder, [["[fernando]", "^dog</w>"]])
    add_lora(encoder, module_filters=["q_proj"], rank=2)
    kinds = {name.rsplit(".", 1)[-1] if "lora_" not in name else "lora"
             for name, parameter in encoder.named_parameters() if parameter.requires_grad}  # fmt: skip
    assert kinds == {"rows", "lora"}
    save_lora(tmp_path, text_encoder=encoder)
    names = {file.name for file in tmp_path.iterdir()}
    assert names == {"pytorch_lora_weights.safetensors", "learned_embeds.safetensors"}


@pytest.mark.parametrize("width", [32, 64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_are_float32_in_any_width_and_dtype(width, dtype):
    tokenizer, encoder = tiny_tokenizer(), tiny_text_encoder(hidden_size=width).to(dtype)
    learned = add_learned_tokens(tokenizer, encoder, [["[fernando]", "^dog</w>"]])
    assert learned.rows.dtype == torch.float32
    assert learned.rows.shape == (1, width)
    hidden, _, _ = encode_prompts(encoder, tokenizer, ["[fernando]"])
    assert hidden.dtype == dtype
    hidden.float().sum().backward()
    assert learned.rows.grad.isfinite().all()


def test_file_brings_new_and_existing_rows_back(tmp_path):
    tokenizer, encoder = tiny_tokenizer(), tiny_text_encoder()
    learned = add_learned_tokens(tokenizer, encoder, [["[fernando]", "^dog</w>"], ["^snail", None]])
    with torch.no_grad():
        learned.rows.add_(torch.randn(learned.rows.shape, generator=torch.Generator().manual_seed(0)))
    caption = ["a photo of [fernando]", "snails"]
    wanted = encode_prompts(encoder, tokenizer, caption)
    save_lora(tmp_path, text_encoder=encoder)

    tokenizer, encoder = tiny_tokenizer(), tiny_text_encoder()
    embeds = read_learned_embeds(tmp_path / "learned_embeds.safetensors")
    assert all(row.shape == (32,) and row.dtype == torch.float32 for row in embeds.values())
    add_token_rows(tokenizer, encoder, embeds)
    assert isinstance(encoder.get_input_embeddings(), nn.Embedding)
    for found, expected in zip(encode_prompts(encoder, tokenizer, caption), wanted, strict=True):
        assert torch.equal(found, expected)


def test_one_token_file_loads_in_diffusers(tmp_path):
    from diffusers.loaders import TextualInversionLoaderMixin

    tokenizer, encoder = tiny_tokenizer(), tiny_text_encoder()
    learned = add_learned_tokens(tokenizer, encoder, [["[fernando]", "^dog</w>"]])
    save_lora(tmp_path, text_encoder=encoder)

    class Theirs(TextualInversionLoaderMixin):
        components: dict = {}
        hf_device_map = None
        tokenizer, text_encoder = tiny_tokenizer(), tiny_text_encoder()

    Theirs().load_textual_inversion(tmp_path, weight_name="learned_embeds.safetensors")
    index = Theirs.tokenizer.get_vocab()["[fernando]"]
    assert torch.equal(Theirs.text_encoder.get_input_embeddings().weight[index], learned.rows[0])


def test_training_can_go_on_from_its_own_tokens():
    tokenizer, encoder = tiny_tokenizer(), tiny_text_encoder()
    add_token_rows(tokenizer, encoder, {"[fernando]": torch.full((32,), 0.5)})
    learned = add_learned_tokens(tokenizer, encoder, [["[fernando]", "^dog</w>"]])
    assert (learned.rows == 0.5).all()


def test_pooled_text_stays_at_the_end_with_an_old_eos_id():
    """Configs with eos_token_id 2 pool at the highest id, which would be the new token."""
    captions = ["a photo of [fernando]"]
    pooled = []
    for eos in (2, None):
        tokenizer = tiny_tokenizer()
        encoder = tiny_text_encoder(eos_token_id=eos or tokenizer.eos_token_id)
        add_learned_tokens(tokenizer, encoder, [["[fernando]", "^dog</w>"]])
        pooled.append(encode_prompts(encoder, tokenizer, captions)[1])
    assert torch.equal(*pooled)


def test_original_deltas_need_the_entries_of_the_training():
    tokenizer, encoder = tiny_tokenizer(), tiny_text_encoder()
    vocabulary = tokenizer.get_vocab()
    table = encoder.get_input_embeddings().weight
    red, new = vocabulary["red</w>"], len(tokenizer)
    deltas = {red: torch.ones(32), new: torch.full((32,), 2.0)}
    with pytest.raises(ValueError, match=r"1 new token.*train_tokens names 0"):
        restart_rows(tokenizer, encoder, deltas, None)
    rows = restart_rows(tokenizer, encoder, deltas, [["^red", None], ["[fernando]", "^dog</w>"]])
    assert torch.allclose(rows["red</w>"], table[red] + 1)
    assert torch.allclose(rows["[fernando]"], table[vocabulary["dog</w>"]] + 2)


@pytest.mark.parametrize("train_tokens, message", [
    ([["^zebra", None]], "matches no token of the vocabulary; nearest"),
    ([["[a]", "(dog"]], r"regex '\(dog' is invalid"),
    ([["[a]"]], "is not \\[token, regex or null\\]"),
    (["[a]"], "is not \\[token, regex or null\\]"),
    ([["[a]", 3]], "is not \\[token, regex or null\\]"),
])  # fmt: skip
def test_refusals_are_one_line(train_tokens, message):
    with pytest.raises(ValueError, match=message) as caught:
        add_learned_tokens(tiny_tokenizer(), tiny_text_encoder(), train_tokens)
    assert "\n" not in str(caught.value)


def test_rows_of_another_text_encoder_are_refused():
    with pytest.raises(ValueError, match="width 1280, this text encoder has 32"):
        add_token_rows(tiny_tokenizer(), tiny_text_encoder(), {"[fernando]": torch.zeros(1280)})


@pytest.mark.parametrize("nothing", [None, []])
def test_nothing_to_train_is_none(nothing):
    encoder = tiny_text_encoder()
    assert add_learned_tokens(tiny_tokenizer(), encoder, nothing) is None
    assert isinstance(encoder.get_input_embeddings(), nn.Embedding)


def test_encoder_with_learned_rows_still_saves_and_loads(tmp_path):
    from transformers import CLIPTextModelWithProjection

    tokenizer, encoder = tiny_tokenizer(), tiny_text_encoder()
    learned = add_learned_tokens(tokenizer, encoder, [["[fernando]", "^dog</w>"]])
    encoder.set_input_embeddings(learned.merged())
    encoder.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["vocab_size"] == len(tokenizer)
    again = CLIPTextModelWithProjection.from_pretrained(tmp_path)
    loaded = type(tokenizer).from_pretrained(tmp_path)
    expected = encode_prompts(encoder, tokenizer, ["[fernando]"])[0]
    assert torch.equal(encode_prompts(again, loaded, ["[fernando]"])[0], expected)
