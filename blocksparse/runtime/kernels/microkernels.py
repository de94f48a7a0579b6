"""The micro-kernels, written as LLVM vector code.

Four products share one idea: activations lie in memory so that a whole vector is useful, a weight
is broadcast against it, and a zero weight skips the multiplication altogether.

- ``sparse_conv``: register tiles of output channels by vectors of pixels, side by side, each over
  the nonzero blocks of one block row: the block-sparse batch-reduce product of Tensor Processing
  Primitives. Where several tiles of channels have blocks at the same places, they follow each other
  before the next pixels. There is no im2col; every block carries the offset of its input channel
  and kernel position in the padded planar input.
- ``sparse_tail``: the last pixels of ``sparse_conv``, where a vector of them would be half empty:
  there vectors run over the output channels of a tile.
- ``nm_conv``: one output channel by many vectors of pixels, over N:M groups whose indices stay
  packed bits.
- ``sparse_product``: tiles without bias, clamp and padding, between Winograd's input and output
  transforms (``winograd_`` down the columns, ``line_`` along the rows, ``tile_`` both); from tile
  to tile it moves along the pixels of a plane, or from plane to plane.
- ``sparse_linear`` and ``nm_linear``: a linear layer has one pixel an image, so vectors run over
  output features instead; packed N:M has one output feature at a time and is a scalar product.

``copy_phases``, the pools and the pointwise kernels have no weights; they are here because Numba's
loops over the short rows of a late layer, or with an exponential, do not become vector code.

All arguments are 64-bit integers, addresses included, so one Numba intrinsic calls every kernel.
Strides are in bytes.
"""

from __future__ import annotations

from llvmlite import ir

from .feature import NMLinear, SparseLinear
from .kernel import Kernel
from .lines import LineInput, LineOutput
from .pixel import NMConv, SparseConv, SparseProduct
from .planes import Mean, PhaseCopy, Pool
from .pointwise import Pointwise
from .tail import SparseTail
from .target import Target
from .tiles import TileInput, TileOutput
from .transforms import WinogradInput, WinogradOutput
from .writer import Writer

_WRITERS: dict[str, type[Writer]] = {
    "sparse_conv": SparseConv,
    "sparse_product": SparseProduct,
    "sparse_tail": SparseTail,
    "nm_conv": NMConv,
    "sparse_linear": SparseLinear,
    "nm_linear": NMLinear,
    "winograd_input": WinogradInput,
    "winograd_output": WinogradOutput,
    "line_input": LineInput,
    "line_output": LineOutput,
    "tile_input": TileInput,
    "tile_output": TileOutput,
    "copy_phases": PhaseCopy,
    "pool_max": Pool,
    "pool_avg": Pool,
    "pool_mean": Mean,
    "pointwise_same": Pointwise,
    "pointwise_add": Pointwise,
    "pointwise_mul": Pointwise,
    "pointwise_gate": Pointwise,
    "pointwise_affine": Pointwise,
}


def write(kernel: Kernel, target: Target) -> str:
    """Write a micro-kernel as LLVM IR.

    Parameters
    ----------
    kernel : Kernel
        What to write.
    target : Target
        What to write it for; gives triple and lanes.

    Returns
    -------
    str
        The text of an LLVM module with one function named ``kernel.name``.
    """
    module = ir.Module(name=kernel.name)
    module.triple = target.triple
    _WRITERS[kernel.op](module, kernel, target.lanes).write()
    return str(module)
