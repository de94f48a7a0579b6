"""How fast a network runs, and how much work there is in it.

`timing` measures callables fairly against each other; `cost` counts parameters and multiply-adds
of an exported model.
"""

from __future__ import annotations

from blocksparse.perf.cost import NodeCost, TotalCost, cost, total
from blocksparse.perf.timing import Timing, interleave

__all__ = ["NodeCost", "Timing", "TotalCost", "cost", "interleave", "total"]
