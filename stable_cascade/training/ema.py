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
    parameters = trainable(model)
    own = {name: parameters[name].detach().clone() for name in weights}
    try:
        with torch.no_grad():
            for name, weight in weights.items():
                parameters[name].copy_(weight)
        yield
    finally:
        with torch.no_grad():
            for name, weight in own.items():
                parameters[name].copy_(weight)


class MovingAverage:
    """Float32 averages of the parameters that train, updated every `every` steps from step `start` on.

    Before `start` the average is a copy of the weights, taken at the same steps.
    """

    def __init__(self, model: nn.Module, *, beta: float, start: int = 0, every: int = 1):
        if not 0 <= beta < 1:
            raise ValueError(f"ema_beta {beta} must lie in [0, 1)")
        self.beta, self.start, self.every = beta, start, every
        self.weights = {name: parameter.detach().float().clone() for name, parameter in trainable(model).items()}

    @torch.no_grad()
    def update(self, model: nn.Module, step: int) -> None:
        """Take the weights after `step` updates into account."""
        if step % self.every:
            return
        beta = self.beta if step >= self.start else 0.0
        parameters = trainable(model)
        current = [parameters[name].detach().float() for name in self.weights]
        torch._foreach_lerp_(list(self.weights.values()), current, 1 - beta)

    @torch.no_grad()
    def take(self, model: nn.Module) -> None:
        """Make the averages a copy of the model's weights."""
        parameters = trainable(model)
        for name, weight in self.weights.items():
            weight.copy_(parameters[name])

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
