"""How a weight lies in the file: its entry in the graph's JSON, and the tensors that go with it.

Legend: K out-channels, C in-channels, R S kernel taps, P = R*S kernel positions, r c block rows and
columns, G groups of m channels.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt

from blocksparse.format.errors import FormatError
from blocksparse.format.graph import integers, record
from blocksparse.format.ops import MAX_DIM
from blocksparse.format.weights import (
    MAX_GROUP,
    BsrWeight,
    DenseWeight,
    NMWeight,
    Weight,
    index_bits,
)

MAX_WEIGHT = 2**28
"""Most entries a dense weight, padding to whole blocks or groups included, may have."""

Arrays = Mapping[str, npt.NDArray[Any]]


@dataclass(frozen=True)
class Layout:
    """Everything about a stored weight except its numbers.

    Parameters
    ----------
    kind : {"dense", "bsr", "nm"}
    shape : tuple of int
        Shape of the dense weight, (K, C/groups, R, S) or (O, F).
    sizes : tuple of int
        (r, c) of ``"bsr"``, (n, m) of ``"nm"``, empty for ``"dense"``.
    """

    kind: str
    shape: tuple[int, ...]
    sizes: tuple[int, ...] = ()

    @classmethod
    def of(cls, weight: Weight) -> Layout:
        """Return the layout of `weight`."""
        if isinstance(weight, BsrWeight):
            return cls("bsr", weight.shape, weight.block)
        if isinstance(weight, NMWeight):
            return cls("nm", weight.shape, (weight.n, weight.m))
        return cls("dense", weight.shape)

    def to_json(self) -> dict[str, Any]:
        """Return the ``"weight"`` entry of a node."""
        tree: dict[str, Any] = {"layout": self.kind, "shape": list(self.shape)}
        if self.kind == "bsr":
            tree["block"] = list(self.sizes)
        elif self.kind == "nm":
            tree["n"], tree["m"] = self.sizes
        return tree

    @classmethod
    def from_json(cls, tree: object, node: str) -> Layout:
        """Read the ``"weight"`` entry of `node`; :meth:`check` says whether it makes sense.

        Raises
        ------
        FormatError
            On an unknown layout, wrong keys or wrong types.
        """
        kind = tree.get("layout") if isinstance(tree, dict) else None
        extra = {"dense": (), "bsr": ("block",), "nm": ("n", "m")}
        if not isinstance(kind, str) or kind not in extra:
            raise FormatError(f"weight layout must be one of {', '.join(extra)}", tensor=node)
        fields = record(tree, ("layout", "shape", *extra[kind]), "weight", tensor=node)
        sizes: object = fields.get("block", [])
        if kind == "nm":
            sizes = [fields["n"], fields["m"]]
        shape = integers(fields["shape"], node, "weight shape")
        return cls(kind, shape, integers(sizes, node, "weight sizes"))

    def check(self, node: str) -> None:
        """Raise FormatError unless all sizes are positive, sane, and fit the kind."""
        if len(self.shape) not in (2, 4) or not _sane(self.shape, MAX_DIM):
            raise FormatError(
                f"weight shape must be 2 or 4 sizes of 1 to {MAX_DIM}, is {self.shape}", tensor=node
            )
        padded = self.shape
        if self.kind == "bsr":
            if len(self.sizes) != 2 or not _sane(self.sizes, MAX_DIM):
                raise FormatError(f"block must be two positive sizes, is {self.sizes}", tensor=node)
            rows, columns = (
                -(-size // step) * step
                for size, step in zip(self.shape[:2], self.sizes, strict=True)
            )
            padded = (rows, columns, *self.shape[2:])
        elif self.kind == "nm":
            sane = len(self.sizes) == 2 and _sane(self.sizes, MAX_GROUP)
            if not sane or self.sizes[0] > self.sizes[1]:
                raise FormatError(
                    f"n and m must be 1 <= n <= m <= {MAX_GROUP}, are {self.sizes}", tensor=node
                )
            padded = (
                self.shape[0],
                -(-self.shape[1] // self.sizes[1]) * self.sizes[1],
                *self.shape[2:],
            )
        if prod(padded) > MAX_WEIGHT:
            raise FormatError(
                f"weight {self.shape} takes {prod(padded)} entries with its padding, at most "
                f"{MAX_WEIGHT} are allowed",
                tensor=node,
            )

    def tensors(self, node: str) -> dict[str, tuple[str, tuple[int | None, ...]]]:
        """Return dtype and shape of each tensor by full name; None is any number of blocks."""
        name = f"{node}.weight"
        k, channels = self.shape[:2]
        positions = prod(self.shape[2:])
        if self.kind == "bsr":
            r, c = self.sizes
            return {
                f"{name}.data": ("F32", (None, r, c)),
                f"{name}.indices": ("I32", (None,)),
                f"{name}.indptr": ("I32", (-(-k // r) + 1,)),
            }
        if self.kind == "nm":
            n, m = self.sizes
            groups = -(-channels // m)
            packed = -(-positions * groups * n * index_bits(m) // 8)
            return {
                f"{name}.values": ("F32", (k, positions, groups, n)),
                f"{name}.indices": ("U8", (k, packed)),
            }
        return {name: ("F32", self.shape)}

    def build(self, node: str, arrays: Arrays) -> Weight:
        """Return the weight made of the tensors of `node` among `arrays`."""
        name = f"{node}.weight"
        if self.kind == "bsr":
            r, c = self.sizes
            parts = (arrays[f"{name}.{part}"] for part in ("data", "indices", "indptr"))
            return BsrWeight(self.shape, (r, c), *parts)
        if self.kind == "nm":
            n, m = self.sizes
            return NMWeight(self.shape, n, m, arrays[f"{name}.values"], arrays[f"{name}.indices"])
        return DenseWeight(arrays[name])


def weight_arrays(node: str, weight: Weight) -> dict[str, npt.NDArray[Any]]:
    """Return the arrays of `weight` by the names they have in the file."""
    name = f"{node}.weight"
    if isinstance(weight, BsrWeight):
        return {
            f"{name}.data": weight.data,
            f"{name}.indices": weight.indices,
            f"{name}.indptr": weight.indptr,
        }
    if isinstance(weight, NMWeight):
        return {f"{name}.values": weight.values, f"{name}.indices": weight.indices}
    return {name: np.asarray(weight.values)}


def _sane(sizes: tuple[int, ...], most: int) -> bool:
    return all(type(size) is int and 1 <= size <= most for size in sizes)
