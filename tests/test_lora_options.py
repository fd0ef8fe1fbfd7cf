"""What makes a good LoRA: layers and ranks, rates, the text encoder, regularisation, masks, and all of it together."""

from __future__ import annotations

import json

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from stable_cascade import StableCascadePriorPipeline, StableCascadeScheduler, factory
from stable_cascade.adapters import add_lora, load_lora, lora_ranks, save_lora
from stable_cascade.adapters.injection import lora_scales_of
from stable_cascade.config import LoraConfig, load_config
from stable_cascade.data import index_samples
from stable_cascade.objectives.denoising import ConditionedPrior, prior_loss
from tests.making_shards import batches_of, encoded, image, write_tar
from tests.test_lora import predict, randomise
from tests.tiny_cascade import MULTIPLE, tiny_prior
from tests.trainer_runs import (
    LORA,
    SIZES,
    settings,
    tensors,
    train,
    trainer_main,
    write_cascade,
    write_config,
    write_images,
)

QUICK = {"num_preview_images": 0, "updates": 3, "multi_aspect_ratio": None}
TEXT = {"train_text_encoder": True, "text_encoder_rank": 3}


@pytest.fixture(scope="module")
def cascade(tmp_path_factory):
    folder = write_cascade(tmp_path_factory.mktemp("cascade"), dropout=0.0)
    write_images(folder / "images.tar")
    return folder


def config_of(tmp_path, cascade, **changes) -> LoraConfig:
    path = write_config(tmp_path / "run.yaml", settings("lora", tmp_path, cascade, **QUICK | changes))
    return load_config(LoraConfig, ["--config", str(path)])


def same(one, other) -> bool:
    first, second = tensors(one), tensors(other)
    return first.keys() == second.keys() and all(torch.equal(value, second[name]) for name, value in first.items())


# --- layers and ranks


def test_excludes_and_ranks_by_layer():
    prior = tiny_prior()
    layers = add_lora(
        prior, module_filters=[".attn", ".channelwise"], module_excludes=["to_k", "down_blocks.0.0"], rank=2,
        rank_pattern={"up_blocks": 4, "to_q": 8}, lora_alpha=1,
    )  # fmt: skip
    assert layers
    assert not any("to_k" in name or "down_blocks.0.0" in name for name in layers)
    for name, rank in lora_ranks(prior).items():
        assert rank == (8 if "to_q" in name else 4 if "up_blocks" in name else 2), name
    assert set(lora_ranks(prior)) == set(layers)
    assert set(lora_scales_of(prior).values()) == {0.5}


def test_the_original_names_serve_too():
    prior = tiny_prior()
    layers = add_lora(
        prior, module_filters=[".attn"], module_excludes=["out_proj"], rank=2, rank_pattern={"in_proj": 3}
    )
    assert {name.rpartition(".")[2] for name in layers} == {"to_q", "to_k", "to_v"}
    assert set(lora_ranks(prior).values()) == {3}


@pytest.mark.parametrize("lora_alpha", [None, 6.0])
def test_ranks_and_scales_come_back_from_the_file(tmp_path, lora_alpha):
    prior = tiny_prior()
    add_lora(prior, module_filters=[".attn"], rank=2, rank_pattern={"up_blocks": 5}, lora_alpha=lora_alpha)
    randomise(prior)
    save_lora(tmp_path, prior=prior)
    with safe_open(tmp_path / LORA, "pt") as handle:
        values = json.loads(handle.metadata()["lora_adapter_metadata"])
    assert set(values["prior.rank_pattern"].values()) == {5}
    other = tiny_prior()
    load_lora(other, tmp_path)
    assert lora_ranks(other) == lora_ranks(prior)
    assert lora_scales_of(other) == lora_scales_of(prior)
    assert torch.equal(predict(other), predict(prior))
    by_diffusers = tiny_prior()
    by_diffusers.load_lora_adapter(tmp_path, prefix="prior", adapter_name="default", weight_name=LORA)
    assert torch.equal(predict(by_diffusers), predict(prior))


REFUSED = [
    ({"module_excludes": ["to_x"]}, r"module_excludes \['to_x'\] match none of the 16 layers chosen; nearest: '.to_"),
    ({"module_excludes": [".attn"]}, "leave none of the 16 layers"),
    ({"rank_pattern": {"channelwise": 8}}, "rank_pattern 'channelwise' matches none of the 16 layers chosen; nearest"),
    ({"rank_pattern": {"to_q": 0}}, "rank_pattern 'to_q': 0 is not a positive whole number"),
]


@pytest.mark.parametrize("options, message", REFUSED)
def test_refused_layers(options, message):
    with pytest.raises(ValueError, match=message) as caught:
        add_lora(tiny_prior(), module_filters=[".attn"], rank=2, **options)
    assert "\n" not in str(caught.value)


def test_going_on_from_a_file_wants_its_ranks_and_scale(tmp_path, cascade):
    changes = {**QUICK, "rank_pattern": {"up_blocks": 4}, "module_excludes": ["to_k"], "lora_alpha": 3.0}
    first = train("lora", tmp_path, cascade, **changes)
    again = {**changes, "lora_checkpoint_path": str(first), "experiment_id": "again", "lr": 0.0}
    assert same(train("lora", tmp_path, cascade, **again), first)
    with pytest.raises(ValueError, match=r"differs from .*rank_pattern \{'up_blocks': 5\}.* in 'up_blocks"):
        factory.add_config_lora(
            config_of(tmp_path, cascade, **again | {"rank_pattern": {"up_blocks": 5}}), tiny_prior()
        )
    with pytest.raises(ValueError, match=r"has the scale 1\.5 there, 1 here; set lora_alpha: 3"):
        factory.add_config_lora(config_of(tmp_path, cascade, **again | {"lora_alpha": 2.0}), tiny_prior())


def test_check_tells_layers_by_rank(tmp_path, cascade, capsys):
    changes = {"rank_pattern": {"to_q": 8}, "train_text_encoder": True, "token_lr": 1e-3, **QUICK}
    config = write_config(tmp_path / "run.yaml", settings("lora", tmp_path, cascade, **changes))
    trainer_main("lora")(["--config", str(config), "--check"])
    (line,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("adapters")]
    assert "parameters in 16 layers (rank 2: 12, rank 8: 4), " in line
    assert "1,024 in 8 of the text encoder (rank 2: 8), token rows [fox]" in line


# --- rates


def test_rates_by_name(tmp_path, cascade):
    assert factory.learning_rate(config_of(tmp_path, cascade)) is None
    rate = factory.learning_rate(config_of(tmp_path, cascade, token_lr=0.5, text_encoder_lr=0.25, lr=1.0, **TEXT))
    names = ["prior.a.lora_A.default.weight", "text.text_encoder.b.lora_B.default.weight", "text.text_encoder.c.rows"]
    assert [rate(name) for name in names] == [1.0, 0.25, 0.5]
    only = factory.learning_rate(config_of(tmp_path, cascade, text_encoder_lr=0.25, lr=1.0, **TEXT))
    assert [only(name) for name in names] == [1.0, 0.25, 1.0]


@pytest.mark.slow
def test_a_rate_of_zero_leaves_that_part_alone(tmp_path, cascade):
    changes = {**QUICK, **TEXT, "weight_decay": 0.0, "lr": 0.01}
    started = tensors(train("lora", tmp_path, cascade, **changes | {"lr": 0.0}))
    for part, key in (("learned_embeds", "token_lr"), (f"{LORA}:text_encoder.", "text_encoder_lr")):
        held = tensors(train("lora", tmp_path, cascade, experiment_id=key, **changes, **{key: 0.0}))
        moved = {name for name, value in held.items() if not torch.equal(value, started[name])}
        assert not any(name.startswith(part) for name in moved)
        others = {"learned_embeds", f"{LORA}:text_encoder.", f"{LORA}:prior."} - {part}
        assert all(any(name.startswith(other) for name in moved) for other in others)


# --- the text encoder


def trained_model(config, final) -> ConditionedPrior:
    """The composed model of a run with the weights of its last checkpoint."""
    prior = factory.network(config, "prior").requires_grad_(False)
    factory.add_config_lora(config, prior)
    text = factory.trainable_text(config) or factory.frozen_text(config, torch.device("cpu"))
    model = ConditionedPrior(prior, text).eval()
    (checkpoint,) = final.parent.glob("step-*")
    weights = load_file(checkpoint / "weights.safetensors")
    assert weights.keys() == {name for name, value in model.named_parameters() if value.requires_grad}
    model.load_state_dict(weights, strict=False)
    return model


@pytest.mark.parametrize("tokens", [[["[fox]", "^dog</w>"]], pytest.param(None, marks=pytest.mark.slow)])
def test_the_exported_text_encoder_draws_as_the_trained_one(tmp_path, cascade, tokens):
    changes = {**QUICK, **TEXT, "train_tokens": tokens, "lr": 0.02}
    final = train("lora", tmp_path, cascade, **changes)
    values = load_file(final / LORA)
    ups = {name: value for name, value in values.items() if name.startswith("text_encoder.") and "lora_B" in name}
    assert len(ups) == 8
    # Keys' biases apart, every factor got a gradient through the whole prior; the last layer's values at least.
    assert all(value.abs().max() > 0 for name, value in ups.items() if "v_proj" in name or "out_proj" in name)
    model = trained_model(config_of(tmp_path, cascade, **changes), final)
    request = {"prompt": "a [fox] photo", "num_inference_steps": 3, "height": 64, "width": 64}

    def draw(pipeline) -> torch.Tensor:
        pipeline.set_progress_bar_config(disable=True)
        return pipeline(**request, generator=torch.Generator().manual_seed(0)).image_embeddings

    trained = StableCascadePriorPipeline(
        tokenizer=model.text.tokenizer, text_encoder=model.text.text_encoder, prior=model.prior,
        scheduler=StableCascadeScheduler(shift=2.0), resolution_multiple=MULTIPLE,
    )  # fmt: skip
    tokenizer, encoder = factory.text_encoder(config_of(tmp_path, cascade))
    loaded = StableCascadePriorPipeline(
        tokenizer=tokenizer, text_encoder=encoder, prior=factory.network(config_of(tmp_path, cascade), "prior"),
        scheduler=StableCascadeScheduler(shift=2.0), resolution_multiple=MULTIPLE,
    )  # fmt: skip
    plain = draw(loaded)
    loaded.load_lora_weights(final)
    assert (draw(loaded) - draw(trained)).abs().max() < 1e-5
    assert (draw(loaded) - plain).abs().max() > 1e-3
    loaded.unload_lora_weights()
    assert torch.equal(draw(loaded), plain)


def test_text_encoder_training_resumes_to_the_same_bits(tmp_path, cascade):
    changes = {**QUICK, **TEXT, "updates": 4, "lora_dropout": 0.2, "text_encoder_lr": 1e-4, "token_lr": 1e-2,
               "text_encoder_module_filters": ["q_proj", "fc1"], "ema_beta": 0.5}  # fmt: skip
    whole = train("lora", tmp_path, cascade, **changes)
    assert any("fc1" in name for name in load_file(whole / LORA))
    train("lora", tmp_path, cascade, experiment_id="parts", **changes | {"updates": 2})
    assert same(train("lora", tmp_path, cascade, experiment_id="parts", **changes), whole)


def test_going_on_with_the_text_encoder(tmp_path, cascade):
    changes = {**QUICK, **TEXT}
    first = train("lora", tmp_path, cascade, **changes)
    again = {**changes, "lora_checkpoint_path": str(first), "experiment_id": "again", "lr": 0.0}
    assert same(train("lora", tmp_path, cascade, **again), first)
    without = config_of(tmp_path, cascade, **again | {"train_text_encoder": False, "text_encoder_rank": None})
    with pytest.raises(ValueError, match="adapters for the text encoder too; set train_text_encoder: True"):
        factory.add_config_lora(without, tiny_prior())
    _, encoder = factory.text_encoder(without)
    with pytest.raises(ValueError, match=r"text_encoder_rank 4, rank 2.* in .*q_proj|differs from"):
        factory.add_config_text_lora(config_of(tmp_path, cascade, **again | {"text_encoder_rank": 4}), encoder)


# --- regularisation, masks


def class_images(path, seed: int, count: int = 8):
    members = {}
    for number in range(count):
        members[f"{number:03}.png"] = image(*SIZES[number % len(SIZES)], seed=seed + number)
        members[f"{number:03}.txt"] = "a photo of dog"
    return str(write_tar(path, members))


def test_regularisation_of_weight_zero_is_none(tmp_path, cascade):
    """Whatever its images show, the same is learned; with a weight they matter."""
    one, other = class_images(tmp_path / "one.tar", 100), class_images(tmp_path / "other.tar", 300)
    finals = [
        train("lora", tmp_path, cascade, experiment_id=f"run{number}", **QUICK, regularization_path=path,
              prior_loss_weight=weight)
        for number, (path, weight) in enumerate([(one, 0.0), (other, 0.0), (one, 1.0)])
    ]  # fmt: skip
    assert same(finals[0], finals[1])
    assert not same(finals[0], finals[2])


def shaded(path, shade: int, caption: str) -> str:
    """A shard of plain images near one shade."""
    members = {}
    for number in range(8):
        members[f"{number:03}.png"] = encoded(Image.new("RGB", (32, 32), (shade, shade + 3 * number, shade)))
        members[f"{number:03}.txt"] = caption
    return str(write_tar(path, members))


def loss_on(config, final, shard) -> float:
    """The mean loss on a shard's images after a training, under fixed noise and times."""
    model, encoder = trained_model(config, final), factory.frozen(config, "semantic_encoder", torch.device("cpu"))
    stream = batches_of(index_samples(shard), image_size=32, batch_size=64, seed=5, bucket_factor=encoder.stride)
    batch = next(stream)
    with torch.no_grad():
        clean = encoder(batch.pixels).float()
        plain = {"weight": torch.ones_like, "caption_dropout": 0.0, "prediction_type": config.prediction_type}
        return prior_loss(model, clean, batch.captions, batch.seeds, **plain)["loss"].mean().item()


@pytest.mark.slow
def test_regularisation_keeps_the_class(tmp_path, cascade):
    """White images are the class, black ones the subject: alone, the subject takes the class over."""
    white = shaded(tmp_path / "class.tar", 230, "a photo of dog")
    black = shaded(tmp_path / "subject.tar", 2, "a red photo of dog")
    changes = {**QUICK, "updates": 80, "lr": 0.01, "rank": 8, "webdataset_path": black, "batch_size": 8,
               "module_filters": [".attn", "channelwise", "embedding", "clf"], "grad_accum_steps": 1,
               "train_tokens": None, "caption_dropout": 0.0, "max_grad_norm": 1.0, "crop": "center",
               "image_embedding_share": 0.0, "loss_weight": "constant", "prediction_type": "sample"}  # fmt: skip
    config = config_of(tmp_path, cascade, **changes)
    alone = train("lora", tmp_path, cascade, **changes)
    kept = train("lora", tmp_path, cascade, experiment_id="kept", regularization_path=white, **changes)
    assert loss_on(config, kept, white) < 0.9 * loss_on(config, alone, white)


def test_masks_weigh_the_loss(tmp_path, cascade):
    """White masks change nothing, and what a mask hides is not learned, whatever it is."""

    def shard(name: str, shades: list[int] | None, seed: int = 0) -> dict:
        members = {}
        for number in range(6):
            members[f"{number:03}.png"] = image(32, 32, seed=number + (seed if number > 2 else 0))
            if shades is not None:
                members[f"{number:03}.mask.png"] = encoded(Image.new("L", (32, 32), shades[number]))
            members[f"{number:03}.txt"] = "a photo of dog"
        path = str(write_tar(tmp_path / f"{name}.tar", members))
        return {**QUICK, "train_tokens": None, "webdataset_path": path, "experiment_id": name}

    masked = {"masked_loss": True, "unmasked_weight": 0.0}
    plain = tensors(train("lora", tmp_path, cascade, **shard("plain", None)))
    white = tensors(train("lora", tmp_path, cascade, **shard("white", [255] * 6), **masked))
    assert all(torch.allclose(value, white[name], atol=1e-6) for name, value in plain.items())
    half = [255] * 3 + [0] * 3
    one = train("lora", tmp_path, cascade, **shard("one", half), **masked)
    assert same(train("lora", tmp_path, cascade, **shard("two", half, seed=70), **masked), one)
    assert any((value - white[name]).abs().max() > 1e-5 for name, value in tensors(one).items())


# --- together

MATRIX = [
    {"lora_dropout": 0.2, "use_dora": True, "train_text_encoder": True, "rank_pattern": {"up_blocks": 4}},
    {"use_dora": True, "quantization": "int8", "gradient_checkpointing": True, "token_lr": 0.01},
    {"quantization": "int4", "dtype": "bfloat16", "train_text_encoder": True, "text_encoder_lr": 1e-3,
     "ema_beta": 0.5, "ema_offload": True, "train_tokens": None},
    {"lora_dropout": 0.2, "use_dora": True, "quantization": "int4", "loss_weight": "min_snr", "offload": True,
     "module_filters": [".attn", "channelwise", "embedding", "clf"], "module_excludes": ["to_k"], "lora_alpha": 8.0},
    {"use_dora": True, "gradient_checkpointing": True, "lora_dropout": 0.1, "train_text_encoder": True,
     "dtype": "bfloat16", "caption_dropout": 0.5, "adaptive_loss_weight": True},
]  # fmt: skip


@pytest.mark.parametrize(
    "changes", [*MATRIX[:3], *(pytest.param(each, marks=pytest.mark.slow) for each in MATRIX[3:])]
)
def test_options_together(tmp_path, cascade, changes):
    """Each trains, resumes to the same bits, and its file draws in a pipeline."""
    both = {**QUICK, "updates": 2, "save_every": 1, **changes}
    whole = train("lora", tmp_path, cascade, **both)
    middle = {"resume": str(whole.parent / "step-00000001"), "experiment_id": "resumed"}
    assert same(train("lora", tmp_path, cascade, **both, **middle), whole)
    values = load_file(whole / LORA)
    assert all(value.isfinite().all() and value.dtype == torch.float32 for value in values.values())
    assert any(value.abs().max() > 0 for name, value in values.items() if "lora_B" in name)
    pipeline = StableCascadePriorPipeline(
        *factory.text_encoder(config_of(tmp_path, cascade)), factory.network(config_of(tmp_path, cascade), "prior"),
        StableCascadeScheduler(shift=2.0), resolution_multiple=MULTIPLE,
    )  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)
    pipeline.load_lora_weights(whole)
    drawn = pipeline("a [fox]", num_inference_steps=1, height=64, width=64).image_embeddings
    assert drawn.isfinite().all()
