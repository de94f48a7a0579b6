"""State: what a checkpoint says about how its network was pruned."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from blocksparse.sparsity.masks import unpack_mask
from blocksparse.sparsity.patterns import Pattern
from blocksparse.sparsity.plan import Plan

# The key of the sparsity callback's state among those of all callbacks in a Lightning checkpoint.
STATE_KEY = "SparsityCallback"


def checkpoint_plan(checkpoint: Mapping[str, Any]) -> Plan | None:
    """Return the plan in a Lightning checkpoint; None if its network was not pruned with one.

    Parameters
    ----------
    checkpoint : mapping
        As ``torch.load(path, weights_only=True)`` gives it.
    """
    state = checkpoint.get("callbacks", {}).get(STATE_KEY)
    return Plan.from_json(state["plan"]) if state else None


def checkpoint_patterns(checkpoint: Mapping[str, Any]) -> dict[str, Pattern]:
    """Return the pattern of each pruned parameter in a Lightning checkpoint, maybe none.

    Names are those of the network's own state dict, e.g. ``layer1.0.conv1.weight``.
    """
    plan = checkpoint_plan(checkpoint)
    return plan.patterns() if plan else {}


def checkpoint_masks(checkpoint: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the masks in a Lightning checkpoint: bool, of the weights' shapes, True where kept."""
    plan = checkpoint_plan(checkpoint)
    if plan is None:
        return {}
    packed = checkpoint["callbacks"][STATE_KEY]["masks"]
    shapes = {layer.param: layer.shape for layer in plan.pruned}
    return {param: unpack_mask(bits, shapes[param]) for param, bits in packed.items()}
