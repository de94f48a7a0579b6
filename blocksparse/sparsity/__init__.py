"""What may be zero: patterns, scores, allocation, schedules, and the masks that follow."""

from blocksparse.sparsity.allocation import ERK, Allocation, Global, Targets, Uniform
from blocksparse.sparsity.allocation_file import FileAllocation
from blocksparse.sparsity.channels import Channels, Group, Place, find_channels, reorder
from blocksparse.sparsity.gradient_scores import GradientScores
from blocksparse.sparsity.layers import Layers
from blocksparse.sparsity.masked import MaskedWeights
from blocksparse.sparsity.masks import layer_mask, pack_mask, plan_masks, unpack_mask
from blocksparse.sparsity.obs import OptimalBrainSurgeon
from blocksparse.sparsity.patterns import (
    NM,
    Block,
    Pattern,
    Unstructured,
    VectorNM,
    pattern_from_json,
    pattern_to_json,
)
from blocksparse.sparsity.permutation import permute
from blocksparse.sparsity.permutation_report import KeptScore, PermutationReport
from blocksparse.sparsity.plan import LayerPlan, Plan
from blocksparse.sparsity.ramp import Ramp, Updates
from blocksparse.sparsity.resolve import resolve
from blocksparse.sparsity.schedule import Cubic, Linear, OneShot, Schedule, Steps
from blocksparse.sparsity.scores import Score, l1, l2, movement, taylor
from blocksparse.sparsity.selection import Floors
from blocksparse.sparsity.state import checkpoint_masks, checkpoint_patterns, checkpoint_plan
from blocksparse.sparsity.straight_through import StraightThrough
from blocksparse.sparsity.table import plan_markdown, plan_table, save_plan

__all__ = [
    "ERK",
    "NM",
    "Allocation",
    "Block",
    "Channels",
    "Cubic",
    "FileAllocation",
    "Floors",
    "Global",
    "GradientScores",
    "Group",
    "KeptScore",
    "LayerPlan",
    "Layers",
    "Linear",
    "MaskedWeights",
    "OneShot",
    "OptimalBrainSurgeon",
    "Pattern",
    "PermutationReport",
    "Place",
    "Plan",
    "Ramp",
    "Schedule",
    "Score",
    "Steps",
    "StraightThrough",
    "Targets",
    "Uniform",
    "Unstructured",
    "Updates",
    "VectorNM",
    "checkpoint_masks",
    "checkpoint_patterns",
    "checkpoint_plan",
    "find_channels",
    "l1",
    "l2",
    "layer_mask",
    "movement",
    "pack_mask",
    "pattern_from_json",
    "pattern_to_json",
    "permute",
    "plan_markdown",
    "plan_masks",
    "plan_table",
    "reorder",
    "resolve",
    "save_plan",
    "taylor",
    "unpack_mask",
]
