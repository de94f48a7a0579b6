"""How fast a network runs, and how much work there is in it.

`timing` measures callables fairly against each other, `cost` counts parameters and multiply-adds of
an exported model, and `machine` says where a figure was measured.
"""

from __future__ import annotations

from blocksparse.perf.cost import NodeCost, TotalCost, cost, total
from blocksparse.perf.machine import Machine, describe_machine, usable_cores
from blocksparse.perf.timing import Timing, interleave

__all__ = [
    "Machine",
    "NodeCost",
    "Timing",
    "TotalCost",
    "cost",
    "describe_machine",
    "interleave",
    "total",
    "usable_cores",
]
