"""Damaged weights of every kind through their readers: networks, LoRAs, tokens, pickles, folders, `inspect`."""

from __future__ import annotations

import io
import json
import math
import random
import zipfile
import zlib
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from tests import fuzzing_images
from tests.fuzzing import Surface
from tests.fuzzing_folders import mutated_folder, mutated_json, parts, sound_folder
from tests.fuzzing_headers import file_of, laid_out, mutated_file, sound
from tests.fuzzing_image_surfaces import make_image, write
from tests.fuzzing_lora import KINDS, SETS, mutated_lora

CONTROLNET = {"in_channels": 1, "projection_channels": 16, "blocks": [0, 2], "bottleneck": "simple"}
PREVIEWER = {"in_channels": 4, "hidden_channels": 4, "out_channels": 3}


@cache
def _sizes(component: str) -> dict[str, tuple[str, list[int]]]:
    """Names, types and shapes of a small network's weights, under the original's names."""
    network = _networks()[component]
    kinds = {torch.float32: "F32", torch.int64: "I64"}
    return {name: (kinds[value.dtype], list(value.shape)) for name, value in network.to_original().items()}


@cache
def _networks() -> dict[str, Any]:
    from stable_cascade import StableCascadeControlNet, StableCascadePreviewer
    from tests import tiny_cascade as tiny

    controlnet, previewer = StableCascadeControlNet(**CONTROLNET), StableCascadePreviewer(**PREVIEWER)
    return {"prior": tiny.tiny_prior(), "previewer": previewer.eval(), "controlnet": controlnet.eval()}


def _make_weights(rng: random.Random, folder: Path) -> tuple[str, Path]:
    component = rng.choice(["previewer", "previewer", "prior"])
    kind, data = mutated_file(rng, _sizes(component), None, ())
    return kind, write(folder, f"{component}.safetensors", data)


def _use_weights(path: Path) -> None:
    from stable_cascade import StableCascadePreviewer, StableCascadePrior
    from stable_cascade.files.loading import single_file_config
    from tests.tiny_cascade import PRIOR

    if path.stem == "previewer":
        StableCascadePreviewer.from_single_file(path, config=PREVIEWER)
        single_file_config(StableCascadePreviewer, "previewer", path)
    else:
        StableCascadePrior.from_single_file(path, config=PRIOR)


def _make_controlnet(rng: random.Random, folder: Path) -> tuple[str, Path]:
    description = {
        "config": CONTROLNET,
        "filter": "CannyFilter",
        "filter_params": {"resize": 8},
        "model_version": "1B",
    }
    key = "stable_cascade_controlnet"
    if rng.random() < 0.2:
        kind, text = mutated_json(rng, json.dumps(description).encode())
        header, data = sound(_sizes("controlnet"), {key: text.decode("utf-8", "replace")})
        return f"description: {kind}", write(folder, "controlnet.safetensors", file_of(laid_out(header), data))
    kind, data = mutated_file(rng, _sizes("controlnet"), {key: json.dumps(description)}, (key,))
    return kind, write(folder, "controlnet.safetensors", data)


def _use_controlnet(path: Path) -> None:
    from stable_cascade import StableCascadeControlNet
    from stable_cascade.files.controlnet import read_description, read_shapes

    read_description(path)
    read_shapes(path)
    StableCascadeControlNet.from_single_file(path)


@cache
def _adapted() -> dict[str, Any]:
    from tests.tiny_cascade import tiny_prior, tiny_text_encoder, tiny_tokenizer

    return {"prior": tiny_prior(), "text_encoder": tiny_text_encoder(), "tokenizer": tiny_tokenizer()}


def _make_lora(rng: random.Random, folder: Path) -> tuple[str, Path]:
    from safetensors.torch import save

    kind, tensors, metadata = mutated_lora(rng)
    return kind, write(folder, "lora.safetensors", save(tensors, metadata))


def _make_lora_header(rng: random.Random, folder: Path) -> tuple[str, Path]:
    sizes: dict[str, tuple[str, list[int]]] = {}
    for layer in ("down_blocks.0.2.attention.to_q", "up_blocks.1.2.attention.to_out.0"):
        sizes |= {f"prior.{layer}.lora_A.weight": ("F32", [2, 16]), f"prior.{layer}.lora_B.weight": ("F32", [16, 2])}
    configs = '{"prior.r": 2, "prior.lora_alpha": 4}'
    kind, data = mutated_file(
        rng, sizes, {"lora_adapter_metadata": configs}, ("lora_adapter_metadata", "ss_network_args")
    )
    return kind, write(folder, "lora.safetensors", data)


def _make_peft_folder(rng: random.Random, folder: Path) -> tuple[str, Path]:
    """A folder as PEFT writes it, its config or its tensors damaged, sometimes a pickle."""
    from safetensors.torch import save

    tensors = {f"base_model.model.{key.removeprefix('prior.')}": value for key, value in SETS["peft"](rng).items()}
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "use_rslora": False, "use_dora": False, "bias": "none",
              "target_modules": ["to_q", "to_k"], "alpha_pattern": {"to_q": 8}, "rank_pattern": {},
              "modules_to_save": None, "init_lora_weights": True,
              "auto_mapping": {"base_model_class": "StableCascadePrior"}}  # fmt: skip
    kind, text = rng.choice([mutated_json, mutated_json, lambda _, whole: ("same", whole)])(
        rng, json.dumps(config).encode()
    )
    write(folder, "adapter_config.json", text)
    if kind == "same" or rng.random() < 0.2:
        change = rng.choice(["missing", "rank", "width", "axes", "dora", "types", "not finite", "foreign", "same"])
        KINDS[change](rng, tensors, {})
        kind = f"{kind}, {change}"
    tensors = {key: value.contiguous().clone() for key, value in tensors.items()}
    if rng.random() < 0.2:
        torch.save(tensors, folder / "adapter_model.bin")
    else:
        write(folder, "adapter_model.safetensors", save(tensors))
    return kind, folder


def _use_peft_folder(path: Path) -> None:
    """Loads it; a refused folder must have changed nothing."""
    _updates(_adapted()["prior"], path)


def _use_lora(path: Path) -> None:
    """Loads it and what another format makes of it, to the same update; a refused file must have changed nothing."""
    from stable_cascade.adapters.conversion import convert_lora
    from stable_cascade.files.lora import FORMATS

    prior, format = _adapted()["prior"], list(FORMATS)[zlib.crc32(path.read_bytes()) % len(FORMATS)]
    first = _updates(prior, path)
    converted = path.with_name(f"{format}_lora.safetensors")
    pipeline = SimpleNamespace(**_adapted())
    convert_lora(path, converted, format, base=pipeline)
    second = _updates(prior, converted)
    assert first.keys() == second.keys(), first.keys() ^ second.keys()
    for name, update in first.items():
        largest = float(update.abs().max())
        if not math.isfinite(largest):  # of finite factors, each of them huge
            continue
        assert torch.allclose(update, second[name], rtol=0, atol=1e-2 * largest + 1e-30), (name, format)


def _updates(prior: Any, path: Path) -> dict[str, torch.Tensor]:
    """What a LoRA adds to each layer's weight; the network is as before afterwards."""
    from stable_cascade.adapters import load_lora, remove_lora
    from stable_cascade.adapters.injection import tuner_layers

    try:
        load_lora(prior, path)
    except Exception:
        assert not tuner_layers(prior), "a refused LoRA has left layers behind"
        assert not getattr(prior, "peft_config", {}), "a refused LoRA has left its config behind"
        raise
    found = {}
    try:
        for name, layer in prior.named_modules():
            if hasattr(layer, "get_delta_weight"):
                found[name] = layer.get_delta_weight("default").detach().clone()
                assert math.isfinite(layer.scaling["default"])
                own = [value for part, value in layer.named_parameters() if part.startswith("lora_")]
                assert all(bool(value.isfinite().all()) for value in own), "a LoRA that is not finite was read"
    finally:
        remove_lora(prior)
    assert found, "a LoRA was read and has no layers"
    return found


def _make_tokens(rng: random.Random, folder: Path) -> tuple[str, Path]:
    sizes = rng.choice([{"[fox]": ("F32", [32]), "<owl>": ("F32", [1, 32])},
                        {"clip_g": ("F32", [1, 32]), "clip_l": ("F32", [1, 24])},
                        {"emb_params": ("F32", [2, 32])}])  # fmt: skip
    kind, data = mutated_file(rng, sizes, {"format": "pt"}, ())
    return kind, write(folder, "learned_embeds.safetensors", data)


def _use_tokens(path: Path) -> None:
    from stable_cascade.adapters.tokens import add_token_rows, read_learned_embeds
    from tests.tiny_cascade import tiny_tokenizer

    add_token_rows(tiny_tokenizer(), _shared_encoder(), read_learned_embeds(path, "[owl]"))


@cache
def _shared_encoder() -> Any:
    from tests.tiny_cascade import tiny_text_encoder

    return tiny_text_encoder()


def _use_folder(path: Path) -> None:
    """Loads the damaged part; the others are given, or every case would load them all."""
    from stable_cascade import StableCascadePipeline

    whole = path.parent if path.name == "model_index.json" else path.parent.parent
    damaged = "scheduler" if path.parent == whole else path.parent.name
    given = {name: part for name, part in {**parts(), "feature_extractor": None}.items() if name != damaged}
    StableCascadePipeline.from_pretrained(whole, **given)


def make_anything(rng: random.Random, folder: Path) -> tuple[str, Path]:
    """A file of any kind, for what tells kinds apart by itself."""
    if rng.random() < 0.08:
        kind, path = mutated_folder(rng, folder)
        return kind, folder / "cascade"
    makers = (
        _make_weights,
        _make_checkpoint,
        _make_controlnet,
        _make_lora,
        _make_lora,
        _make_lora_header,
        _make_tokens,
        make_image,
    )
    kind, path = rng.choice(makers)(rng, folder)
    if rng.random() < 0.1:
        path = path.rename(path.with_suffix(rng.choice([".png", ".pt", ".ckpt", ".bin", "", ".json"])))
    return kind, path


def _make_checkpoint(rng: random.Random, folder: Path) -> tuple[str, Path]:
    """ComfyUI's: several networks under prefixes."""
    sizes = {f"model.diffusion_model.{name}": value for name, value in _sizes("prior").items()}
    sizes |= {f"vae.previewer.{name}": value for name, value in _sizes("previewer").items()}
    sizes |= {"text_encoder.clip_g.transformer.text_model.embeddings.token_embedding.weight": ("F32", [9, 8]),
              "text_encoder.clip_g.logit_scale": ("F32", []), "vae.encoder.mapper.0.weight": ("F32", [16, 8, 1, 1]),
              "vae.encoder.backbone.0.0.weight": ("F32", [8, 3, 3, 3]),
              "clip_l_vision.vision_model.post_layernorm.bias": ("F32", [8])}  # fmt: skip
    kind, data = mutated_file(rng, sizes, {"modelspec.title": "Cascade"}, ("modelspec.title", "training_config"))
    return kind, write(folder, "checkpoint.safetensors", data)


def _use_inspect(path: Path) -> None:
    """What `inspect` shows of it: as text and as JSON, of bounded size and without control characters."""
    from stable_cascade.files.places import describe

    described = describe(path)
    text = str(described)
    assert all(line.isprintable() for line in text.splitlines()), text[:300]
    assert len(text) < 100_000, len(text)
    json.dumps(described.as_dict(), allow_nan=False)


def _make_pickle(rng: random.Random, folder: Path) -> tuple[str, Path]:
    """Files of torch.save, old and new, damaged or holding what is no state dict."""
    whole = {
        name: torch.zeros(shape, dtype=torch.int64 if kind == "I64" else torch.float32)
        for name, (kind, shape) in _sizes("previewer").items()
    }
    first = next(iter(whole))
    odd = ([1, 2], {"state_dict": 3}, {"state_dict": whole}, {first: 1}, {1: torch.zeros(1)}, {}, torch.zeros(3),
           "text", None, {"a\nb": torch.zeros(1)},
           {**whole, first: torch.zeros(1).expand(10**9)}, {**whole, first: torch.zeros(3, 3).to_sparse()},
           {**whole, first: torch.zeros(2, device="meta")},
           {**whole, first: torch.quantize_per_tensor(torch.zeros(4), 1.0, 0, torch.qint8)},
           {"x" * 100_000: torch.zeros(1)}, {first: [whole]},
           {**whole, first: torch.nn.Parameter(torch.zeros(4))},
           {**whole, first: torch.zeros(2, dtype=torch.complex64)}, _Foreign())  # fmt: skip
    kind = rng.choice(["sound", "odd", "odd", "odd", "bits", "bits", "cut", "rubbish", "zip"])
    file = io.BytesIO()
    torch.save(rng.choice(odd) if kind == "odd" else whole, file, _use_new_zipfile_serialization=rng.random() < 0.7)
    data = bytearray(file.getvalue())
    if kind == "bits":
        for _ in range(rng.choice([1, 10, 100])):
            data[rng.randrange(min(len(data), rng.choice([200, 2000, 10**6])))] ^= 1 << rng.randrange(8)
    elif kind == "cut":
        data = data[: rng.randrange(len(data))]
    elif kind == "rubbish":
        data = bytearray(
            rng.choice(
                [
                    b"",
                    b"\x80\x02.",
                    b"cos\nsystem\n(S'true'\ntR.",
                    b"\x80\x05\x95" + b"\xff" * 8,
                    b"PK\x03\x04",
                    rng.randbytes(99),
                ]
            )
        )
    elif kind == "zip":
        data = bytearray(_packed(rng.choice(["sound", "bomb", "cut"])))
    return kind, write(folder, f"previewer{rng.choice(['.pt', '.bin', '.ckpt', ''])}", bytes(data))


@cache
def _packed(kind: str) -> bytes:
    """An archive as torch.save's, deflated; the bomb has a hundred million instructions in a hundred kilobytes."""
    programs = {"sound": b"\x80\x02}.", "bomb": b"\x80\x02" + b"(" * 100_000_000, "cut": b"\x80\x02X\xff\xff\xff\x7f"}
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/version", "3")
        archive.writestr("archive/data.pkl", programs[kind])
    return file.getvalue()


class _Foreign:
    """Something that only a pickle that runs code could restore."""


def _use_pickle(path: Path) -> None:
    from stable_cascade import StableCascadePreviewer
    from stable_cascade.files.places import describe

    model = StableCascadePreviewer.from_single_file(path, config=PREVIEWER)
    assert all(value.device.type == "cpu" and not value.is_sparse for value in model.state_dict().values())
    describe(path)


def warm() -> None:
    """Builds what every case needs, before processes are forked."""
    _sizes("prior"), _sizes("previewer"), _sizes("controlnet"), _adapted(), _shared_encoder(), _packed("bomb")
    fuzzing_images.warm()


SURFACES = (
    Surface("weights", _make_weights, _use_weights, warm),
    Surface("controlnet file", _make_controlnet, _use_controlnet, warm),
    Surface("lora keys", _make_lora, _use_lora, warm, subjects=("train_tokens",)),
    Surface("lora header", _make_lora_header, _use_lora, warm, subjects=("train_tokens",)),
    Surface("peft folder", _make_peft_folder, _use_peft_folder, warm, subjects=("adapter_model",)),
    Surface("learned tokens", _make_tokens, _use_tokens, warm, subjects=("learned token '",)),
    Surface("pickle", _make_pickle, _use_pickle, warm),
    Surface("inspect", make_anything, _use_inspect, warm),
    Surface("pipeline folder", mutated_folder, _use_folder, lambda: sound_folder(), subjects=("cascade",)),
)
