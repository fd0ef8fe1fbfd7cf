"""The stack of levels that the prior and the decoder share: building, initialising and running it.

The two networks keep their submodules under the names of the published weights, so what they share is functions over
those names. A stack is any module with `down_blocks`, `down_downscalers`, `down_repeat_mappers`, the same for `up_`,
and `config`. Images travel as (B, H, W, C).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from .blocks import (
    KeysValues,
    SDCascadeAttnBlock,
    SDCascadeFeedForwardBlock,
    SDCascadeResBlock,
    SDCascadeTimestepBlock,
)
from .conditioning import JoinedMappers, blocks_of
from .layers import (
    DoublingConv2d,
    TiledConv2d,
    layer_norm,
    narrow,
    resize,
    saturate,
    to_channels_first,
    to_channels_last,
    widen,
)

NO_SPLIT = ["SDCascadeResBlock", "SDCascadeTimestepBlock", "SDCascadeAttnBlock", "SDCascadeFeedForwardBlock"]
# A network with the submodules named above; type checkers see a module's attributes as tensors or modules only.
Stack = Any
PER_LEVEL = (
    "num_attention_heads",
    "down_num_layers_per_block",
    "up_num_layers_per_block",
    "down_blocks_repeat_mappers",
    "up_blocks_repeat_mappers",
    "block_types_per_layer",
    "dropout",
    "self_attn",
)


@dataclass
class Conditions:
    """What a network makes of its conditions once per sampling run, for any number of steps at fixed weights.

    `tokens` are the activated conditioning tokens (B, L, conditioning_dim); `keys_values` has, per attention block,
    what it made of them, and which of them count where not all do; `modulation` the joined weights of the timestep
    blocks; `effnet` and `pixels` are the decoder's, `maps` their images on the grids seen so far.
    """

    tokens: Tensor
    keys_values: dict[str, KeysValues] = field(default_factory=dict)
    modulation: JoinedMappers | None = None
    effnet: Tensor | None = None
    pixels: Tensor | None = None
    maps: dict[tuple[int, int], Tensor] | None = None

    def first(self, rows: int) -> Conditions:
        """The conditions of the first rows alone: those of a guided batch without its unconditional half."""
        return Conditions(
            self.tokens[:rows],
            {key: tuple(part[:rows] for part in parts) for key, parts in self.keys_values.items()},
            self.modulation,
            None if self.effnet is None else self.effnet[:rows],
            None if self.pixels is None else self.pixels[:rows],
            None if self.maps is None else {},
        )


@dataclass
class DeepCache:
    """What the deeper half of the levels made at the last whole step of a sampling run, for the steps between.

    A forward that finds nothing here, or fewer rows than it has, runs all levels and leaves what they made.

    Source: Ma et al. 2023 (DeepCache), section 3.2.
    """

    features: Tensor | None = None

    def first(self, rows: int) -> Tensor | None:
        """The features of the first rows; None where a whole step has to make them."""
        return None if self.features is None or len(self.features) < rows else self.features[:rows]


@dataclass
class Run:
    """What every block of one forward needs."""

    embedding: Tensor
    conditions: Conditions
    modulation: dict[str, Tensor]
    control: Iterator[Tensor | None]
    cache: DeepCache | None = None


class UpDownBlock2d(nn.Module):
    """Change of width between levels, and of size by two where `enabled`. Shapes: (B, C, H, W) -> (B, C', H', W')."""

    def __init__(self, in_channels: int, out_channels: int, mode: str, enabled: bool):
        super().__init__()
        mapping = TiledConv2d(in_channels, out_channels, 1)
        self.up, self.enabled = mode == "up", enabled
        self.blocks = nn.ModuleList([nn.Identity(), mapping] if self.up else [mapping, nn.Identity()])

    def forward(self, x: Tensor) -> Tensor:
        """Shapes: (B, C, H, W) -> (B, C', H', W')."""
        if not self.enabled:
            return self.blocks[int(self.up)](x)
        height, width = x.shape[2:]
        if self.up:
            return self.blocks[1](_resize_image(x, (2 * height, 2 * width)))
        return _resize_image(self.blocks[0](x), (height // 2, width // 2))


def _resize_image(x: Tensor, size: tuple[int, int]) -> Tensor:
    return to_channels_first(resize(to_channels_last(x), size))


def per_level(config: dict[str, Any]) -> dict[str, Any]:
    """`config` with one entry per level wherever one value stands for all, checked.

    Raises:
        ValueError: a list has another length than `block_out_channels`; an unknown block type.
    """
    levels = len(config["block_out_channels"])
    config = dict(config)
    # One value for all levels becomes a list.
    for key in ("dropout", "self_attn"):
        if isinstance(config[key], (bool, int, float)):
            config[key] = [config[key]] * levels
    for key in ("down_blocks_repeat_mappers", "up_blocks_repeat_mappers"):
        config[key] = [1] * levels if config[key] is None else config[key]
    # Every list has an entry per level, and every block is known.
    for key in PER_LEVEL:
        if len(config[key]) != levels:
            raise ValueError(
                f"{key} has {len(config[key])} entries, block_out_channels has {levels}: give one per level"
            )
    switch = config["switch_level"]
    if switch is not None and len(switch) != levels - 1:
        raise ValueError(
            f"switch_level {list(switch)} must have {levels - 1} entries, one less than block_out_channels"
        )
    unknown = {name for names in config["block_types_per_layer"] for name in names} - set(NO_SPLIT)
    if unknown:
        raise ValueError(f"block_types_per_layer has {sorted(unknown)[0]!r}; known: {', '.join(NO_SPLIT)}")
    return config


def add_stack(model: Stack, config: dict[str, Any]) -> None:
    """Gives `model` the levels that `config` describes, under the published names."""
    config = per_level(config)
    levels = range(len(config["block_out_channels"]))
    model.down_downscalers = nn.ModuleList(_scaler(config, level, "down") for level in levels)
    model.down_blocks = nn.ModuleList(_level(config, level, "down") for level in levels)
    model.down_repeat_mappers = nn.ModuleList(_repeats(config, level, "down") for level in levels)
    # The deepest level comes first on the way up, in the lists of the config as in the modules.
    model.up_blocks = nn.ModuleList(_level(config, level, "up") for level in reversed(levels))
    model.up_upscalers = nn.ModuleList(_scaler(config, level, "up") for level in reversed(levels))
    model.up_repeat_mappers = nn.ModuleList(_repeats(config, level, "up") for level in reversed(levels))


def _entry(config: dict[str, Any], key: str, level: int, side: str) -> Any:
    return config[f"{side}_{key}"][level if side == "down" else -1 - level]


def _level(config: dict[str, Any], level: int, side: str) -> nn.ModuleList:
    joined = side == "up" and level < len(config["block_out_channels"]) - 1
    blocks = nn.ModuleList()
    for _ in range(_entry(config, "num_layers_per_block", level, side)):
        for name in config["block_types_per_layer"][level]:
            skip = config["block_out_channels"][level] if joined and len(blocks) == 0 else 0
            blocks.append(_block(config, level, name, skip))
    return blocks


def _block(config: dict[str, Any], level: int, name: str, skip: int) -> nn.Module:
    c, dropout = config["block_out_channels"][level], config["dropout"][level]
    if name == "SDCascadeResBlock":
        return SDCascadeResBlock(c, skip, config["kernel_size"], dropout)
    if name == "SDCascadeTimestepBlock":
        names = tuple(config["timestep_conditioning_type"])
        return SDCascadeTimestepBlock(c, config["timestep_ratio_embedding_dim"], names)
    if name == "SDCascadeFeedForwardBlock":
        return SDCascadeFeedForwardBlock(c, dropout)
    heads = config["num_attention_heads"][level]
    return SDCascadeAttnBlock(c, config["conditioning_dim"], heads, config["self_attn"][level], dropout)


def _scaler(config: dict[str, Any], level: int, side: str) -> nn.Module:
    if level == 0:
        return nn.Identity()
    outer, inner = config["block_out_channels"][level - 1], config["block_out_channels"][level]
    switch = config["switch_level"]
    source, target = (outer, inner) if side == "down" else (inner, outer)
    if switch is not None:
        return nn.Sequential(layer_norm(source), UpDownBlock2d(source, target, side, switch[level - 1]))
    change = TiledConv2d(source, target, 2, stride=2) if side == "down" else DoublingConv2d(source, target)
    return nn.Sequential(layer_norm(source), change)


def _repeats(config: dict[str, Any], level: int, side: str) -> nn.ModuleList:
    c = config["block_out_channels"][level]
    count = _entry(config, "blocks_repeat_mappers", level, side) - 1
    return nn.ModuleList(TiledConv2d(c, c, 1) for _ in range(count))


def keys_values(model: Stack, tokens: Tensor, attended: Tensor | None = None) -> dict[str, KeysValues]:
    """Keys and values of the conditioning tokens for every attention block, by key.

    Shapes: (B, L, conditioning_dim), `attended` (B, L) bool: the tokens that count, all of them where None.
    """
    made = {key: block(None, tokens) for key, block in blocks_of(model, "attention")}
    return made if attended is None else {key: (*pair, attended) for key, pair in made.items()}


def run_stack(model: Stack, x: Tensor, run: Run) -> Tensor:
    """All levels, down then up, or the outer half around what a cache has of the others.

    Shapes: (B, H, W, C) -> (B, H, W, C).
    """
    levels = len(model.down_blocks)
    outer = max(1, levels // 2)
    kept = None if run.cache is None else run.cache.first(len(x))
    # Down: each level's image is the skip of its way up.
    skips: list[Tensor] = []
    for level in range(levels if kept is None else outer):
        x = _run_level(model, ("down", level), rescale(model.down_downscalers[level], x), None, run)
        skips.append(x)
    # The deeper half, where a cache has it already.
    if kept is not None:
        x = kept
        _pass_over(model, outer, run.control)
    # Up, leaving in the cache what the deeper half made.
    for level in range(0 if kept is None else levels - outer, levels):
        skip = skips[levels - 1 - level] if level > 0 else None
        x = rescale(model.up_upscalers[level], _run_level(model, ("up", level), x, skip, run))
        if run.cache is not None and level == levels - outer - 1:
            run.cache.features = x
    if any(residual is not None for residual in run.control):
        raise ValueError("control has residuals for more residual blocks than the network has")
    return x


def _pass_over(model: Stack, outer: int, control: Iterator[Tensor | None]) -> None:
    """Takes from `control` what belongs to the residual blocks deeper than the outer levels."""
    levels = len(model.down_blocks)
    deep = [("down", level) for level in range(outer, levels)] + [("up", level) for level in range(levels - outer)]
    for side, level in deep:
        blocks, mappers = getattr(model, f"{side}_blocks")[level], getattr(model, f"{side}_repeat_mappers")[level]
        for _ in range((len(mappers) + 1) * sum(block.kind == "residual" for block in blocks)):
            next(control, None)


def rescale(scaler: nn.Module, x: Tensor) -> Tensor:
    """The change between two levels. Shapes: (B, H, W, C) -> (B, H', W', C')."""
    if not isinstance(scaler, nn.Sequential):
        return x
    norm, layer = scaler
    return widen(_as_image(layer, narrow(norm(x), next(layer.parameters()))))


def _as_image(convolution: nn.Module, x: Tensor) -> Tensor:
    """A convolution on an image with channels last. Shapes: (B, H, W, C) -> (B, H', W', C')."""
    return to_channels_last(convolution(to_channels_first(x)))


def _run_level(model: Stack, where: tuple[str, int], x: Tensor, skip: Tensor | None, run: Run) -> Tensor:
    side, level = where
    blocks, mappers = getattr(model, f"{side}_blocks")[level], getattr(model, f"{side}_repeat_mappers")[level]
    types = model.config.block_types_per_layer
    depth = len(types[level if side == "down" else -1 - level])
    keyed = [(f"{side}.{level}.{index}", block) for index, block in enumerate(blocks)]
    checkpointed = model.gradient_checkpointing and torch.is_grad_enabled()
    # The level runs once and again after each repeat mapper, a layer (a checkpoint's unit) at a time.
    for repeat in range(len(mappers) + 1):
        for start in range(0, len(keyed), depth):
            step = _layer(keyed[start : start + depth], skip if start == 0 else None, run)
            x = model._gradient_checkpointing_func(step, x) if checkpointed else step(x)
        if repeat < len(mappers):
            x = widen(saturate(_as_image(mappers[repeat], narrow(x, mappers[repeat].weight))))
    return x


def _layer(keyed: Sequence[tuple[str, Any]], skip: Tensor | None, run: Run) -> Callable[[Tensor], Tensor]:
    """A function that runs a few blocks; what it needs beside the image is settled now, so that it can run twice."""
    residuals = {key: next(run.control, None) for key, block in keyed if block.kind == "residual"}

    def step(x: Tensor) -> Tensor:
        for position, (key, block) in enumerate(keyed):
            if block.kind == "residual":
                x = _residual(block, x, skip if position == 0 else None, residuals[key])
            elif block.kind == "timestep":
                x = block(x, run.embedding, run.modulation.get(key))
            elif block.kind == "attention":
                x = block(x, run.conditions.keys_values.get(key, run.conditions.tokens))
            else:
                x = block(x)
        return x

    return step


def _residual(block: nn.Module, x: Tensor, skip: Tensor | None, control: Tensor | None) -> Tensor:
    if skip is not None:
        x = resize(x, skip.shape[1:3])
    if control is not None:
        x = saturate(x + resize(to_channels_last(control), x.shape[1:3]).to(x.dtype))
    return block(x, skip)


def initialise(model: Any, layers: int) -> None:
    """Starting weights of a network trained from scratch, in place; `layers` is the number of down layers.

    Source: the original implementation; its query, key and value weights are one matrix, whose Xavier bound is theirs.
    """
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    _scale_blocks(model, layers)
    nn.init.xavier_uniform_(model.embedding[1].weight, gain=0.02)
    nn.init.zeros_(model.clf[1].weight)


def _scale_blocks(model: Any, layers: int) -> None:
    for module in model.modules():
        if isinstance(module, SDCascadeAttnBlock):
            for projection in (module.attention.to_q, module.attention.to_k, module.attention.to_v):
                nn.init.xavier_uniform_(projection.weight, gain=math.sqrt(0.5))
        elif isinstance(module, (SDCascadeResBlock, SDCascadeFeedForwardBlock)):
            last: Any = module.channelwise[-1]
            with torch.no_grad():
                last.weight.mul_(math.sqrt(1 / layers))
        elif isinstance(module, SDCascadeTimestepBlock):
            for mapper in module.mappers():
                nn.init.zeros_(mapper.weight)
