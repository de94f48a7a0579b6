"""Pools and phase copies against their definitions, bit by bit, and what they leave alone."""

from __future__ import annotations

from itertools import product

import naive
import numpy as np
import pytest
from bare import (
    LANES,
    SENTINEL,
    assert_nothing_else_written,
    bits,
    call,
    engine_of,
    pixels,
    run_over,
    targets,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from models import Builder, randoms

from blocksparse.runtime import load, reference
from blocksparse.runtime.kernels import records
from blocksparse.runtime.kernels.kernel import Kernel
from blocksparse.runtime.layout import phases

WIDTHS = (1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 32, 33)


def assert_same_bits(got, expected):
    """Equal to the last bit; a NaN is a NaN."""
    expected = expected.astype(np.float32)
    np.testing.assert_array_equal(np.isnan(got), np.isnan(expected))
    got, expected = (np.where(np.isnan(a), np.float32(0), a) for a in (got, expected))
    np.testing.assert_array_equal(got.view(np.int32), expected.view(np.int32))


def integers(rng, *shape):
    """Small integers, whose sums are exact, among them NaN and both infinities; no zeros."""
    values = rng.integers(1, 99, shape) * rng.choice([-1.0, 1.0], shape)
    odd = rng.random(shape)
    for k, value in enumerate((np.nan, np.inf, -np.inf)):
        values[(odd > 0.03 * k) & (odd < 0.03 * k + 0.03)] = value
    return values.astype(np.float32)


def pool_model(kind, shape, attrs):
    b = Builder(shape)
    if kind == "max":
        b.node("max_pool2d", "x", dilation=(1, 1), **attrs)
    else:
        b.node("avg_pool2d", "x", count_include_pad=kind == "avg", **attrs)
    return b.model()


def expected_pool(kind, x, attrs):
    values = {**attrs, "kernel": tuple(attrs["kernel"])}
    if kind == "max":
        return naive.max_pool2d(x, **values)
    with np.errstate(invalid="ignore"):
        return naive.avg_pool2d(x, count_include_pad=kind == "avg", **values)


@pytest.mark.parametrize("lanes", [4, 16])
@pytest.mark.parametrize("kind", ["max", "avg", "avg_without_pad"])
@pytest.mark.parametrize("height", [1, 2, 3, 4, 5, 6])
def test_pools_of_every_window(kind, height, lanes):
    rng = np.random.default_rng([height, lanes, len(kind)])
    for width, stride in product((1, 2, 3, 4, 5, 6), (1, 2, 3)):
        attrs = {
            "kernel": (height, width), "stride": (int(rng.integers(1, 4)), stride),
            "padding": tuple(int(rng.integers(0, k // 2 + 1)) for k in (height, width)),
            "ceil_mode": bool(rng.integers(2)),
        }  # fmt: skip
        # the smallest image, on which one window hangs over all sides, or one of other widths
        least = [max(1, k - 2 * p) for k, p in zip((height, width), attrs["padding"], strict=True)]
        wide = int(rng.choice(WIDTHS))
        for image in (least, (least[0] + int(rng.integers(0, 5)), max(least[1], wide))):
            x = integers(rng, 2, 2, *image)
            engine = engine_of(pool_model(kind, x.shape[1:], attrs), lanes)
            got, plan, memory = run_over(engine, x, SENTINEL)
            assert_same_bits(got, expected_pool(kind, x, attrs))
            assert_nothing_else_written(memory, plan, len(x))
            (record,) = (p for p in plan.records if p[records.OP] == records.POOL)
            assert bool(record[records.FAST]) == (max(height, width) <= 5 and stride <= 2)


@settings(max_examples=30)
@given(
    kind=st.sampled_from(["max", "avg", "avg_without_pad"]),
    image=st.tuples(st.integers(1, 9), st.integers(1, 20)),
    kernel=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    stride=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    ceil_mode=st.booleans(),
    batch=st.integers(1, 3),
    padding=st.tuples(st.integers(0, 3), st.integers(0, 3)),
)
def test_a_convolution_finds_zeros_around_a_pool(
    kind, image, kernel, stride, ceil_mode, batch, padding
):
    """Whatever memory held, and whatever padding the reader of a pool asks for."""
    image = tuple(max(i, k) for i, k in zip(image, kernel, strict=True))
    attrs = {
        "kernel": kernel, "stride": stride, "padding": tuple(k // 2 for k in kernel),
        "ceil_mode": ceil_mode,
    }  # fmt: skip
    b = Builder((2, *image))
    b.nodes.extend(pool_model(kind, (2, *image), attrs).graph.nodes)
    b.shapes.update({node.name: node.shape for node in b.nodes})
    taps = tuple(2 * p + 1 for p in padding)
    b.conv(b.nodes[-1].name, 3, kernel=taps, padding=padding, activation="none")
    model = b.model()
    x = randoms(batch, 2, *image)
    engine = engine_of(model)
    clean, _, _ = run_over(engine, x, 0)
    np.testing.assert_allclose(clean, reference.run(model, x), rtol=0, atol=1e-4)
    dirty, _, _ = run_over(engine, x, np.nan)
    assert_same_bits(dirty, clean)


@pytest.mark.parametrize("lanes", LANES)
@settings(max_examples=25)
@given(
    height=st.integers(1, 9), width=st.sampled_from(WIDTHS), batch=st.integers(1, 3),
    kernel=st.tuples(st.integers(1, 4), st.integers(1, 4)), row_stride=st.integers(1, 3),
    padding=st.tuples(st.integers(0, 3), st.integers(0, 18)),
    dilation=st.tuples(st.integers(1, 2), st.integers(1, 2)), seed=st.integers(0, 9),
)  # fmt: skip
def test_phase_planes(lanes, height, width, batch, kernel, row_stride, padding, dilation, seed):
    spans = [d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True)]
    height, width = (
        max(size, span - 2 * pad)
        for size, span, pad in zip((height, width), spans, padding, strict=True)
    )
    b = Builder((3, height, width))
    stride = (row_stride, 2)
    b.conv("x", 2, kernel=kernel, stride=stride, padding=padding, dilation=dilation)
    model = b.model()
    node = model.graph.nodes[0]
    x = integers(np.random.default_rng(seed), batch, 3, height, width)
    _, plan, memory = run_over(engine_of(model, lanes), x, SENTINEL)
    (where,) = targets(plan, records.COPY)
    (record,) = (p for p in plan.records if p[records.OP] == records.COPY)
    assert bool(record[records.FAST]) == (padding[1] <= 16)
    expected = naive.phase_planes(x, stride, padding, phases(node, kernel))
    assert_same_bits(memory[pixels(where, batch)], expected)
    assert_nothing_else_written(memory, plan, batch)


def test_a_strided_convolution_finds_zeros_around_its_phases():
    for image, padding in product([(1, 1), (5, 16), (6, 33)], [(1, 1), (2, 0), (0, 2), (3, 3)]):
        b = Builder((3, *image))
        taps = tuple(2 * p + 1 for p in padding)
        b.conv("x", 4, kernel=taps, stride=(2, 2), padding=padding, activation="none")
        x = randoms(2, 3, *image)
        engine = engine_of(b.model())
        clean, _, _ = run_over(engine, x, 0)
        np.testing.assert_allclose(clean, reference.run(b.model(), x), rtol=0, atol=1e-4)
        dirty, _, _ = run_over(engine, x, np.nan)
        assert_same_bits(dirty, clean)


@pytest.mark.parametrize("step", [(1, 1, 2), (2, 1, 2), (1, 3, 2), (2, 2, 2), (1, 2, 1)], ids=str)
@pytest.mark.parametrize("start", [(0, 0, 0), (1, 0, 0), (2, 1, 3)], ids=str)
def test_slices_with_every_second_column(start, step):
    b = Builder((6, 9, 37))
    b.node("slice", "x", start=start, stop=(6, 9, 36), step=step)
    x = randoms(2, 6, 9, 37)
    cut = [slice(s, e, d) for s, e, d in zip(start, (6, 9, 36), step, strict=True)]
    assert_same_bits(load(b.model(), engine="compiled")(x), x[(slice(None), *cut)])


def far_left(padding):
    """A strided convolution whose first columns lie far left of its input."""
    b = Builder((2, 1, 3))
    b.conv("x", 2, kernel=(1, 3), stride=(1, 2), padding=(0, padding))
    return b.model()


def far_right(window):
    """A pool of a short row into rows that are long because a neighbour's are."""
    b = Builder((1, 1, 6))
    long = b.node("pad", "x", before=(0, 0, 0), after=(0, 0, 1994))
    beside = b.conv(long, 1, kernel=(1, 1998), padding=(0, 0))
    pool = b.node("max_pool2d", "x", kernel=(1, window), stride=(1, 2), padding=(0, window // 2),
                  dilation=(1, 1), ceil_mode=False)  # fmt: skip
    b.node("add", beside, pool, activation="none")
    return b.model()


@pytest.mark.parametrize("model", [*map(far_left, (2, 16, 17, 300)), *map(far_right, (1, 3))])
def test_vector_code_reads_only_memory(model):
    images = randoms(1, *model.input_shape)
    engine = engine_of(model)
    got, plan, _ = run_over(engine, images, np.nan)
    np.testing.assert_allclose(got, reference.run(model, images), rtol=0, atol=1e-4)
    for record in plan.records[np.isin(plan.records[:, records.OP], (records.POOL, records.COPY))]:
        if record[records.FAST]:
            source = records.layout_at(record, records.SOURCE)
            left = record[records.SHIFT + 2] if record[records.OP] == records.COPY else 0
            last = source.base + (source.channels - 1) * source.channel
            # a pool reads the vectors that follow, too
            vectors = record[records.ROW_VECTORS] + (record[records.OP] == records.POOL)
            row = 2 * vectors * record[records.LANES]
            assert source.base + left >= -16, "a line of floats lies in front of memory"
            assert last + (source.height - 1) * source.row + row <= plan.floats


@pytest.mark.parametrize("lanes", LANES)
@pytest.mark.parametrize("width", [1, 4, 7, 16, 17, 35])
@pytest.mark.parametrize(("upper", "lower"), [(1, 0), (7, 0), (4, 3), (1, 5)])
def test_a_mean_adds_every_pixel_once(upper, lower, width, lanes):
    """Rows in two pieces, between them and behind them NaN, channels last to tell strides apart."""
    x = np.full((2, 3, 8, width + 20), np.nan, np.float32)
    pieces = randoms(3, upper, width), randoms(3, lower, width)
    x[0, :, :upper, :width], x[1, :, :lower, :width] = pieces
    y = np.full((3, 5), SENTINEL)
    reach = -(-width // lanes) * lanes
    call(
        Kernel("pool_mean"), lanes, x[0], x.strides[2], x.strides[1], upper, x[1], x.strides[2],
        x.strides[1], lower, y, y.strides[0], bits(np.arange(reach) < width, lanes),
        reach // lanes, np.array([(upper + lower) * width], np.float32), 3,
    )  # fmt: skip
    whole = np.concatenate(pieces, axis=1)
    expected = naive.adaptive_avg_pool2d(whole[None], (1, 1))[0, :, 0, 0]
    np.testing.assert_allclose(y[:, 0], expected, rtol=0, atol=1e-6)
    assert (y[:, 1:] == SENTINEL).all()


@pytest.mark.parametrize("lanes", LANES)
def test_a_mean_of_a_large_image_rounds_little(lanes):
    """Equal numbers, whose sums all err to the same side."""
    b = Builder((1, 1024, 1024))
    b.node("adaptive_avg_pool2d", "x", output_size=(1, 1))
    x = np.full((1, 1, 1024, 1024), 0.1, np.float32)
    assert abs(engine_of(b.model(), lanes).run(x, 1).item() / x[0, 0, 0, 0] - 1) < 1e-4


@pytest.mark.parametrize("lanes", LANES)
@pytest.mark.parametrize("row", [1, 3, 4, 8, 15, 16, 17, 21])
@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("op", ["pool_max", "pool_avg"])
def test_a_pool_writes_its_rows_and_nothing_else(op, stride, row, lanes):
    """Two channels of two rows: beyond each row lies something of others, or its own padding."""
    x = randoms(2, 9, 2 * row + 64)
    width = row - row // 3
    reach = -(-row // lanes) * lanes
    place = np.arange(reach)
    y = np.full((2, 2, row + 20), SENTINEL)
    divisors = np.full((2, reach), 4, np.float32)
    inside = place < width
    call(
        Kernel(op, 2, 2, stride), lanes, x, x.strides[1], x.strides[0], 1, 9, 3, y, y.strides[1],
        y.strides[0], bits([inside, inside], lanes), bits([place < row, inside], lanes), divisors,
        divisors.strides[0], 2, 2, reach // lanes,
    )  # fmt: skip
    assert (y[..., row:] == SENTINEL).all()
    assert (y[..., width:row] == 0).all()
    for channel, i in np.ndindex(2, 2):
        rows = x[channel, 1 + 3 * i : 3 + 3 * i]
        near = np.stack([rows[:, j : j + stride * width : stride] for j in range(2)])
        flat = near.reshape(4, width)
        if op == "pool_max":
            np.testing.assert_array_equal(y[channel, i, :width], flat.max(axis=0))
        else:
            bound = 4 * np.finfo(np.float32).eps * np.abs(flat).mean(axis=0)
            error = np.abs(y[channel, i, :width] - flat.astype(float).mean(axis=0))
            assert (error <= bound).all()


@pytest.mark.parametrize("lanes", LANES)
@pytest.mark.parametrize("row", [1, 3, 4, 8, 15, 16, 17, 21])
@pytest.mark.parametrize("both", [False, True])
def test_a_phase_copy_writes_its_rows_and_nothing_else(both, row, lanes):
    x = randoms(2, 3, 2 * row + 64)
    width = row - row // 3
    reach = -(-row // lanes) * lanes
    place = np.arange(reach)
    planes = np.full((2, 2, 4, row + 20), SENTINEL)  # phases of each channel; four rows
    masks = np.stack([(place < width) & (place > 0), place < width])  # pixel 0 is padding
    call(
        Kernel("copy_phases"), lanes, x, x.strides[1], x.strides[0], -1, 3, 2, planes,
        planes[0, 1] if both else 0, planes.strides[2], planes.strides[0], bits(masks, lanes),
        bits(place < row, lanes), 2, 3, reach // lanes,
    )  # fmt: skip
    assert (planes[..., row:] == SENTINEL).all()
    assert (planes[:, :, 3] == SENTINEL).all()
    for phase in range(2 if both else 1):
        rows = np.stack([0 * x[:, 0], x[:, 1], 0 * x[:, 0]], axis=1)  # -1, 1 and 3 of three
        expected = np.where(masks[phase, :row], rows[..., phase : phase + 2 * row : 2], 0)
        np.testing.assert_array_equal(planes[:, phase, :3, :row], expected)
    if not both:
        assert (planes[:, 1] == SENTINEL).all()
