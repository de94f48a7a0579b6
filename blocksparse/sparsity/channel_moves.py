"""Operations that move channels without computing anything: shapes, slices, concatenation, pads."""

from __future__ import annotations

import math

import numpy as np

from blocksparse.sparsity.channel_trace import (
    MOST_IDS,
    Arguments,
    Ids,
    Rule,
    Trace,
    Value,
    shape_of,
)


def _shape_change(trace: Trace, bound: Arguments) -> Ids:
    first = next(iter(bound.values()))
    ids = trace.ids(first)
    if ids is None:
        return None
    out = _regroup(trace, ids, shape_of(first), shape_of(trace.node))
    return trace.stop([first]) if out is None else out


def _regroup(trace: Trace, ids: np.ndarray, old: tuple[int, ...], new: tuple[int, ...]) -> Ids:
    """Return the ids after a change of shape from ``old`` to ``new``."""
    if 0 in old:
        return None
    before: list[int] = []  # the shape to spread the ids to
    after: list[int] = []
    offsets = np.zeros((1,) * len(old), dtype=np.int64)
    for i0, i1, j0, j1 in _pieces(old, new):
        if math.prod(ids.shape[i0:i1]) == 1:
            before += [1] * (i1 - i0)
            after += [1] * (j1 - j0)
            continue
        before += old[i0:i1]
        after += new[j0:j1]
        for axis in range(i0, i1):
            if ids.shape[axis] == 1 and old[axis] > 1:
                along = [1] * len(old)
                along[axis] = old[axis]
                offsets = offsets * old[axis] + np.arange(old[axis]).reshape(along)
    if math.prod(before) > MOST_IDS:
        return None
    full = np.broadcast_to(ids, before)
    if offsets.size > 1:  # e.g. a flatten: each channel becomes H * W features
        spread = np.broadcast_to(offsets, before)
        out = trace.ledger.new(trace.ledger.joint(trace.node, trace.ledger.origins(full), spread))
        trace.ledger.tie(out, full)
        full = out
    return full.reshape(after)


def _permute(trace: Trace, bound: Arguments) -> Ids:
    ids = trace.ids(bound["self"])
    return None if ids is None else ids.transpose([dim % ids.ndim for dim in bound["dims"]])


def _transpose(trace: Trace, bound: Arguments) -> Ids:
    ids = trace.ids(bound["self"])
    return None if ids is None else ids.swapaxes(bound["dim0"], bound["dim1"])


def _expand(trace: Trace, bound: Arguments) -> Ids:
    ids = trace.ids(bound["self"])
    return (
        None
        if ids is None
        else ids.reshape((1,) * (len(shape_of(trace.node)) - ids.ndim) + ids.shape)
    )


def _slice(trace: Trace, bound: Arguments) -> Ids:
    ids = trace.ids(bound["self"])
    if ids is None:
        return None
    dim = bound["dim"] % ids.ndim
    if ids.shape[dim] == 1:
        return ids
    where = slice(bound["start"], bound["end"], bound["step"])
    return ids[(slice(None),) * dim + (where,)]


def _select(trace: Trace, bound: Arguments) -> Ids:
    ids = trace.ids(bound["self"])
    if ids is None:
        return None
    dim = bound["dim"] % ids.ndim
    return ids.take(0 if ids.shape[dim] == 1 else bound["index"], axis=dim)


def _split(trace: Trace, bound: Arguments) -> Value:
    ids = trace.ids(bound["self"])
    if ids is None:
        return None
    dim = bound["dim"] % ids.ndim
    sizes = [one.shape[dim] for one in trace.node.meta["val"]]
    if ids.shape[dim] == 1:
        return [ids] * len(sizes)
    return np.split(ids, np.cumsum(sizes)[:-1], axis=dim)


def _cat(trace: Trace, bound: Arguments) -> Ids:
    nodes = bound["tensors"]
    dims = len(shape_of(trace.node))
    dim = bound["dim"] % dims
    pieces = []
    for node in nodes:
        ids, shape = trace.ids(node), [1] * dims
        shape[dim] = shape_of(node)[dim]
        if ids is None:  # not followed, but it has its place among the others
            ids = trace.ledger.new(np.full(shape, trace.ledger.label(trace.node)))
            trace.ledger.fix(ids)
        pieces.append(np.broadcast_to(ids, np.broadcast_shapes(ids.shape, shape)))
    common = np.broadcast_shapes(*((*one.shape[:dim], 1, *one.shape[dim + 1 :]) for one in pieces))
    full = [
        np.broadcast_to(one, (*common[:dim], one.shape[dim], *common[dim + 1 :])) for one in pieces
    ]
    if sum(one.size for one in full) > MOST_IDS:
        return trace.stop(trace.node.all_input_nodes)
    return np.concatenate(full, axis=dim)


def _pad(trace: Trace, bound: Arguments) -> Ids:
    ids = trace.ids(bound["self"])
    if ids is None:
        return None
    pad = bound["pad"]
    for number in range(len(pad) // 2):
        dim, around = ids.ndim - 1 - number, pad[2 * number : 2 * number + 2]
        if ids.shape[dim] == 1 or not any(around):
            continue
        if bound.get("mode", "constant") != "constant" or min(around) < 0:
            return trace.stop([bound["self"]])
        ends = []
        for length in around:  # channels that are all zero, or another constant
            shape = (*ids.shape[:dim], length, *ids.shape[dim + 1 :])
            ends.append(trace.ledger.new(np.full(shape, trace.ledger.label(trace.node))))
        ids = np.concatenate([ends[0], ids, ends[1]], axis=dim)
    return ids


def _pieces(old: tuple[int, ...], new: tuple[int, ...]) -> list[tuple[int, int, int, int]]:
    """Cut two shapes of one size into the smallest runs of axes of the same size."""
    pieces = []
    i = j = 0
    while i < len(old) or j < len(new):
        i0, j0 = i, j
        one = other = 1
        while True:
            if i < len(old) and (one <= other or j >= len(new)):
                one, i = one * old[i], i + 1
            elif j < len(new):
                other, j = other * new[j], j + 1
            if one == other and (i > i0 or j > j0):
                break
        pieces.append((i0, i, j0, j))
    return pieces


_SHAPES = ("view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "_unsafe_view")

MOVES: dict[str, Rule] = {
    **dict.fromkeys(_SHAPES, _shape_change),
    **dict.fromkeys(("split", "split_with_sizes", "chunk"), _split),
    **dict.fromkeys(("pad", "constant_pad_nd"), _pad),
    "permute": _permute,
    "transpose": _transpose,
    "expand": _expand,
    "slice": _slice,
    "select": _select,
    "cat": _cat,
}
