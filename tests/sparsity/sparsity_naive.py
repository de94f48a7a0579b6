"""Slow twins of the masks, written from the definitions with plain loops."""

from __future__ import annotations

import itertools
import math

import numpy as np


def score(values: list[float], power: int) -> np.float32:
    """Mean magnitude (power 1) or root mean square (power 2) of real weights."""
    total = math.fsum(abs(float(v)) ** power for v in values)
    return np.float32((total / len(values)) ** (1 / power))


def block_cells(shape, rows, cols, shared):
    """Return the cells (k, c, t) of each block, blocks by row, column and kernel position."""
    outs, ins, taps = shape
    blocks = []
    for top in range(0, outs, rows):
        for left in range(0, ins, cols):
            cells = [
                [
                    (k, c, t)
                    for k in range(top, min(top + rows, outs))
                    for c in range(left, min(left + cols, ins))
                ]
                for t in range(taps)
            ]
            blocks += [[cell for at_tap in cells for cell in at_tap]] if shared else cells
    return blocks


def block_mask(weight, rows, cols, shared, zeros, power=2, keep_channels=False, min_density=0.0):
    """Drop the least important blocks until at least `zeros` weights are gone."""
    flat = weight.reshape(weight.shape[0], weight.shape[1], -1)
    blocks = block_cells(flat.shape, rows, cols, shared)
    scores = [score([flat[cell] for cell in cells], power) for cells in blocks]
    order = sorted(range(len(blocks)), key=lambda u: (-scores[u], u))
    protected = set()
    if keep_channels:
        across = math.ceil(flat.shape[1] / cols)
        positions = 1 if shared else flat.shape[2]
        down = math.ceil(flat.shape[0] / rows)
        place = {u: (u // positions // across, u // positions % across) for u in order}
        for u in order:
            used_rows = {place[p][0] for p in protected}
            used_cols = {place[p][1] for p in protected}
            if place[u][0] not in used_rows and place[u][1] not in used_cols:
                protected.add(u)
        for axis, count in ((0, down), (1, across)):
            for line in range(count):
                if line not in {place[p][axis] for p in protected}:
                    protected.add(next(u for u in order if place[u][axis] == line))
    allowed = math.floor(round(flat.size * (1 - min_density), 6))
    droppable = [u for u in order if u not in protected]
    while sum(len(blocks[u]) for u in droppable) > allowed:
        protected.add(droppable.pop(0))
    mask = np.ones(flat.shape, dtype=bool)
    while mask.size - mask.sum() < zeros:
        for cell in blocks[droppable.pop()]:
            mask[cell] = False
    return mask.reshape(weight.shape)


def nm_mask(weight, vector, n, m, zeros, power=2):
    """Let the groups that lose least obey until at least `zeros` weights are gone."""
    flat = weight.reshape(weight.shape[0], weight.shape[1], -1)
    outs, ins, taps = flat.shape
    groups = []  # (loss, index, cells that go)
    index = itertools.count()
    for top in range(0, outs, vector):
        rows = range(top, min(top + vector, outs))
        for t in range(taps):
            for left in range(0, ins, m):
                channels = range(left, min(left + m, ins))
                columns = {
                    c: math.fsum(abs(float(flat[k, c, t])) ** power for k in rows) for c in channels
                }
                ranked = sorted(channels, key=lambda c: (-np.float32(columns[c]), c))
                goes = [(k, c, t) for c in ranked[n:] for k in rows]
                loss = score([flat[cell] for cell in goes], power) if goes else np.float32(0)
                groups.append((loss, next(index), goes))
    order = sorted(groups, key=lambda group: (-group[0], group[1]))
    mask = np.ones(flat.shape, dtype=bool)
    while mask.size - mask.sum() < zeros:
        for cell in order.pop()[2]:
            mask[cell] = False
    return mask.reshape(weight.shape)
