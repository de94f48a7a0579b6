"""What there is to choose about a micro-kernel, and its name."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Kernel:
    """A micro-kernel by its parameters.

    Parameters
    ----------
    op : {"sparse_conv", "sparse_product", "sparse_tail", "nm_conv", "sparse_linear", "nm_linear", \
          "winograd_input", "winograd_output", "line_input", "line_output", \
          "tile_input", "tile_output", "copy_phases", "pool_max", "pool_avg", \
          "pointwise_same", "pointwise_add", "pointwise_mul", "pointwise_gate", \
          "pointwise_affine"}
        Which product, transform or move.
    rows : int
        Output channels in the tile; for a pool the height of its window; for the output of tiles
        height and width of the windows that are pooled at once, 1 or 2.
    columns : int
        Input channels of a block; for N:M the nonzeros kept of each group (n); for a pool the width
        of its window; for tiles the tile rows of a unit.
    width : int
        Vectors of pixels, or images for the linear products, or pixels of a tail; for a pool its
        column stride; for Winograd's transforms the taps.
    group : int
        For N:M the group length m, else 0.
    activation : str
        What is applied at the end; "none" where a product takes bounds.
    """

    op: str
    rows: int = 1
    columns: int = 1
    width: int = 1
    group: int = 0
    activation: str = "none"

    @property
    def name(self) -> str:
        """The symbol: dtype, pattern, op, tile."""
        pattern, op = self.op.split("_")
        named = pattern == "pointwise" or self.activation != "none"
        return self._tile(pattern, op) + (f"_{self.activation}" if named else "")

    def _tile(self, pattern: str, op: str) -> str:
        if pattern in ("copy", "pointwise"):
            return f"f32_{self.op}"
        if pattern in ("winograd", "line"):
            return f"f32_{self.op}_r{self.width}"
        if pattern == "tile":
            return f"f32_{self.op}_g{self.columns}" + ("_max" if self.rows > 1 else "")
        if pattern == "pool":
            return f"f32_{self.op}_{self.rows}x{self.columns}s{self.width}"
        if pattern == "nm":
            block = f"nm{self.columns}of{self.group}"
        else:
            block = f"bsr{self.rows}x{self.columns}"
        return f"f32_{block}_{op}_{'t' if op == 'linear' else 'v'}{self.width}"
