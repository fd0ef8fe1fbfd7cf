"""The moving average of the weights that train."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn


def trainable(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that train, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


@contextmanager
def averaged(model: nn.Module, ema: MovingAverage | Mapping[str, Tensor] | None) -> Iterator[None]:
    """The model with averaged weights inside the `with` block, its own again after it; None changes nothing."""
    weights = ema.weights if isinstance(ema, MovingAverage) else dict(ema or {})
    parameters = {name: own_part(parameter) for name, parameter in trainable(model).items()}
    own = {name: parameters[name].clone() for name in weights}
    try:
        for name, weight in weights.items():
            parameters[name].copy_(weight)
        yield
    finally:
        for name, weight in own.items():
            parameters[name].copy_(weight)


def own_part(parameter: Tensor) -> Tensor:
    """What this process holds of a parameter, sharing its memory: all of it, unless the parameter is sharded."""
    plain = parameter.detach()
    return plain.to_local() if hasattr(plain, "to_local") else plain


class MovingAverage:
    """Float32 averages of the parameters that train, updated every `every` steps after step `start`.

    Up to `start`, that step included, the average is a copy of the weights, taken at the same steps. Of a sharded
    model every process averages its own part.
    """

    def __init__(self, model: nn.Module, *, beta: float, start: int = 0, every: int = 1, offload: bool = False):
        """With `offload` the averages stay in main memory, page-locked where CUDA can use that."""
        if not 0 <= beta < 1:
            raise ValueError(f"ema_beta {beta} must lie in [0, 1)")
        self.beta, self.start, self.every, self.offload = beta, start, every, offload
        self.weights = {name: self._placed(own_part(weight)) for name, weight in trainable(model).items()}

    def _placed(self, weight: Tensor) -> Tensor:
        """A float32 copy of a weight where the averages are kept."""
        if not self.offload:
            return weight.float().clone()
        copied = torch.empty_like(weight, dtype=torch.float32, device="cpu", pin_memory=weight.is_cuda)
        return copied.copy_(weight)

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Take the weights after `step` updates into account."""
        if step % self.every:
            return
        beta = self.beta if step > self.start else 0.0
        parameters = trainable(model)
        if self.offload:  # one at a time, so that no second copy of them all is needed
            for name, weight in self.weights.items():
                weight.lerp_(own_part(parameters[name]).to("cpu", torch.float32), 1 - beta)
            return
        current = [own_part(parameters[name]).float() for name in self.weights]
        torch._foreach_lerp_(list(self.weights.values()), current, 1 - beta)

    @torch.no_grad()
    def take(self, model: nn.Module) -> None:
        """Make the averages a copy of the model's weights."""
        parameters = trainable(model)
        for name, weight in self.weights.items():
            weight.copy_(own_part(parameters[name]))

    def state_dict(self) -> dict[str, Tensor]:
        """The averages by parameter name."""
        return dict(self.weights)

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take over averages saved by `state_dict`.

        Raises:
            ValueError: the names are not those of the parameters that train.
        """
        if set(state) != set(self.weights):
            odd = sorted(set(state) ^ set(self.weights))[0]
            raise ValueError(
                f"the saved moving average and the model differ in '{odd}'; resume with the same settings"
            )
        for name, weight in state.items():
            self.weights[name].copy_(weight)
