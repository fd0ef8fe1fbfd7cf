"""Reading LoRA files of any tool: what every key holds, and whether the tensors fit each other."""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from os import PathLike
from pathlib import Path
from typing import Any

from torch import Size, Tensor

from stable_cascade.disk import local_path
from stable_cascade.files.tensor_files import read_weights
from stable_cascade.wording import brief, quoted

from .keys import POSITIONAL, TOKENS, Shapes, detect, ours, place, spelled
from .metadata import ADAPTER_NAMES, CONFIG_NAME, METADATA_KEY, alpha_of, read_metadata, read_peft_config, sound
from .original import from_original_lora, original_tokens
from .parts import TENSORS, Part, is_depthwise, layers_of


def read(source: str | PathLike[str] | Mapping[str, Tensor]) -> LoraFile:
    """A LoRA file, or a state dict with its keys, of any format of `FORMATS` and `READ_ONLY`.

    Raises:
        ValueError: it cannot be read, is of no known format, or its tensors do not fit each other.
    """
    header: dict[str, str] = {}
    if isinstance(source, Mapping):
        name, tensors = "state dict", dict(source)
    else:
        name = str(source)
        tensors, header = read_weights(source)
    try:
        lora = _parsed(name, tensors, header)
    except ValueError as problem:
        raise ValueError(f"LoRA {quoted(name)} {problem}") from None
    return lora if isinstance(source, Mapping) else _with_config(lora, local_path(source))


def _with_config(lora: LoraFile, path: Path) -> LoraFile:
    """The LoRA with the config that PEFT has written beside it; a file that tells its own scale keeps that."""
    known = lora.metadata or any(lora.alphas.values()) or lora.format != "peft"
    if known or path.name not in ADAPTER_NAMES or not (path.parent / CONFIG_NAME).is_file():
        return lora
    component, config = read_peft_config(path.parent)
    wrong = next((key for key, value in config.items() if not sound(key, value)), None)
    if wrong is not None:
        raise ValueError(f"{quoted(path.parent / CONFIG_NAME)} has {quoted(config[wrong], 60)} as {wrong}; mend it")
    if config.get("use_dora") and not any("magnitude" in key for part in lora.parts.values() for key in part):
        raise ValueError(f"{quoted(path)} has no DoRA magnitudes, and its {CONFIG_NAME} says use_dora; get it again")
    # PEFT's own keys name no component: the config may note the network's class.
    unnamed = list(lora.parts) == ["prior"]
    parts = {component: lora.parts["prior"]} if component and unnamed else lora.parts
    return replace(lora, parts=parts, metadata=dict.fromkeys(parts, config), bare=unnamed and component is None)


def _parsed(name: str, tensors: dict[str, Tensor], header: dict[str, str]) -> LoraFile:
    # Only finite tensors.
    wrong = next((key for key in tensors if not isinstance(key, str) or not isinstance(tensors[key], Tensor)), None)
    if wrong is not None:
        raise ValueError(f"has {quoted(wrong)}, which is no tensor")
    broken = next((key for key, value in tensors.items() if not _finite(value)), None)
    if broken is not None:
        raise ValueError(
            f"has values in {quoted(broken, 80)} that are not finite: its training diverged; train it again"
        )
    # Which tool wrote it; the original's layers are numbered and get their names later.
    format = detect(tensors, header)
    metadata = read_metadata(header)
    kept = {key: value for key, value in header.items() if key not in (METADATA_KEY, "format")}
    if format == "original":
        weights = {key: value for key, value in tensors.items() if POSITIONAL.fullmatch(key)}
        _all_known(tensors, [*weights, "embeddings.indices", "embeddings.embeddings"])
        return LoraFile(name, format, {"prior": weights}, metadata, token_deltas=original_tokens(tensors), header=kept)
    # Sort every key into a component's factors or alphas.
    parts: dict[str, dict[str, Tensor]] = {}
    alphas: dict[str, dict[str, float]] = {}
    for key, value in tensors.items():
        if TOKENS.fullmatch(key):
            continue
        found = place(key)
        if found is None:
            raise ValueError(f"has the key {quoted(key, 80)}, which belongs to no layer of a LoRA")
        if found.what == "alpha":
            target: dict[str, Any] = alphas.setdefault(found.component, {})
            _put(target, found.layer, _alpha(key, value), key)
        else:
            _put(parts.setdefault(found.component, {}), f"{found.layer}.{found.what}", value, key)
    # Every layer must be whole; then the tokens.
    for component in {*parts, *alphas}:
        _check(parts.get(component, {}), alphas.get(component, {}))
    tokens, outputs = _tokens(tensors)
    return LoraFile(name, format, parts, metadata, alphas, {}, tokens, outputs, kept)


def _finite(value: Tensor) -> bool:
    """Whether no value is infinite or not a number; of integers none is."""
    if not value.is_floating_point():
        return True
    return bool((value if value.element_size() > 1 else value.float()).isfinite().all())


def _put(values: dict[str, Any], name: str, value: Any, key: str) -> None:
    if name in values:
        raise ValueError(f"has two tensors for {quoted(name, 80)}, one of them {quoted(key, 80)}")
    values[name] = value


def _all_known(tensors: Mapping[str, Tensor], known: Sequence[str]) -> None:
    odd = next(iter(tensors.keys() - set(known)), None)
    if odd is not None:
        raise ValueError(f"has the key {quoted(odd, 80)} among numbered weights, unlike the original's files")


def _alpha(key: str, value: Tensor) -> float:
    """An alpha as a number. Shapes: () or (1,)."""
    number = float(value.item()) if value.numel() == 1 and not value.is_complex() else math.nan
    if not math.isfinite(number) or not number:
        what = brief(number) if value.numel() == 1 else f"of shape {list(value.shape)}"
        raise ValueError(f"has {quoted(key, 80)} {what}; one finite number other than 0 is needed")
    return number


def _check(part: Mapping[str, Tensor], alphas: Mapping[str, float]) -> None:
    """Passes when every layer has both factors of one rank, and nothing lies about without them."""
    # No factor without its partner, and no integers.
    layers = set(layers_of(part))
    for key, value in part.items():
        what = next(what for what in TENSORS if key.endswith(f".{what}") or key == what)
        layer = key.removesuffix(what).removesuffix(".")
        if layer not in layers:
            raise ValueError(f"has {quoted(key, 80)} and lacks its first factor (lora_A or lora_down)")
        if f"{layer}.lora_B.weight" not in part:
            raise ValueError(f"has {quoted(f'{layer}.lora_A.weight', 80)} and lacks its lora_B (lora_up)")
        if not value.is_floating_point() or value.element_size() < 2:
            raise ValueError(f"has {quoted(key, 80)} as {value.dtype}, and floating-point values are needed")
    odd = next(iter(alphas.keys() - layers), None)
    if odd is not None:
        raise ValueError(f"has an alpha for {quoted(odd, 80)} but no factors")
    # Both factors have the same rank.
    for layer in layers:
        down, up = part[f"{layer}.lora_A.weight"], part[f"{layer}.lora_B.weight"]
        if min(down.ndim, up.ndim) < 2 or max(down.ndim, up.ndim) > 4 or len(down) != up.shape[1] or not len(down):
            raise ValueError(
                f"has factors of {list(down.shape)} and {list(up.shape)} for {quoted(layer, 80)}; (rank, inputs) and "
                "(outputs, rank) are needed"
            )


def _tokens(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Rows of the bundled tokens, input and output ones. Shapes: (n, D) per token."""
    found: tuple[dict[str, Tensor], dict[str, Tensor]] = {}, {}
    for key, value in tensors.items():
        match = TOKENS.fullmatch(key)
        if match:
            if value.ndim not in (1, 2) or not value.numel() or not value.is_floating_point():
                raise ValueError(f"has {quoted(key, 80)} of shape {list(value.shape)}; rows of a token are needed")
            found[bool(match[2])][match[1]] = value if value.ndim == 2 else value[None]
    return found


FILTERS_KEY = "module_filters"
"""Header entry of our original files: the filters of the training, separated by spaces."""


@dataclass(frozen=True)
class LoraFile:
    """A LoRA as read: tensors by component under the file's own names, and all that came with them.

    Attributes:
        name: what was read, for errors.
        format: a name of `FORMATS` or `READ_ONLY`.
        parts: component -> the file's layer and PEFT's ending -> tensor; numbered weights for the original's.
        alphas: component -> the file's layer -> alpha, where the file has it as a tensor.
        metadata: component -> LoraConfig values of the header.
        token_deltas: token id -> what to add to its row (the original's).
        tokens: token -> its rows (OneTrainer's).
        output_tokens: token -> rows that OneTrainer puts into the text encoder's output.
        header: the other entries of the header.
        bare: whether neither its names nor anything beside them says which network it is for; it is taken for the
            prior's until its layers are looked at.
    """

    name: str
    format: str
    parts: dict[str, dict[str, Tensor]]
    metadata: dict[str, dict[str, Any]] = field(default_factory=dict)
    alphas: dict[str, dict[str, float]] = field(default_factory=dict)
    token_deltas: dict[int, Tensor] = field(default_factory=dict)
    tokens: dict[str, Tensor] = field(default_factory=dict)
    output_tokens: dict[str, Tensor] = field(default_factory=dict)
    header: dict[str, str] = field(default_factory=dict)
    bare: bool = False

    @property
    def layout(self) -> str:
        """`original` for the original's files, else `peft`, as which all others come out."""
        return "original" if self.format == "original" else "peft"

    def part(self, component: str, shapes: Shapes, module_filters: Sequence[str] | None = None) -> Part:
        """One component's update under the names of a network.

        Args:
            shapes: weight shape of every linear and convolution layer of the network.
            module_filters: of the training, for the original's files that do not store them.

        Raises:
            ValueError: it has nothing for the component, or updates what this network lacks.
        """
        if component not in self.parts:
            raise ValueError(f"{quoted(self.name)} has nothing for the {component}; it has {', '.join(self.parts)}")
        try:
            if self.format == "original":
                filters = module_filters or self.header.get(FILTERS_KEY, "").split() or None
                tensors = from_original_lora(self.parts[component], shapes, filters)
                return Part(tensors, dict.fromkeys(layers_of(tensors), 1.0), self.metadata.get(component, {}))
            alphas, config = self.alphas.get(component, {}), self.metadata.get(component, {})
            # Other tools write an alpha for each layer or none; a LoraConfig is what PEFT goes by.
            by_config = self.format == "peft" and not alphas
            return renamed(
                self.parts[component], alphas, config, shapes=shapes, component=component, by_config=by_config
            )
        except ValueError as problem:
            raise ValueError(f"{quoted(self.name)} {problem}") from None

    def own_shapes(self, component: str) -> dict[str, Size]:
        """Weight shapes of the layers that a file with dotted names updates, under our names, from its tensors.

        Raises:
            ValueError: its names are numbered or flattened, so that the network is needed.
        """
        if self.format == "original" or any(
            _is_flat(self.format, layer) for layer in layers_of(self.parts[component])
        ):
            raise ValueError(f"{quoted(self.name)} has names that only its network explains; give base")
        shapes = {}
        for layer in layers_of(self.parts[component]):
            down, up = (self.parts[component][f"{layer}.lora_{factor}.weight"] for factor in "AB")
            names = ours(layer)
            for name in names:
                shapes[name] = Size((len(up) // len(names), *down.shape[1:]))
        return shapes


def _is_flat(format: str, layer: str) -> bool:
    return format in ("kohya", "onetrainer", "onetrainer_kohya", "lycoris") and "." not in layer


def renamed(
    part: Mapping[str, Tensor],
    alphas: Mapping[str, float],
    config: Mapping[str, Any],
    *,
    shapes: Shapes,
    component: str,
    by_config: bool,
) -> Part:
    """A component under our names and in our layers' shapes.

    Args:
        by_config: whether the config tells the alphas that `alphas` does not; else they are the ranks.

    Raises:
        ValueError: the network lacks a layer, has it in another shape, or two names mean the same layer.
    """
    table = spelled(shapes)
    tensors: dict[str, Tensor] = {}
    scales: dict[str, float] = {}
    for layer in layers_of(part):
        # The layers of ours that a name of theirs stands for: three for a joined matrix.
        names = table.get(layer)
        if names is None:
            nearest = difflib.get_close_matches(layer, list(shapes)[:2000], n=1, cutoff=0) if len(layer) < 200 else []
            hint = f"; nearest: '{nearest[0]}'" if nearest else ""
            raise ValueError(f"updates {quoted(layer, 80)}, which this {component} lacks{hint}")
        # Fit the tensors into the layers' shapes, each with its scale.
        own = {what: part[f"{layer}.{what}"] for what in TENSORS if f"{layer}.{what}" in part}
        rank = len(own["lora_A.weight"])
        for number, name in enumerate(names):
            if name in scales:
                raise ValueError(f"updates '{name}' twice, once as {quoted(layer, 80)}")
            values = own if len(names) == 1 else _third(own, number, layer)
            _fits(name, values, shapes[name], component)
            tensors |= {f"{name}.{what}": value for what, value in _shaped(values, shapes[name]).items()}
            scales[name] = alpha_of(name, rank, config) if by_config else alphas.get(layer, rank)
    return Part(tensors, scales, dict(config))


def _third(own: Mapping[str, Tensor], number: int, layer: str) -> dict[str, Tensor]:
    """The rows of q, k or v of an update of all three, which share the first factor."""
    if "dora_scale" in own and own["dora_scale"].shape[0] == 1:
        raise ValueError(f"has one magnitude of the inputs for q, k and v, {quoted(layer, 80)}, which does not split")
    joined = {what: value for what, value in own.items() if what != "lora_A.weight"}
    rows = {what: value.chunk(3)[number] for what, value in joined.items() if len(value) % 3 == 0}
    if len(rows) < len(joined):
        raise ValueError(f"has rows of {quoted(layer, 80)} that do not divide into q, k and v")
    return {"lora_A.weight": own["lora_A.weight"], **rows}


def _fits(name: str, own: Mapping[str, Tensor], shape: Size, component: str) -> None:
    """Passes when the factors are of the layer's shape, or of a depthwise convolution's as OneTrainer has it."""
    down, up = own["lora_A.weight"], own["lora_B.weight"]
    inputs, outputs = math.prod(down.shape[1:]), math.prod((len(up), *up.shape[2:]))
    if (outputs, inputs) == (shape[0], math.prod(shape[1:])):
        return
    if is_depthwise(shape) and tuple(down.shape[1:]) == (shape[0], *shape[2:]) and outputs == 1:
        return
    raise ValueError(
        f"updates '{name}' as {outputs}x{inputs}, this {component} has {shape[0]}x{math.prod(shape[1:])} there"
    )


def _shaped(own: Mapping[str, Tensor], shape: Size) -> dict[str, Tensor]:
    """The tensors in the layer's number of axes, magnitudes as PEFT has them, the inputs' as OneTrainer."""
    down, up = own["lora_A.weight"], own["lora_B.weight"]
    inner = tuple(down.shape[1:]) if math.prod(down.shape[1:]) != math.prod(shape[1:]) else tuple(shape[1:])
    ones = (1,) * (len(shape) - 2)
    values = {
        "lora_A.weight": down.reshape(len(down), *inner).contiguous(),
        "lora_B.weight": up.reshape(len(up), len(down), *ones).contiguous(),
    }
    if "lora_B.bias" in own:
        values["lora_B.bias"] = own["lora_B.bias"].contiguous()
    for what in ("lora_magnitude_vector", "dora_scale"):
        if what in own:
            values |= _magnitude(own[what], shape, what == "dora_scale")
    return values


def _magnitude(value: Tensor, shape: Size, by_name: bool) -> dict[str, Tensor]:
    """A DoRA magnitude: of the outputs (PEFT's) or of the inputs, by its shape.

    `dora_scale` is (O, 1, …) or (1, I, …); PEFT's vector is (O,), and (1, O, 1, 1) for a convolution.
    """
    outputs = (1, shape[0], *[1] * (len(shape) - 2)) if len(shape) > 2 else (shape[0],)
    of_inputs = by_name and value.ndim > 1 and value.shape[0] == 1 and shape[0] > 1
    if of_inputs and value.numel() == shape[1]:
        return {"dora_scale": value.reshape(1, shape[1], *[1] * (len(shape) - 2)).contiguous()}
    if not of_inputs and value.numel() == shape[0]:
        return {"lora_magnitude_vector": value.reshape(outputs).contiguous()}
    raise ValueError(f"has a DoRA magnitude of {list(value.shape)} for a layer of {shape[0]}x{shape[1]}")
