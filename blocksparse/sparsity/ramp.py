"""The ramp: the masks of a network over a training, built anew from time to time until final."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from blocksparse.sparsity.gradient_scores import GradientScores
from blocksparse.sparsity.masked import MaskedWeights
from blocksparse.sparsity.plan import Plan
from blocksparse.sparsity.schedule import Schedule
from blocksparse.sparsity.straight_through import StraightThrough


@dataclass(frozen=True)
class Updates:
    """When masks are built anew, and what dropped weights learn in between.

    Parameters
    ----------
    schedule : Schedule
        How far the ramp has come.
    interval : int
        Optimizer steps between two updates.
    backward : {"masked", "straight_through"}
        What dropped weights learn: nothing, or by the gradients at the masked weights.
    decay : float
        Straight-through only: this times its value is added to the gradient of a dropped weight.
    until : float, optional
        Straight-through only: fraction of training at which the masks become final, at least the
        schedule's end; default: that end.
    """

    schedule: Schedule
    interval: int = 100
    backward: str = "masked"
    decay: float = 2e-4
    until: float | None = None

    def __post_init__(self) -> None:
        if self.interval < 1:
            raise ValueError(f"sparsity.interval is {self.interval}; it counts steps, at least 1")
        if self.backward not in ("masked", "straight_through"):
            raise ValueError(
                f"sparsity.backward is {self.backward!r}; it may be masked or straight_through"
            )
        if self.decay < 0.0:
            raise ValueError(f"sparsity.decay is {self.decay}; it cannot be negative")
        if self.until is None:
            if self.straight_through and self.schedule.start == self.schedule.end:
                raise ValueError(
                    "sparsity.backward=straight_through with a schedule of one moment: masks are "
                    "final from then on, so dropped weights never learn. Set "
                    "sparsity.update_until=1.0, as SR-STE has it, or let the schedule take time"
                )
            return
        if not self.straight_through:
            raise ValueError(
                "sparsity.update_until is set, but masks change after the ramp only where dropped "
                "weights go on learning: set sparsity.backward=straight_through, or leave "
                "sparsity.update_until at null"
            )
        if not self.schedule.end <= self.until <= 1.0:
            raise ValueError(
                f"sparsity.update_until is {self.until:g}; it is a fraction of training from the "
                f"end of the ramp, {self.schedule.end:g}, to 1"
            )

    @property
    def straight_through(self) -> bool:
        """Whether dropped weights learn."""
        return self.backward == "straight_through"

    @property
    def final_at(self) -> float:
        """Fraction of training at which the masks become final."""
        return self.schedule.end if self.until is None else self.until

    def settings(self) -> dict[str, str]:
        """Return what decides about the masks, as text."""
        learning = f" with decay {self.decay:g} until {self.final_at:g}"
        return {
            "schedule": repr(self.schedule),
            "interval": repr(self.interval),
            "backward": self.backward + (learning if self.straight_through else ""),
        }


class Ramp:
    """The masks of a network in training.

    Around each step of an optimizer come `before_step`, once the gradients are there, and
    `after_step`. Then, when `due`, masks that `build` returns are handed to `adopt`.

    Parameters
    ----------
    plan : Plan
        What happens to every layer.
    updates : Updates
        When, and how.
    state : mapping, optional
        What `state` gave in a former run.
    """

    def __init__(
        self, plan: Plan, updates: Updates, state: Mapping[str, Any] | None = None
    ) -> None:
        state = state or {}
        packed, held = state.get("masks"), state.get("held")
        self.updates = updates
        self.share: float = state.get("share", 0.0)  # of the way; it never falls
        self.updated_at: int = state.get("updated_at", 0)  # optimizer steps done then
        self.masked = MaskedWeights(plan, packed)
        if held is not None or (not state and updates.straight_through):
            self.masked = StraightThrough(plan, packed, held)
        self._gradients = (
            GradientScores(plan.score, state.get("gradients")) if plan.score.gradients else None
        )

    @property
    def plan(self) -> Plan:
        """What happens to every layer."""
        return self.masked.plan

    @property
    def finished(self) -> bool:
        """Whether the planned sparsity is reached: the ramp is over, or nothing is to prune."""
        return self.share >= 1.0 or not self.plan.pruned

    @property
    def settled(self) -> bool:
        """Whether the masks are final."""
        return self.finished and not isinstance(self.masked, StraightThrough)

    def state(self) -> dict[str, Any]:
        """Return what a resumed run needs, the plan aside: tensors and plain values."""
        masked = self.masked
        return {
            "share": self.share,
            "updated_at": self.updated_at,
            "masks": dict(masked.packed),
            "held": masked.held if isinstance(masked, StraightThrough) else None,
            "gradients": self._gradients.state if self._gradients else None,
        }

    def before_step(self, network: nn.Module, params: Collection[Tensor]) -> None:
        """Put dropped weights that learn back in place, and take note of the gradients.

        Parameters
        ----------
        network : nn.Module
            Of the plan.
        params : collection of Tensor
            The parameters that the optimizer is about to change.
        """
        if self.settled:
            return
        masked = self.masked
        if isinstance(masked, StraightThrough):
            masked.restore(network)
        if self._gradients:
            self._gradients.add(self.plan.weights(network), params)
        if isinstance(masked, StraightThrough) and self.updates.decay:
            masked.add_decay(network, self.updates.decay, params)

    def after_step(self, network: nn.Module) -> None:
        """Impose the masks there are."""
        self.masked.impose(network)

    def due(self, step: int, total: int) -> bool:
        """Say whether the masks are to be built anew once ``step`` of ``total`` steps are done."""
        if self.settled:
            return False
        updates, progress = self.updates, step / total
        if step - self.updated_at < updates.interval and progress < updates.final_at:
            return False
        return updates.straight_through or updates.schedule.at(progress) > self.share

    def build(self, network: nn.Module, step: int, total: int) -> dict[str, Tensor]:
        """Return packed masks for the weights as they are after ``step`` of ``total`` steps.

        Raises
        ------
        ValueError
            If a weight is not finite, or cannot be ranked.
        """
        masked = self.masked
        if isinstance(masked, StraightThrough):
            masked.restore(network)
        ranked = None
        if self._gradients:
            masks = None if isinstance(masked, StraightThrough) else masked.masks
            ranked = self._gradients.ranked(self.plan.weights(network), masks)
        return masked.build(network, self._share_at(step, total), ranked)

    def adopt(
        self, network: nn.Module, packed: Mapping[str, Tensor], step: int, total: int
    ) -> None:
        """Take over and impose the masks that `build` returned, here or in another process."""
        masked = self.masked
        if isinstance(masked, StraightThrough):
            masked.restore(network)
        masked.adopt(packed)
        masked.impose(network)
        self.share, self.updated_at = self._share_at(step, total), step
        if step / total >= self.updates.final_at:
            self.masked = MaskedWeights(self.plan, packed)

    def _share_at(self, step: int, total: int) -> float:
        return max(self.updates.schedule.at(step / total), self.share)
