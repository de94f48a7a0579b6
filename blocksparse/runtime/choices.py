"""The compiled engine's rows of `explain`: which kernel runs a node, and why."""

from __future__ import annotations

from blocksparse.format import BsrWeight, NMWeight, Node, Weight

from .algorithms import Algorithm
from .kernels import records
from .step import Step


def choice_of(
    node: Node, steps: list[Step], weight: Weight | None, measured: str
) -> tuple[str, str]:
    """Name the kernel of a node and say why it was chosen.

    Parameters
    ----------
    node : Node
        The node.
    steps : list of Step
        What runs it.
    weight : Weight or None
        Its weight, as the file holds it.
    measured : str
        What its ways took, or nothing.

    Returns
    -------
    kernel, reason : str
    """
    if not steps:
        if node.op == "concat":
            return "none", "its parts are written in place"
        if node.op == "slice":
            return "none", "some channels of the node before it, where they are"
        return "none", "the node before it writes its values"
    copies = sum(step.op == records.COPY for step in steps)
    product = next((step for step in steps if step.packed is not None), None)
    if product is None or product.packed is None:
        if node.op == "concat":
            return "f32_copy", f"{len(steps)} of its parts copied"
        if node.op == "slice" or copies == len(steps):
            return "f32_copy", "no weight"
        return f"f32_{node.op}", "no weight"
    tile = f"in tiles of {product.packed.rows} outputs by {product.packed.columns} inputs"
    if isinstance(weight, NMWeight):
        pattern, reason = f"nm{weight.n}of{weight.m}", f"packed {weight.n}:{weight.m}"
        reason += ", read as it is" if product.packed.group else f", run as dense {tile}"
    elif isinstance(weight, BsrWeight):
        r, c = weight.block
        pattern, reason = f"bsr{r}x{c}", f"{len(weight.indices)} blocks stored, {tile}"
    else:
        pattern, reason = "dense", f"stored dense, {tile}"
    if weight is not None and product.details.get("way", Algorithm.DIRECT).dense:
        pattern = "dense"
        if isinstance(weight, BsrWeight):
            reason = f"{len(weight.indices)} blocks stored, run as dense {tile}"
    op = {
        records.WINOGRAD: "winograd_columns",
        records.LINES_CONV: "winograd_rows",
        records.TILES_CONV: "winograd_tiles",
    }.get(product.op, node.op.removesuffix("2d"))
    if measured:
        reason += f"; {measured}"
    if copies:
        reason += "; input split into phase planes for its stride"
    if product.details.get("pools"):
        reason += "; takes in the max pool behind it"
    if product is not steps[-1]:
        reason += f"; then {node.attrs['activation']} in place"
    return f"f32_{pattern}_{op}_{node.attrs['activation']}", reason
