"""What moves the parameters: the optimizer, the learning rate's course, and the moving average of the weights."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from stable_cascade.config import OptimizerSettings

FULL_RATE = "full_lr"
"""A parameter group's learning rate after the warm-up, where groups have rates of their own."""


def build_optimizer(
    settings: OptimizerSettings, parameters: Sequence[nn.Parameter] | Sequence[dict[str, Any]]
) -> torch.optim.Optimizer:
    """AdamW over the parameters that train, or over groups of them.

    Raises:
        ValueError: `adamw_8bit` without bitsandbytes.
    """
    options: dict[str, Any] = {
        "lr": settings.lr,
        "betas": settings.adam_betas,
        "eps": settings.adam_epsilon,
        "weight_decay": settings.weight_decay,
    }
    check_optimizer(settings)
    if settings.optimizer == "adamw_8bit":
        from bitsandbytes.optim import AdamW8bit

        return AdamW8bit(parameters, **options)
    # The fused kernel is several times faster on the CPU than the default loop over tensors.
    return torch.optim.AdamW(parameters, fused=True, **options)


def check_optimizer(settings: OptimizerSettings) -> None:
    """Passes when the optimizer's package is there; it is not imported, which takes seconds.

    Raises:
        ValueError: `adamw_8bit` without bitsandbytes.
    """
    if settings.optimizer == "adamw_8bit" and not is_installed("bitsandbytes"):
        raise ValueError("optimizer adamw_8bit needs bitsandbytes; pip install bitsandbytes, or set optimizer: adamw")


def is_installed(package: str) -> bool:
    """Whether a package can be imported, without doing so."""
    try:
        return importlib.util.find_spec(package) is not None
    except ValueError:  # its place in sys.modules says None
        return False


def parameter_groups(named: Mapping[str, nn.Parameter], learning_rate: Callable[[str], float] | None) -> list[Any]:
    """The parameters as one group per learning rate, in the order of their names; plain parameters without rates.

    Raises:
        ValueError: a rate is negative or not finite.
    """
    if learning_rate is None:
        return list(named.values())
    groups: dict[float, list[nn.Parameter]] = {}
    for name, parameter in named.items():
        rate = float(learning_rate(name))
        if not 0 <= rate < math.inf:
            raise ValueError(f"learning rate {rate} of '{name}' is not a finite number from 0; correct the rates")
        groups.setdefault(rate, []).append(parameter)
    return [{"params": group, "lr": rate, FULL_RATE: rate} for rate, group in groups.items()]


def learning_rate_share(name: str, step: int, *, warmup: int, updates: int, final: float = 0.0) -> float:
    """The share of the full learning rate in the step with number `step`, counted from 0.

    Step k of a warm-up over n steps uses (k + 1) / n, so that no step is idle.

    Raises:
        ValueError: the schedule is not one of constant, linear, cosine, polynomial, inverse_sqrt.
    """
    if step < warmup:
        return (step + 1) / warmup
    done = min(1.0, (step - warmup) / max(1, updates - warmup))
    if name == "constant":
        return 1.0
    if name == "linear":
        return final + (1 - final) * (1 - done)
    if name == "cosine":
        return final + (1 - final) * (1 + math.cos(math.pi * done)) / 2
    if name == "polynomial":
        return final + (1 - final) * (1 - done) ** 2
    if name == "inverse_sqrt":
        return math.sqrt(max(1, warmup) / (step + 1))
    raise ValueError(f"lr_scheduler '{name}' is not one of constant, linear, cosine, polynomial, inverse_sqrt")


def set_learning_rate(optimizer: torch.optim.Optimizer, settings: OptimizerSettings, step: int, updates: int) -> float:
    """Give every parameter group the learning rate of this step; returns that of groups without a rate of their own.

    The rate is a function of the step alone, so there is no scheduler whose state could be lost.
    """
    share = learning_rate_share(
        settings.lr_scheduler,
        step,
        warmup=settings.warmup_updates,
        updates=updates,
        final=settings.lr_final_share,
    )
    for group in optimizer.param_groups:
        group["lr"] = group.get(FULL_RATE, settings.lr) * share
    return settings.lr * share


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
