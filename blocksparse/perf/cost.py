"""How much work and how many parameters there are in an exported model, node by node.

Counted are the convolutions and the linear layers: one multiply-add per weight and output pixel,
FLOPs being twice that. Bias, activation, residual addition and pooling are left out, as in the
papers. *Dense* counts every weight of the layer's shape; *kept* counts the weights that are
stored, which are the ones the runtime multiplies. The zeros that fill up ragged edges of blocks
and groups are neither.
"""

# K out-channels, C in-channels of one group, R S kernel rows and columns, P output pixels,
# r c block rows and columns, n of m the N:M pattern.

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import prod

import numpy as np

from blocksparse.format.model import Model
from blocksparse.format.weights import BsrWeight, NMWeight, Weight


@dataclass(frozen=True)
class NodeCost:
    """What one node of the graph costs, for one image.

    Attributes
    ----------
    name, op : str
        The node.
    parameters_dense, parameters_kept : int
        Numbers in the layer if it were dense, and stored ones; bias, scale and shift in both.
    macs_dense, macs_kept : int
        Multiply-adds per image, with every weight and with the stored ones.
    """

    name: str
    op: str
    parameters_dense: int
    parameters_kept: int
    macs_dense: int
    macs_kept: int

    @property
    def flops_dense(self) -> int:
        """Floating-point operations per image with every weight."""
        return 2 * self.macs_dense

    @property
    def flops_kept(self) -> int:
        """Floating-point operations per image with the stored weights."""
        return 2 * self.macs_kept


@dataclass(frozen=True)
class TotalCost:
    """The sum over nodes; attributes as in `NodeCost`."""

    parameters_dense: int
    parameters_kept: int
    macs_dense: int
    macs_kept: int

    @property
    def flops_dense(self) -> int:
        """Floating-point operations per image with every weight."""
        return 2 * self.macs_dense

    @property
    def flops_kept(self) -> int:
        """Floating-point operations per image with the stored weights."""
        return 2 * self.macs_kept

    @property
    def parameter_density(self) -> float:
        """Kept share of all parameters, 0..1 (1 for a model without any)."""
        return self.parameters_kept / self.parameters_dense if self.parameters_dense else 1.0

    @property
    def flop_density(self) -> float:
        """Kept share of all multiply-adds, 0..1 (1 for a model without any)."""
        return self.macs_kept / self.macs_dense if self.macs_dense else 1.0


def stored_weights(weight: Weight) -> int:
    """Count the stored weights of a layer that lie inside its real shape.

    Parameters
    ----------
    weight : DenseWeight, BsrWeight or NMWeight
        The layer's weight, shape [K, C, R, S] or [O, F].

    Returns
    -------
    int
        Never more than the product of the shape: edge blocks and edge groups count only their
        rows and channels that exist.
    """
    if isinstance(weight, BsrWeight):
        out_channels, in_channels = weight.shape[:2]
        rows, columns = weight.block
        blocks_across = -(-in_channels // columns)
        block_row = np.repeat(np.arange(weight.indptr.size - 1), np.diff(weight.indptr))
        block_column = weight.indices % blocks_across
        real_rows = np.minimum(rows, out_channels - block_row * rows)
        real_columns = np.minimum(columns, in_channels - block_column * columns)
        return int((real_rows * real_columns).sum())
    if isinstance(weight, NMWeight):
        in_channels = weight.shape[1]
        whole, rest = divmod(in_channels, weight.m)
        per_position = whole * weight.n + min(weight.n, rest)
        return weight.shape[0] * prod(weight.shape[2:]) * per_position
    return prod(weight.shape)


def cost(model: Model) -> list[NodeCost]:
    """Count parameters and multiply-adds of every node of a model.

    Parameters
    ----------
    model : Model
        An exported model.

    Returns
    -------
    list of NodeCost
        One entry per node, in execution order; nodes without parameters cost zero.
    """
    return [_node_cost(model, index) for index in range(len(model.graph.nodes))]


def total(costs: Iterable[NodeCost]) -> TotalCost:
    """Add up the costs of nodes."""
    rows = list(costs)
    return TotalCost(
        parameters_dense=sum(row.parameters_dense for row in rows),
        parameters_kept=sum(row.parameters_kept for row in rows),
        macs_dense=sum(row.macs_dense for row in rows),
        macs_kept=sum(row.macs_kept for row in rows),
    )


def _node_cost(model: Model, index: int) -> NodeCost:
    node = model.graph.nodes[index]
    vectors = (f"{node.name}.{part}" for part in ("bias", "scale", "shift"))
    extra = sum(model.vectors[name].size for name in vectors if name in model.vectors)
    weight = model.weights.get(node.name)
    if weight is None:
        return NodeCost(node.name, node.op, extra, extra, 0, 0)
    dense, kept = prod(weight.shape), stored_weights(weight)
    pixels = prod(node.shape[1:])  # 1 for a linear layer, whose shape is (O,)
    return NodeCost(node.name, node.op, dense + extra, kept + extra, dense * pixels, kept * pixels)
