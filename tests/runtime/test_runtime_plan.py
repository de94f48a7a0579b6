"""The parts of a plan: layout, memory, prepared weights, shares of work."""

from __future__ import annotations

from itertools import pairwise

import naive
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from models import Builder, make_weight

from blocksparse.runtime import layout
from blocksparse.runtime.compiled import CompiledEngine
from blocksparse.runtime.kernels import records
from blocksparse.runtime.kernels.target import Target
from blocksparse.runtime.plan import bind
from blocksparse.runtime.prepack import pack
from blocksparse.runtime.products import balanced, pixel_mask, same_steps
from blocksparse.runtime.steps import lower

TARGETS = [
    Target("x86_64-unknown-linux-gnu", "generic", "", lanes, rows, 3, rows)
    for lanes, rows in ((16, 8), (8, 4), (4, 8))
]


def test_panels_are_as_wide_as_the_channels_of_one_group_allow():
    """A depthwise convolution reads one channel at a time, however many it has."""
    panels = []
    for groups in (1, 512):
        b = Builder((512, 30, 30))
        b.conv("x", 512, groups=groups)
        engine = CompiledEngine(b.model(), winograd=False)
        plan = bind(engine.model, engine.steps, engine.target, 1)
        (at,) = (i for i, step in enumerate(engine.steps.steps) if step.op == records.CONV)
        panels.append(-(-plan.records[at, records.VECTORS] // plan.records[at, records.PANEL]))
    assert panels[0] > panels[1] == 1


def unpacked(packed, shape):
    """Read a prepared weight back the way a kernel does, column by column."""
    k, per_group, *kernel = shape
    channels = per_group  # groups are told apart by the absolute channel
    total = max(int(packed.channels.max(initial=0)) + packed.columns, channels)
    dense = np.zeros((k, total, int(np.prod(kernel))), np.float32)
    for tile in packed.tiles:
        at = tile.values
        for step in range(tile.steps.start, tile.steps.stop):
            for j in range(packed.columns):
                column = packed.values[at : at + packed.rows]
                assert not column[tile.rows :].any()
                channel, position = packed.channels[step] + j, packed.positions[step]
                dense[tile.first : tile.first + tile.rows, channel, position] = column[: tile.rows]
                at += packed.rows
    return dense


@given(
    target=st.sampled_from(TARGETS),
    shape=st.tuples(*[st.integers(1, 20)] * 2, *[st.integers(1, 3)] * 2),
    block=st.tuples(st.integers(1, 17), st.integers(1, 17)),
    density=st.sampled_from([0.0, 0.3, 1.0]),
)
def test_prepared_bsr_holds_the_same_weight(target, shape, block, density):
    weight = make_weight(shape, ("bsr", block, density))
    packed = pack(weight, 1, target)
    assert packed.rows <= target.rows
    got = unpacked(packed, shape)
    assert got.shape[1] == shape[1], "no step reaches beyond the last input channel"
    expected = naive.bsr_to_dense(shape, block, weight.data, weight.indices, weight.indptr)
    np.testing.assert_array_equal(got, expected.reshape(got.shape))


@given(
    target=st.sampled_from(TARGETS),
    groups=st.integers(1, 5),
    shape=st.tuples(*[st.integers(1, 12)] * 2, *[st.integers(1, 3)] * 2),
)
def test_prepared_dense_holds_the_same_weight(target, groups, shape):
    k, channels, *kernel = shape
    weight = make_weight((k * groups, channels, *kernel), "dense")
    got = unpacked(pack(weight, groups, target), weight.shape)
    for group in range(groups):
        rows = slice(group * k, (group + 1) * k)
        own = slice(group * channels, (group + 1) * channels)
        expected = weight.values[rows].reshape(k, channels, -1)
        np.testing.assert_array_equal(got[rows, own], expected)
        got[rows, own] = 0
    assert not got.any()


@given(st.lists(st.integers(1, 100), min_size=1, max_size=40), st.integers(1, 20))
def test_shares_of_work_are_even(work, parts):
    bounds = balanced(work, parts)
    assert bounds[0] == 0
    assert bounds[-1] == len(work)
    assert all(a < b for a, b in pairwise(bounds))
    assert len(bounds) - 1 <= parts
    ideal = sum(work) / parts
    for a, b in pairwise(bounds):
        assert sum(work[a:b]) <= ideal + 2 * max(work)


@pytest.mark.parametrize(
    ("limit", "dense_rows", "block_rows"),
    [(1, [4, 4, 4, 4, 2] * 2, [4] * 5), (8, [8, 8, 2] * 2, [8, 8, 4]), (64, [18] * 2, [8, 8, 4])],
)
def test_row_tiles_are_joined_where_their_steps_agree(limit, dense_rows, block_rows):
    """Two groups of 18 dense channels, and 20 in blocks of 8, in tiles of 4."""
    target = Target("", "", "", lanes=8, rows=4, vectors=2, together=64)
    dense = pack(make_weight((36, 8, 1, 1), "dense"), 2, target)
    blocks = pack(make_weight((20, 16, 1, 1), ("bsr", (8, 8), 0.7)), 1, target)
    for packed, expected in ((dense, dense_rows), (blocks, block_rows)):
        runs = same_steps(packed, limit)
        assert [tile for run in runs for tile in run] == list(packed.tiles)
        assert [sum(tile.rows for tile in run) for run in runs] == expected
        for run in runs:
            assert all(tile.steps == run[0].steps for tile in run)
            apart = {b.values - a.values for a, b in pairwise(run)}
            assert len(apart) <= 1, "one distance serves all"
    empty = pack(make_weight((20, 16, 1, 1), ("bsr", (8, 8), 0)), 1, target)
    assert len(same_steps(empty, limit)) == len(empty.tiles)


@given(
    batch=st.integers(1, 4), height=st.integers(1, 9), width=st.integers(1, 20),
    extra=st.tuples(st.integers(0, 3), st.integers(0, 3)), lanes=st.sampled_from([4, 8, 16]),
)  # fmt: skip
def test_pixel_mask_marks_images_and_nothing_else(batch, height, width, extra, lanes):
    row = width + extra[1]
    where = records.Layout(0, 0, (height + extra[0]) * row, row, 1, height, width, 0)
    mask = pixel_mask(where, batch, lanes)
    bits = np.unpackbits(mask.reshape(-1, max(1, lanes // 8)), axis=1, bitorder="little")
    got = set(np.flatnonzero(bits[:, :lanes].reshape(-1)))
    expected = {
        n * where.image + y * row + x
        for n in range(batch) for y in range(height) for x in range(width)
    }  # fmt: skip
    assert got == expected


def test_no_two_channels_overlap():
    """Every channel, its margins included, has floats of its own."""
    b = Builder((3, 9, 7))
    x = b.conv("x", 5, kernel=(5, 3), padding=(2, 1))
    x = b.node("concat", x, b.conv(x, 4))
    b.conv(x, 6, stride=(2, 2))
    model = b.model()
    engine = CompiledEngine(model)
    steps = lower(model, engine.target, {})
    for batch in (1, 3):
        for name, frame in steps.frames.items():
            where = layout.place(steps.shapes[name], frame, 0, batch)
            size = layout.size(steps.shapes[name], frame, batch)
            reach = where.run(batch) + frame.margin
            assert where.base >= frame.margin
            assert reach + frame.margin <= where.channel
            last = where.base + (where.channels - 1) * where.channel
            assert last + reach <= size
        assert bind(model, steps, engine.target, batch).floats > 0
