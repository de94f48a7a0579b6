"""Optimizer and learning rate: what moves the weights, and how far, at each point of a training."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn
from torch.optim import SGD, Optimizer
from torch.optim.lr_scheduler import LambdaLR


@dataclass(frozen=True)
class Optimization:
    """An optimizer, its learning rate over time, and its weight decay over time.

    The learning rate climbs linearly during `warmup`, holds until `hold`, and then falls to
    `final_lr` along half a cosine or a line. All times are fractions of the training, 0..1. With
    `hold` at the end of the pruning ramp the network keeps the large steps it needs to mend itself
    while blocks still disappear.

    Attributes
    ----------
    lr : float
        Learning rate between warm-up and fall.
    optimizer : callable
        Makes the optimizer from parameter groups and `lr`; SGD with Nesterov momentum 0.9 by
        default.
    weight_decay : float
        Of weights. Batch norm's parameters and biases are never decayed: shrinking them regularises
        nothing.
    weight_decay_until : float
        Time at which weight decay stops. 1: never; the end of the pruning ramp: recovery goes
        without.
    warmup, hold : float
        Ends of the first two parts.
    shape : "cosine" or "linear"
        How the learning rate falls.
    final_lr : float
        Where it ends.
    """

    lr: float = 0.1
    optimizer: Callable[..., Optimizer] | None = None
    weight_decay: float = 5e-4
    weight_decay_until: float = 1.0
    warmup: float = 0.0
    hold: float = 0.0
    shape: Literal["cosine", "linear"] = "cosine"
    final_lr: float = 0.0

    def __post_init__(self) -> None:
        if self.lr <= 0 or not 0 <= self.final_lr <= self.lr:
            raise ValueError(
                f"optimizer.lr is {self.lr} and optimizer.final_lr {self.final_lr}: lr must be "
                "above zero, and "
                "final_lr between zero and lr"
            )
        if self.weight_decay < 0:
            raise ValueError(
                f"optimizer.weight_decay is {self.weight_decay}; it cannot be negative"
            )
        for name in ("weight_decay_until", "warmup", "hold"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(
                    f"optimizer.{name} is {getattr(self, name)}: it is a fraction of the training, "
                    "0..1"
                )
        if self.shape not in ("cosine", "linear"):
            raise ValueError(f"optimizer.shape is {self.shape!r}; it may be cosine or linear")

    def make_optimizer(self, model: nn.Module, lr: float | None = None) -> Optimizer:
        """Make the optimizer of the trainable parameters, decayed and not in two groups."""
        decayed, other = _split(model.named_modules())
        groups: list[dict[str, Any]] = [
            {"params": decayed, "weight_decay": self.weight_decay},
            {"params": other, "weight_decay": 0.0},
        ]
        make = self.optimizer or _sgd
        return make([g for g in groups if g["params"]], lr=lr or self.lr)

    def make_scheduler(self, optimizer: Optimizer, total_steps: int) -> LambdaLR:
        """Make the schedule, to be stepped after every one of `total_steps` optimizer steps."""
        return LambdaLR(optimizer, lambda step: self.lr_factor(step / max(1, total_steps)))

    def lr_factor(self, time: float) -> float:
        """Return the learning rate at a time, relative to `lr`."""
        if time < self.warmup:
            # Starts at a tenth: at zero the first step would be lost.
            return 0.1 + 0.9 * time / self.warmup
        flat = max(self.hold, self.warmup)
        if time <= flat:
            return 1.0
        fallen = min(1.0, (time - flat) / (1 - flat))
        rest = (1 + math.cos(math.pi * fallen)) / 2 if self.shape == "cosine" else 1 - fallen
        floor = self.final_lr / self.lr
        return floor + (1 - floor) * rest

    def weight_decay_at(self, time: float) -> float:
        """Return the weight decay at a time."""
        return self.weight_decay if time < self.weight_decay_until else 0.0


def _sgd(groups: list[dict[str, Any]], lr: float) -> Optimizer:
    return SGD(groups, lr=lr, momentum=0.9, nesterov=True)


def _split(
    modules: Iterable[tuple[str, nn.Module]],
) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    decayed: list[nn.Parameter] = []
    other: list[nn.Parameter] = []
    seen: set[nn.Parameter] = set()
    for _, module in modules:
        for parameter in module.parameters(recurse=False):
            if parameter in seen or not parameter.requires_grad:
                continue
            seen.add(parameter)
            # Vectors are biases and the scales and shifts of normalisations.
            (decayed if parameter.ndim > 1 else other).append(parameter)
    return decayed, other
