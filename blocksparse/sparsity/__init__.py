"""What may be zero: patterns, scores, allocation, schedules, and the masks that follow."""

from blocksparse.sparsity.allocation import ERK, Allocation, Global, Targets, Uniform
from blocksparse.sparsity.allocation_file import FileAllocation
from blocksparse.sparsity.layers import Layers
from blocksparse.sparsity.masked import MaskedWeights
from blocksparse.sparsity.masks import layer_mask, pack_mask, plan_masks, unpack_mask
from blocksparse.sparsity.patterns import (
    NM,
    Block,
    Pattern,
    Unstructured,
    VectorNM,
    pattern_from_json,
    pattern_to_json,
)
from blocksparse.sparsity.plan import LayerPlan, Plan
from blocksparse.sparsity.resolve import resolve
from blocksparse.sparsity.schedule import Cubic, Linear, OneShot, Schedule
from blocksparse.sparsity.scores import Score, l1, l2
from blocksparse.sparsity.selection import Floors
from blocksparse.sparsity.state import checkpoint_masks, checkpoint_patterns, checkpoint_plan
from blocksparse.sparsity.table import plan_markdown, plan_table, save_plan

__all__ = [
    "ERK",
    "NM",
    "Allocation",
    "Block",
    "Cubic",
    "FileAllocation",
    "Floors",
    "Global",
    "LayerPlan",
    "Layers",
    "Linear",
    "MaskedWeights",
    "OneShot",
    "Pattern",
    "Plan",
    "Schedule",
    "Score",
    "Targets",
    "Uniform",
    "Unstructured",
    "VectorNM",
    "checkpoint_masks",
    "checkpoint_patterns",
    "checkpoint_plan",
    "l1",
    "l2",
    "layer_mask",
    "pack_mask",
    "pattern_from_json",
    "pattern_to_json",
    "plan_markdown",
    "plan_masks",
    "plan_table",
    "resolve",
    "save_plan",
    "unpack_mask",
]
