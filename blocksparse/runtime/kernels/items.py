"""What computes a work item of each kind of step, as functions that are compiled apart.

A function of Numba's is compiled together with all that it calls, though that was compiled before;
so one function around all kinds took half as long again to compile, and these can be compiled by
several processes at the same time.

All take the address of the call's record (see `call_record`), the address of the step's record
(see `records`), the number of the item, the address of this thread's scratch memory, and the number
of the step.
"""

from __future__ import annotations

from typing import Any

from . import call_record as c
from . import records as r
from .convolution import conv_item
from .copying import copy_item, phases_item
from .elementwise import elementwise_item
from .intrinsics import floats_at, integers_at
from .linear import linear_item
from .loop import loop
from .pooling import adaptive_pool_item, fast_pool_item, pool_item
from .winograd import winograd_item
from .winograd_tiles import tiles_item


@loop
def _records(call_at: int, step_at: int) -> Any:
    return integers_at(call_at, c.FIELDS), integers_at(step_at, r.FIELDS)


@loop
def _memory(call: Any) -> Any:
    return floats_at(call[c.MEMORY_AT], call[c.MEMORY_SIZE])


@loop
def _tables(call: Any) -> Any:
    return integers_at(call[c.TABLES_AT], call[c.TABLES_SIZE])


def conv(call_at: int, step_at: int, item: int, scratch_at: int, s: int) -> None:
    """Compute an item of a convolution, block-sparse, dense or N:M."""
    call, step = _records(call_at, step_at)
    conv_item(_memory(call), call[c.MEMORY_AT], step, _tables(call), item, call[c.BATCH])


def winograd(call_at: int, step_at: int, item: int, scratch_at: int, s: int) -> None:
    """Compute an item of a convolution by Winograd's transforms down the columns."""
    call, step = _records(call_at, step_at)
    winograd_item(
        _memory(call), call[c.MEMORY_AT], step, _tables(call), item, call[c.BATCH], scratch_at, s
    )


def tiles(call_at: int, step_at: int, item: int, scratch_at: int, s: int) -> None:
    """Compute an item of a convolution by Winograd's transforms in both directions."""
    call, step = _records(call_at, step_at)
    tiles_item(
        _memory(call), call[c.MEMORY_AT], step, _tables(call), item, call[c.BATCH], scratch_at, s
    )


def linear(call_at: int, step_at: int, item: int, scratch_at: int, s: int) -> None:
    """Compute an item of a linear layer, block-sparse, dense or N:M."""
    call, step = _records(call_at, step_at)
    linear_item(call[c.MEMORY_AT], step, _tables(call), item, call[c.BATCH])


def pool(call_at: int, step_at: int, item: int, scratch_at: int, s: int) -> None:
    """Compute an item of a pool, whatever its window."""
    call, step = _records(call_at, step_at)
    pool_item(_memory(call), step, item, call[c.BATCH], scratch_at)


def fast_pool(call_at: int, step_at: int, item: int, scratch_at: int, s: int) -> None:
    """Compute an item of a pool that has a micro-kernel."""
    call, step = _records(call_at, step_at)
    fast_pool_item(_memory(call), call[c.MEMORY_AT], step, item, call[c.BATCH])


def adaptive_pool(call_at: int, step_at: int, item: int, scratch_at: int, s: int) -> None:
    """Compute an item of an adaptive average pool."""
    call, step = _records(call_at, step_at)
    adaptive_pool_item(_memory(call), step, item, call[c.BATCH])


def elementwise(call_at: int, step_at: int, item: int, scratch_at: int, s: int) -> None:
    """Compute an item of a sum, product, affine map or activation."""
    call, step = _records(call_at, step_at)
    vectors = floats_at(call[c.VECTORS_AT], call[c.VECTORS_SIZE])
    elementwise_item(_memory(call), step, vectors, item, call[c.BATCH])


def copy(call_at: int, step_at: int, item: int, scratch_at: int, s: int) -> None:
    """Copy an item, from the input and to the output where the step says so."""
    call, step = _records(call_at, step_at)
    source = target = _memory(call)
    if step[r.OP] == r.LOAD:
        source = floats_at(call[c.INPUT_AT], call[c.INPUT_SIZE])
    if step[r.OP] == r.STORE:
        target = floats_at(call[c.OUTPUT_AT], call[c.OUTPUT_SIZE])
    copy_item(source, target, step, _tables(call), item, call[c.BATCH])


def phases(call_at: int, step_at: int, item: int, scratch_at: int, s: int) -> None:
    """Split an item into phase planes, with the micro-kernel."""
    call, step = _records(call_at, step_at)
    phases_item(_memory(call), call[c.MEMORY_AT], step, _tables(call), item, call[c.BATCH])
