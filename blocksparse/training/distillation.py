"""Learning from the dense network: knowledge distillation (G. Hinton et al., arXiv:1503.02531).

Several networks together teach more than one of them (section 5 there). Features are followed as in
FitNets (A. Romero et al., arXiv:1412.6550), without its regressor, as pruning leaves every feature
map its shape; each is divided by its size, as the SquareHead loss does (E. Kurtic et al.,
arXiv:2310.06927).
"""

# N batch, K classes.

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Distillation:
    """How much, and how softly, to follow a teacher.

    The loss is (1 - weight) * cross entropy + weight * T^2 * KL(teacher || student) + features *
    error, both distributions softened by the temperature T. T^2 keeps the gradients' size the same
    at every temperature. The error is that of `feature_error`.

    Attributes
    ----------
    temperature : float
        1 follows the teacher's probabilities; above, its small ones count more.
    weight : float
        Share of the teacher's logits in the loss, 0..1.
    features : float
        Weight of the feature maps' error, from 0, which ignores them. The error is a small number,
        so a useful weight is large. The teacher's maps of a batch, and their differences from the
        student's, stay in memory until the backward pass.
    cutmix : float
        Share of the batches whose images are cut together from two each, 0..1. There only the
        teacher is followed, and labels do not count: what it says of images that neither network
        was trained on tells more about it than its certainty on those it was (L. Beyer et al.,
        arXiv:2106.05237).
    teachers : sequence of mappings
        Trained networks that are followed together with the dense one, see `Ensemble`: arguments
        of `build_model`, `name` and `weights` among them.
    """

    temperature: float = 4.0
    weight: float = 0.7
    features: float = 0.0
    cutmix: float = 0.0
    teachers: Sequence[Mapping[str, Any]] = ()

    def __post_init__(self) -> None:
        if self.temperature <= 0:
            raise ValueError(
                f"distillation.temperature is {self.temperature}; it must be above zero"
            )
        if not 0 <= self.weight <= 1:
            raise ValueError(f"distillation.weight is {self.weight}; it is a share, 0..1")
        if not 0 <= self.cutmix <= 1:
            raise ValueError(
                f"distillation.cutmix is {self.cutmix}; it is a share of the batches, 0..1"
            )
        if not 0 <= self.features < math.inf:
            raise ValueError(
                f"distillation.features is {self.features}; it is a weight, zero or above"
            )
        for place, teacher in enumerate(self.teachers):
            given = teacher if isinstance(teacher, Mapping) else {}
            if None in (given.get("name"), given.get("weights")):
                raise ValueError(
                    f"distillation.teachers[{place}] is {teacher}; it must have a name and "
                    "weights, such as {name: resnet56, weights: resnet56.safetensors}"
                )
        if self.teachers and self.features:
            raise ValueError(
                "distillation.features follows the feature maps of the dense network, and "
                "distillation.teachers have others: leave one of the two"
            )

    def divergence(self, student: Tensor, teacher: Tensor) -> Tensor:
        """Return T^2 * KL(teacher || student), averaged over the batch.

        Parameters
        ----------
        student, teacher : tensor [N, K]
            Logits.
        """
        t = self.temperature
        divergence = F.kl_div(
            F.log_softmax(student / t, dim=1),
            F.log_softmax(teacher / t, dim=1),
            reduction="batchmean",
            log_target=True,
        )
        return divergence * t**2

    def mix(self, loss: Tensor, divergence: Tensor) -> Tensor:
        """Mix the loss against the labels with the divergence from the teacher."""
        return (1 - self.weight) * loss + self.weight * divergence


class Ensemble(nn.Module):
    """Several networks whose logits are averaged.

    Parameters
    ----------
    networks : iterable of nn.Module
        All take the same images, and tell the same classes apart.
    """

    def __init__(self, networks: Iterable[nn.Module]) -> None:
        super().__init__()
        self.networks = nn.ModuleList(networks)

    def forward(self, images: Tensor) -> Tensor:
        """Return the mean of the networks' logits [N, K]."""
        logits: Tensor = sum(network(images) for network in self.networks)
        return logits / len(self.networks)
