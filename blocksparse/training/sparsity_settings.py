"""Settings of the sparsity callback: what dropped weights learn, and whether a resumed run agrees."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from blocksparse.sparsity import MaskedWeights, Plan, Schedule, StraightThrough


@dataclass(frozen=True)
class Backward:
    """What dropped weights learn, and until when they can come back.

    Parameters
    ----------
    kind : {"masked", "straight_through"}
        Nothing, or by the gradients at the masked weights.
    decay : float
        Straight-through only: this times its value is added to the gradient of a dropped weight.
    update_until : float or None
        Straight-through only: fraction of training until which masks are built anew, at least the
        schedule's end; None: that end.
    schedule : Schedule
        Of the ramp.
    """

    kind: str
    decay: float
    update_until: float | None
    schedule: Schedule

    def __post_init__(self) -> None:
        if self.kind not in ("masked", "straight_through"):
            raise ValueError(
                f"sparsity.backward is {self.kind!r}; it may be masked or straight_through"
            )
        if self.decay < 0.0:
            raise ValueError(f"sparsity.decay is {self.decay}; it cannot be negative")
        if self.update_until is None:
            return
        if not self.straight_through:
            raise ValueError(
                "sparsity.update_until is set, but masks change after the ramp only where dropped "
                "weights go on learning: set sparsity.backward=straight_through, or leave "
                "sparsity.update_until at null"
            )
        if not self.schedule.end <= self.update_until <= 1.0:
            raise ValueError(
                f"sparsity.update_until is {self.update_until:g}; it is a fraction of training "
                f"from the end of the ramp, {self.schedule.end:g}, to 1"
            )

    def __str__(self) -> str:
        if not self.straight_through:
            return self.kind
        return f"{self.kind} until {self.until:g} with decay {self.decay:g}"

    @property
    def straight_through(self) -> bool:
        """Whether dropped weights learn."""
        return self.kind == "straight_through"

    @property
    def until(self) -> float:
        """Fraction of training from which the masks are final."""
        return self.schedule.end if self.update_until is None else self.update_until

    def masked_weights(self, plan: Plan) -> MaskedWeights:
        """Return the masks of a plan, everything kept."""
        return StraightThrough(plan) if self.straight_through else MaskedWeights(plan)


def check_settings(loaded: Mapping[str, str], own: Mapping[str, str]) -> None:
    """Refuse to go on with other settings than those in a checkpoint.

    Raises
    ------
    ValueError
        Names what differs.
    """
    differing = [key for key in own if loaded.get(key) != own[key]]
    if differing:
        listed = "; ".join(
            f"{key}: {loaded.get(key)} in the checkpoint, {own[key]} here" for key in differing
        )
        raise ValueError(
            f"the checkpoint was pruned with other sparsity settings ({listed}). Resume with "
            "the same ones, or start a new training from its weights with "
            "sparsity.initial=from_model"
        )
