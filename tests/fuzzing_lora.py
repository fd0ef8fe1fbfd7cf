"""Damaged LoRA key sets: a sound set in each tool's names, and what may be wrong with it."""

from __future__ import annotations

import json
import random
from collections.abc import Callable

import torch
from torch import Tensor

Tensors = dict[str, Tensor]
WIDTH, OUT, RANK, TOKENS = 16, 16, 2, 32
LAYERS = tuple(f"{side}_blocks.{level}.2.attention.to_{part}" for side in ("down", "up") for level in (0,
    1) for part in
               ("q", "k", "v", "out.0"))  # fmt: skip
TEXT_LAYERS = tuple(f"text_model.encoder.layers.{i}.self_attn.{part}_proj" for i in (0, 1) for part in ("q", "v"))
FOREIGN = ("unet.down_blocks.0.attentions.0.to_q", "transformer.blocks.0.attn",
           "decoder.down_blocks.0.0.channelwise.0", "vqgan.x",
           "text_model.encoder.layers.99.mlp.fc1", "down_blocks.9.2.attention.to_q", "down_blocks.0.0.depthwise", "",
           ".", "prior",
           "_orig_mod.down_blocks.0.2.attention.to_q", "down_blocks.0.2.attention", "clf.0", "gdf")  # fmt: skip
DTYPES = (torch.float16, torch.bfloat16, torch.float64, torch.int64, torch.int8, torch.uint8, torch.bool,
          torch.float8_e4m3fn,
          torch.float8_e5m2)  # fmt: skip
ODD_ALPHAS = (float("nan"), float("inf"), -float("inf"), 0.0, -1.0, 1e38, 1e-45)


def _pair(layer: str, width: int = WIDTH, out: int = OUT, rank: int = RANK) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(len(layer))
    return torch.randn(rank, width, generator=generator), torch.randn(out, rank, generator=generator)


def peft(rng: random.Random) -> Tensors:
    tensors, dora = {}, rng.random() < 0.2
    for prefix, layers, width in (("prior.", LAYERS, WIDTH), ("text_encoder.", TEXT_LAYERS, TOKENS)):
        for layer in layers if prefix == "prior." or rng.random() < 0.3 else ():
            down, up = _pair(layer, width, width)
            tensors |= {f"{prefix}{layer}.lora_A.weight": down, f"{prefix}{layer}.lora_B.weight": up}
            if dora:
                tensors[f"{prefix}{layer}.lora_magnitude_vector"] = torch.ones(width)
    return tensors


def original(rng: random.Random) -> Tensors:
    tensors = {}
    for number in range(8):
        down, up = _pair(str(number), out=OUT if number % 2 == 0 else 3 * OUT)
        tensors |= {f"weights.{number}.lora_down": down, f"weights.{number}.lora_up": up}
    if rng.random() < 0.3:
        tensors |= {"embeddings.embeddings": torch.zeros(2, TOKENS), "embeddings.indices": torch.tensor([1, 900])}
    return tensors


def _flat(prefix: str, text_prefix: str, rename: Callable[[str], str] = lambda layer: layer) -> Callable[..., Tensors]:
    """Flattened names with `lora_down`, `lora_up` and `alpha`, as kohya and those after it write them."""

    def build(rng: random.Random) -> Tensors:
        tensors: Tensors = {}
        dora = rng.random() < 0.2
        for head, layers, width in ((prefix, LAYERS, WIDTH), (text_prefix, TEXT_LAYERS, TOKENS)):
            for layer in layers if head == prefix or rng.random() < 0.3 else ():
                down, up = _pair(layer, width, width)
                name = head + rename(layer).replace(".", "_")
                tensors |= {
                    f"{name}.lora_down.weight": down,
                    f"{name}.lora_up.weight": up,
                    f"{name}.alpha": torch.tensor(1.0),
                }
                if dora:
                    tensors[f"{name}.dora_scale"] = torch.ones(width, 1)
        return tensors

    return build


def _as_comfyui(layer: str) -> str:
    return layer.replace("attention.to_out.0", "attention.attn.out_proj").replace(
        "attention.to_", "attention.attn.to_"
    )


def comfyui(rng: random.Random) -> Tensors:
    tensors = {}
    for layer in LAYERS:
        down, up = _pair(layer)
        name = f"diffusion_model.{_as_comfyui(layer)}"
        tensors |= {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": up, f"{name}.alpha": torch.tensor(2.0)}
    return tensors


def onetrainer(rng: random.Random) -> Tensors:
    tensors = _flat("lora_prior_unet_", "lora_prior_te_", _as_comfyui)(rng)
    if rng.random() < 0.3:
        tensors |= {
            "bundle_emb.fox.clip_g": torch.zeros(1, TOKENS),
            "bundle_emb.fox.clip_g_out": torch.zeros(2, TOKENS),
        }
    return tensors


SETS: dict[str, Callable[[random.Random], Tensors]] = {
    "peft": peft, "original": original, "kohya": _flat("lora_unet_", "lora_te_", _as_comfyui),
    "onetrainer": onetrainer,
    "comfyui": comfyui,
}  # fmt: skip


def mutated_lora(rng: random.Random) -> tuple[str, Tensors, dict[str, str]]:
    """What was done, the tensors, and the header's metadata."""
    form = rng.choice(list(SETS))
    tensors, metadata, done = SETS[form](rng), {"format": "pt"}, [form]
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        if not tensors:
            break
        kind = rng.choice(list(KINDS))
        KINDS[kind](rng, tensors, metadata)
        done.append(kind)
    return ", ".join(done), {key: value.contiguous().clone() for key, value in tensors.items()}, metadata


def _some(rng: random.Random, tensors: Tensors) -> list[str]:
    return rng.sample(list(tensors), rng.choice([1, 1, 1, min(3, len(tensors)), len(tensors)]))


def _missing(rng, tensors, metadata) -> None:
    for key in rng.sample(list(tensors), min(len(tensors), rng.choice([1, 2, 5]))):
        del tensors[key]


def _swapped(rng, tensors, metadata) -> None:
    """The two factors under each other's names."""
    for key in list(tensors):
        for one, other in (("lora_A", "lora_B"), ("lora_down", "lora_up")):
            partner = key.replace(one, other)
            if one in key and partner in tensors and rng.random() < 0.7:
                tensors[key], tensors[partner] = tensors[partner], tensors[key]


def _rank(rng, tensors, metadata) -> None:
    """Rank 0, or one that its partner does not have."""
    for key in _some(rng, tensors):
        value, rank = tensors[key], rng.choice([0, 1, 3, 64])
        axis = 0 if "lora_A" in key or "lora_down" in key else -1
        if value.ndim == 2:
            tensors[key] = value.new_zeros((rank, value.shape[1]) if axis == 0 else (value.shape[0], rank))


def _rank_of_all(rng, tensors, metadata) -> None:
    rank = rng.choice([0, 1, 17, 4096])
    for key, value in tensors.items():
        if value.ndim == 2 and "lora_" in key:
            first = "lora_A" in key or "lora_down" in key
            tensors[key] = value.new_zeros((rank, value.shape[1]) if first else (value.shape[0], rank))


def _width(rng, tensors, metadata) -> None:
    """Of a network of another size."""
    width, keys = rng.choice([8, 24, 1536, 0]), _some(rng, tensors)
    for key in keys:
        value = tensors[key]
        if value.ndim == 2:
            first = "lora_A" in key or "lora_down" in key
            tensors[key] = value.new_zeros((value.shape[0], width) if first else (width, value.shape[1]))


def _axes(rng, tensors, metadata) -> None:
    for key in _some(rng, tensors):
        value = tensors[key]
        changes = (value.flatten(), value[None], value[..., None], value[..., None, None], value.new_zeros(()),
                   value.new_zeros(0),
                   value.new_zeros([1] * 9), value.T if value.ndim == 2 else value)  # fmt: skip
        tensors[key] = rng.choice(changes)


def _alpha(rng, tensors, metadata) -> None:
    layers = [key.rsplit(".lora_", 1)[0] for key in tensors if ".lora_" in key] or ["x"]
    values = [torch.tensor(rng.choice(ODD_ALPHAS)), torch.ones(3), torch.ones(0), torch.ones(1, 1), torch.tensor(True),
              torch.tensor(4), torch.ones((), dtype=torch.float16)]  # fmt: skip
    for layer in rng.sample(layers, min(len(layers), rng.choice([1, 4]))):
        tensors[f"{layer}.alpha"] = rng.choice(values)


def _numbers(rng, tensors, metadata) -> None:
    """Gaps and oddities in the numbers of positional names, or in the places of blocks."""
    for key in _some(rng, tensors):
        words = [place for place, word in enumerate(key.split(".")) if word.isdigit()]
        if words:
            parts = key.split(".")
            parts[rng.choice(words)] = rng.choice(["9", "007", "-1", "1000000", "٣", "1e3", "", "9" * 5000])
            tensors[".".join(parts)] = tensors.pop(key)


def _mixed(rng, tensors, metadata) -> None:
    """Keys of a second tool among the first's."""
    other = SETS[rng.choice(list(SETS))](rng)
    for key in rng.sample(list(other), rng.choice([1, 2, len(other)])):
        tensors[key] = other[key]


def _dora(rng, tensors, metadata) -> None:
    """Magnitudes without factors, or of another length."""
    layer = rng.choice([key.rsplit(".lora_", 1)[0] for key in tensors if ".lora_" in key] or ["prior.x"])
    name = rng.choice([layer, layer, "prior.clf.1", "lora_unet_clf_1", "down_blocks.0.0.channelwise.0"])
    ending = rng.choice(["lora_magnitude_vector", "dora_scale", "lora_magnitude_vector.weight"])
    tensors[f"{name}.{ending}"] = torch.ones(rng.choice([(OUT,), (OUT, 1), (1, OUT), (3,), (), (0,)]))


def _foreign(rng, tensors, metadata) -> None:
    """Layers of another network."""
    for _ in range(rng.choice([1, 3])):
        down, up = _pair("foreign", rng.choice([WIDTH, 40]))
        head, layer = (
            rng.choice(["", "prior.", "text_encoder.", "unet.", "lora_unet_", "diffusion_model."]),
            rng.choice(FOREIGN),
        )
        one, other = rng.choice([("lora_A.weight", "lora_B.weight"), ("lora_down.weight", "lora_up.weight")])
        tensors |= {f"{head}{layer}.{one}": down, f"{head}{layer}.{other}": up}


def _only_foreign(rng, tensors, metadata) -> None:
    tensors.clear()
    _foreign(rng, tensors, metadata)


def _types(rng, tensors, metadata) -> None:
    dtype = rng.choice(DTYPES)
    for key in _some(rng, tensors):
        tensors[key] = tensors[key].to(dtype)


def _not_finite(rng, tensors, metadata) -> None:
    for key in _some(rng, tensors):
        tensors[key] = torch.full_like(tensors[key], rng.choice([float("nan"), float("inf"), 65504.0]) if
                                       tensors[key].is_floating_point() else 1)  # fmt: skip


def _collision(rng, tensors, metadata) -> None:
    """Two names that are one when dots and underscores are."""
    for key in _some(rng, tensors):
        parts = key.split(".")
        tensors[rng.choice([key.replace("_", "."), "_".join(parts[:-2]) + "." + ".".join(parts[-2:]), key.upper(),
                            f"prior.{key}",
                            f"lora_unet_{key}",
                            key.replace("to_out.0", "to_out")])] = tensors[key].clone()  # fmt: skip


def _names(rng, tensors, metadata) -> None:
    odd = ("", ".", "\n", "\x1b[2J", "\u202e", "x" * 200_000, "lora_" * 1000, ".lora_A.", "lora_A", ".lora_B.weight",
           ".alpha",
           ".lora_A.weight.lora_A.weight", "weights..lora_down", "🦊")  # fmt: skip
    for key in _some(rng, tensors):
        word = rng.choice(odd)
        name = rng.choice([word, word + key, key + word, key.replace("attention", word), key.replace("weight", word)])
        tensors[name] = tensors.pop(key)


def _tokens(rng, tensors, metadata) -> None:
    """Learned tokens that do not fit each other, the vocabulary or the width."""
    indices = [torch.tensor([1, 900]), torch.tensor([-1, 2**40]), torch.tensor([1.5, 2.5]), torch.tensor([[1]]),
               torch.tensor(3),
               torch.tensor([1, 1]), torch.zeros(0), torch.tensor([float("nan")])]  # fmt: skip
    rows = [torch.zeros(2, TOKENS), torch.zeros(1, TOKENS), torch.zeros(2, 7), torch.zeros(TOKENS), torch.zeros(()),
            torch.zeros(0, 0),
            torch.zeros(2, 3, TOKENS)]  # fmt: skip
    choices = (("embeddings.indices", indices), ("embeddings.embeddings", rows), ("bundle_emb.fox.clip_g", rows),
               ("bundle_emb..clip_g", rows), ("bundle_emb.a b\n.clip_g", rows), ("emb_params", rows))  # fmt: skip
    for name, values in rng.sample(choices, rng.choice([1, 2])):
        tensors[name] = rng.choice(values)


def _metadata(rng, tensors, metadata) -> None:
    names = [key.rsplit(".lora_", 1)[0].removeprefix("prior.") for key in tensors if ".lora_" in key] or ["x"]
    values = {
        "r": (0, -1, 2, 10**9, "2", None), "lora_alpha": (0, -1, 1e308, "4", None, [1], {}, True),
        "use_rslora": (True, "yes", None, 3),
        "use_dora": (True, 1), "lora_bias": (True, "no", None), "lora_dropout": (-1, 2, "x", 0.5, None),
        "bias": ("all", 3),
        "alpha_pattern": ({"(": 1}, {"(a+)+$": 2}, {names[0]: "x"}, {names[0]: None}, {names[0]: 1e308}, [1], "x",
                          {"": 1}, None),
        "rank_pattern": ({names[0]: 0}, {names[0]: -3}, {names[0]: 10**9}, {"[": 4}, "x", None),
        "target_modules": ([], "all-linear", ".*", 3),
        "peft_type": ("LOHA", 3), "modules_to_save": (["clf"], 3), "init_lora_weights": ("gaussian", "pissa"),
        "unknown": (1,),
    }  # fmt: skip
    content = {}
    for key in rng.sample(list(values), rng.choice([1, 1, 2, 4])):
        content[f"{rng.choice(['prior.', 'prior.', '', 'text_encoder.'])}{key}"] = rng.choice(values[key])
    metadata["lora_adapter_metadata"] = json.dumps(content)
    metadata["ss_network_args"] = rng.choice(["", "{", "null", "[]", "x" * 1000])
    metadata["ss_network_dim"] = rng.choice(["16", "many", "", "-1"])


def _emptied(rng, tensors, metadata) -> None:
    tensors.clear()


def _same(rng, tensors, metadata) -> None:
    """Nothing: the sound file is read."""


KINDS: dict[str, Callable[[random.Random, Tensors, dict[str, str]], None]] = {
    "missing": _missing, "swapped": _swapped, "rank": _rank, "rank of all": _rank_of_all, "width": _width,
    "axes": _axes,
    "alpha": _alpha, "numbers": _numbers, "mixed": _mixed, "dora": _dora, "foreign": _foreign,
    "only foreign": _only_foreign,
    "types": _types, "not finite": _not_finite, "collision": _collision, "names": _names, "tokens": _tokens,
    "metadata": _metadata, "emptied": _emptied, "same": _same,
}  # fmt: skip
