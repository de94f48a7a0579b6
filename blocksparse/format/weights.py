"""Weights as they lie in the file: dense, block-sparse rows (BSR), packed N:M.

Legend: K out-channels, C in-channels, R S kernel taps, P = R*S kernel positions, r c block rows and
columns, B stored blocks, G groups of m channels.

Every class holds C-contiguous arrays, and `shape` is the dense weight's: ``(K, C/groups, R, S)``
of a convolution or ``(O, F)`` of a linear layer. As a matrix, a weight is ``[K, P*C]``, kernel
position major, channels minor; a linear weight is the case P = 1.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil, prod
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

Floats: TypeAlias = npt.NDArray[np.float32]
Ints: TypeAlias = npt.NDArray[np.int32]
Bytes: TypeAlias = npt.NDArray[np.uint8]

MAX_GROUP = 256
"""Most input channels of an N:M group: a packed index has at most eight bits."""

_TOGETHER = 2**18
"""Numbers that are cut into blocks at once."""


@dataclass(frozen=True, eq=False)
class DenseWeight:
    """A weight stored whole.

    Parameters
    ----------
    values : ndarray of float32, shape (K, C/groups, R, S) or (O, F)
    """

    values: Floats

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the dense weight."""
        return self.values.shape

    @property
    def nbytes_values(self) -> int:
        """Bytes of the stored values."""
        return self.values.nbytes

    @property
    def nbytes_indices(self) -> int:
        """Bytes that say where the values belong."""
        return 0

    @property
    def nnz(self) -> int:
        """Number of stored values."""
        return self.values.size

    @property
    def density(self) -> float:
        """Nonzero fraction of the dense weight, 0..1."""
        return np.count_nonzero(self.values) / prod(self.shape)

    @classmethod
    def from_dense(cls, array: npt.ArrayLike) -> DenseWeight:
        """Store `array` as contiguous float32."""
        return cls(_dense(array))

    def to_dense(self) -> Floats:
        """Return the weight as a new array of `shape`."""
        return self.values.copy()

    def __eq__(self, other: object) -> bool:
        return isinstance(other, DenseWeight) and _same(self.values, other.values)


@dataclass(frozen=True, eq=False)
class BsrWeight:
    """A weight as block-sparse rows, SciPy's and PyTorch's BSR.

    The matrix is ``[Kp, P*Cp]`` with K and C each padded with zeros to a multiple of r and c, so
    that block column = kernel position * (Cp/c) + channel block.

    Parameters
    ----------
    shape : tuple of int
        Shape of the dense weight, (K, C, R, S) or (O, F).
    block : tuple of int
        (r, c).
    data : ndarray of float32, shape (B, r, c)
        The blocks; none is all zero, entries in the padding are 0.0.
    indices : ndarray of int32, shape (B,)
        Block column of each block, strictly increasing within a block row.
    indptr : ndarray of int32, shape (Kp/r + 1,)
        Block row i is ``indptr[i]:indptr[i + 1]``.
    """

    shape: tuple[int, ...]
    block: tuple[int, int]
    data: Floats
    indices: Ints
    indptr: Ints

    @property
    def nbytes_values(self) -> int:
        """Bytes of the stored values."""
        return self.data.nbytes

    @property
    def nbytes_indices(self) -> int:
        """Bytes that say where the values belong."""
        return self.indices.nbytes + self.indptr.nbytes

    @property
    def nnz(self) -> int:
        """Number of stored values, zeros inside blocks and in the padding included."""
        return self.data.size

    @property
    def density(self) -> float:
        """Nonzero fraction of the dense weight, 0..1."""
        return np.count_nonzero(self.data) / prod(self.shape)

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """Shape of the padded matrix, (Kp, P*Cp): what a BSR class is to be told."""
        rows, columns, positions = _block_grid(self.shape, self.block)
        return rows * self.block[0], positions * columns * self.block[1]

    @classmethod
    def from_dense(cls, array: npt.ArrayLike, block: tuple[int, int]) -> BsrWeight:
        """Keep the blocks of `array` that are not all zero.

        Parameters
        ----------
        array : array_like of float, shape (K, C, R, S) or (O, F)
        block : tuple of int
            (r, c); need not divide K and C.
        """
        dense = _dense(array)
        r, c = block
        rows, columns, positions = _block_grid(dense.shape, block)
        width = positions * columns
        data, indices, counts = [], [], [np.zeros(1, np.int32)]
        # As many block rows at a time as a second cache holds: VGG-16's first linear layer takes
        # 0.3 to 0.45 s so, and 1.1 to 2.7 all at once.
        step = max(1, _TOGETHER // (r * width * c))
        for first in range(0, rows, step):
            part = dense[first * r : (first + step) * r]
            k, channels = part.shape[:2]
            padded = np.zeros((ceil(k / r) * r, positions, columns * c), np.float32)
            padded[:k, :, :channels] = part.reshape(k, channels, positions).transpose(0, 2, 1)
            blocks = padded.reshape(-1, r, width, c)
            kept = (blocks != 0).any(axis=1).any(axis=2)
            data.append(blocks.transpose(0, 2, 1, 3)[kept])
            indices.append(np.nonzero(kept)[1])
            counts.append(np.count_nonzero(kept, axis=1))
        return cls(
            shape=dense.shape,
            block=(r, c),
            data=np.concatenate(data),
            indices=np.concatenate(indices).astype(np.int32),
            indptr=np.cumsum(np.concatenate(counts), dtype=np.int32),
        )

    def to_dense(self) -> Floats:
        """Return the weight as a new array of `shape`, padding removed."""
        r, c = self.block
        rows, columns, positions = _block_grid(self.shape, self.block)
        k, channels = self.shape[:2]
        blocks = np.zeros((rows, positions * columns, r, c), np.float32)
        blocks[np.repeat(np.arange(rows), np.diff(self.indptr)), self.indices] = self.data
        padded = blocks.transpose(0, 2, 1, 3).reshape(rows * r, positions, columns * c)
        return np.ascontiguousarray(
            padded[:k, :, :channels].transpose(0, 2, 1).reshape(self.shape), np.float32
        )

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, BsrWeight)
            and self.shape == other.shape
            and self.block == other.block
            and _same(self.data, other.data)
            and _same(self.indices, other.indices)
            and _same(self.indptr, other.indptr)
        )


@dataclass(frozen=True, eq=False)
class NMWeight:
    """A weight of which at most n of every m consecutive input channels are stored.

    Groups are taken per output channel and kernel position, G = ceil(C / m) of them; the last holds
    the channels that are left.

    Parameters
    ----------
    shape : tuple of int
        Shape of the dense weight, (K, C, R, S) or (O, F).
    n, m : int
        Stored per group, and group size.
    values : ndarray of float32, shape (K, P, G, n)
        Places without a nonzero hold 0.0.
    indices : ndarray of uint8, shape (K, ceil(P * G * n * bits / 8))
        The channel within its group for each value, :attr:`bits` bits each, first entry in the
        lowest bits; every output channel starts on a byte, its spare bits are 0. Non-decreasing
        within a group; where an index repeats, only the first may hold a nonzero.
    """

    shape: tuple[int, ...]
    n: int
    m: int
    values: Floats
    indices: Bytes

    @property
    def bits(self) -> int:
        """Bits of one packed index."""
        return index_bits(self.m)

    @property
    def nbytes_values(self) -> int:
        """Bytes of the stored values."""
        return self.values.nbytes

    @property
    def nbytes_indices(self) -> int:
        """Bytes that say where the values belong."""
        return self.indices.nbytes

    @property
    def nnz(self) -> int:
        """Number of stored values, unused places included."""
        return self.values.size

    @property
    def density(self) -> float:
        """Nonzero fraction of the dense weight, 0..1."""
        return np.count_nonzero(self.values) / prod(self.shape)

    @classmethod
    def from_dense(cls, array: npt.ArrayLike, n: int, m: int) -> NMWeight:
        """Pack `array`, of which every group of m channels has at most n nonzeros.

        Parameters
        ----------
        array : array_like of float, shape (K, C, R, S) or (O, F)
        n, m : int
            1 <= n <= m <= 256.

        Raises
        ------
        ValueError
            Where n or m is out of range, or a group holds more than n nonzeros, naming the first.
        """
        if not 1 <= n <= m <= MAX_GROUP:
            raise ValueError(f"{n}:{m}: n:m needs 1 <= n <= m <= {MAX_GROUP}")
        dense = _dense(array)
        k, channels = dense.shape[:2]
        positions = prod(dense.shape[2:])
        groups = -(-channels // m)
        padded = np.zeros((k, positions, groups * m), np.float32)
        padded[..., :channels] = dense.reshape(k, channels, positions).transpose(0, 2, 1)
        grouped = padded.reshape(k, positions, groups, m)
        used = grouped != 0
        counts = used.sum(axis=-1)
        if counts.size and counts.max() > n:
            row, position, group = (int(i) for i in np.argwhere(counts > n)[0])
            raise ValueError(
                f"weight {dense.shape} is not {n}:{m} along input channels: output channel {row}, "
                f"kernel position {position}, channels {group * m} to {group * m + m - 1} hold "
                f"{counts[row, position, group]} nonzeros; prune it to {n}:{m}, or store it dense"
            )
        # Nonzeros first, in channel order; a stable sort leaves the zeros behind them.
        order = np.argsort(~used, axis=-1, kind="stable")[..., :n]
        values = np.take_along_axis(grouped, order, axis=-1)
        # Unused places repeat the last index in use (0 in an empty group): never decreasing, and
        # always a channel that exists.
        last = np.take_along_axis(order, np.maximum(counts - 1, 0)[..., None], axis=-1)
        empty = np.arange(n) >= counts[..., None]
        index = np.where(empty, np.where(counts[..., None] > 0, last, 0), order)
        values[empty] = 0.0
        packed = pack_bits(index.reshape(k, -1).astype(np.uint8), index_bits(m))
        return cls(shape=dense.shape, n=n, m=m, values=values, indices=packed)

    def unpack_indices(self) -> Bytes:
        """Return the channel within its group for each value, uint8 of shape (K, P, G, n)."""
        k = self.values.shape[0]
        count = prod(self.values.shape[1:])
        return unpack_bits(self.indices, self.bits, count).reshape(k, *self.values.shape[1:])

    def to_dense(self) -> Floats:
        """Return the weight as a new array of `shape`."""
        k, channels = self.shape[:2]
        positions, groups = self.values.shape[1:3]
        index = self.unpack_indices().astype(np.intp)
        grouped = np.zeros((k, positions, groups, self.m), np.float32)
        # Backwards, so that the first of repeated indices, the one that counts, is written last.
        for place in reversed(range(self.n)):
            at = slice(place, place + 1)
            np.put_along_axis(grouped, index[..., at], self.values[..., at], axis=-1)
        flat = grouped.reshape(k, positions, groups * self.m)[..., :channels]
        return np.ascontiguousarray(flat.transpose(0, 2, 1).reshape(self.shape))

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, NMWeight)
            and self.shape == other.shape
            and (self.n, self.m) == (other.n, other.m)
            and _same(self.values, other.values)
            and _same(self.indices, other.indices)
        )


Weight: TypeAlias = DenseWeight | BsrWeight | NMWeight


def index_bits(m: int) -> int:
    """Return the bits of a packed index: the smallest of 1, 2, 4, 8 that holds 0..m-1."""
    return next(bits for bits in (1, 2, 4, 8) if m <= 2**bits)


def pack_bits(entries: Bytes, bits: int) -> Bytes:
    """Pack the rows of `entries`, uint8 (K, L), into bit fields: uint8 (K, ceil(L * bits / 8))."""
    k, length = entries.shape
    per_byte = 8 // bits
    padded = np.zeros((k, -(-length // per_byte) * per_byte), np.uint8)
    padded[:, :length] = entries
    fields = padded.reshape(k, -1, per_byte) << (np.arange(per_byte, dtype=np.uint8) * bits)
    return np.bitwise_or.reduce(fields, axis=-1).astype(np.uint8)


def unpack_bits(packed: Bytes, bits: int, length: int) -> Bytes:
    """Undo :func:`pack_bits`: the first `length` fields of each row, uint8 (K, length)."""
    shifts = np.arange(8 // bits, dtype=np.uint8) * bits
    fields = (packed[..., None] >> shifts) & np.uint8(2**bits - 1)
    return fields.reshape(packed.shape[0], packed.shape[1] * (8 // bits))[:, :length]


def _dense(array: npt.ArrayLike) -> Floats:
    dense = np.ascontiguousarray(array, np.float32)
    if dense.ndim not in (2, 4):
        raise ValueError(f"a weight has shape (K, C, R, S) or (O, F), not {dense.shape}")
    return dense


def _block_grid(shape: tuple[int, ...], block: tuple[int, int]) -> tuple[int, int, int]:
    """Return block rows, block columns of one kernel position, and kernel positions."""
    return -(-shape[0] // block[0]), -(-shape[1] // block[1]), prod(shape[2:])


def _same(a: npt.NDArray[np.generic], b: npt.NDArray[np.generic]) -> bool:
    return a.dtype == b.dtype and np.array_equal(a, b)
