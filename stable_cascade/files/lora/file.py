"""A LoRA file of any tool as read, and what each of its parts means on a network."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Size, Tensor

from stable_cascade.wording import quoted

from .names import Shapes, ours
from .original import from_original_lora
from .part import Part, layers_of
from .renaming import renamed

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
        """Weight shapes of the layers that a file with dotted names updates, under our names, told by its tensors.

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
