"""How fast a network runs, and how much work there is in it.

`timing` measures callables fairly against each other, `cost` counts parameters and multiply-adds of
an exported model, `machine` says where a figure was measured, and `measure` finds out what that
machine can do at most.
"""

from __future__ import annotations

from blocksparse.perf.ceilings import Ceilings
from blocksparse.perf.cost import NodeCost, TotalCost, cost, total
from blocksparse.perf.machine import Machine, describe_machine
from blocksparse.perf.measure import machine_ceilings
from blocksparse.perf.timing import Timing, interleave
from blocksparse.runtime.limits import usable_cores

__all__ = [
    "Ceilings",
    "Machine",
    "NodeCost",
    "Timing",
    "TotalCost",
    "cost",
    "describe_machine",
    "interleave",
    "machine_ceilings",
    "total",
    "usable_cores",
]
