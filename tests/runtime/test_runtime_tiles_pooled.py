"""Convolutions in Winograd's tiles that take in the pool behind them."""

from __future__ import annotations

import numpy as np
import pytest
from bare import LANES, SENTINEL, assert_nothing_else_written, assert_zeros_around, run_over
from hypothesis import given, settings
from hypothesis import strategies as st
from models import Builder, randoms
from test_runtime_tiles import CASES, WIDTHS, tiled
from winograd_cases import case_of

from blocksparse.perf.bound import traffic
from blocksparse.runtime import algorithms, bands, compiled, winograd
from blocksparse.runtime.algorithms import layer_key
from blocksparse.runtime.kernels import records
from blocksparse.runtime.trace import Trace

POOL = {
    "kernel": (2, 2),
    "stride": (2, 2),
    "padding": (0, 0),
    "dilation": (1, 1),
    "ceil_mode": False,
}


@pytest.fixture(autouse=True, scope="module")
def _small_bands():
    """Bands of a few units, and no layer worth a measurement."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(algorithms, "MEASURED_FLOPS", np.inf)
        patch.setattr(bands, "BAND_BYTES", 24 * 1024)
        yield


POOLED = CASES | {
    "image": st.tuples(st.integers(2, 20), st.one_of(WIDTHS, st.integers(17, 70))),
    "residual": st.just(False),
}


def with_pool(model):
    """The model with a 2 x 2 max pool behind it."""
    b = Builder(model.input_shape)
    b.nodes, b.weights, b.vectors = [*model.graph.nodes], {**model.weights}, {**model.vectors}
    b.shapes = dict(model.graph.shapes)
    b.node("max_pool2d", model.graph.outputs[0], **POOL)
    return b.model()


@pytest.mark.parametrize("lanes", LANES)
@settings(max_examples=50)
@given(
    case=st.builds(case_of, **POOLED), seed=st.integers(0, 9), threads=st.integers(1, 3),
    missing=st.booleans(),
)  # fmt: skip
def test_a_pool_is_taken_in(lanes, case, seed, threads, missing):
    """What comes out is the pool of what the convolution alone gives, NaN included."""
    if min(h + 2 * p - 2 for h, p in zip(case.image, case.padding, strict=True)) < 2:
        return
    rng = np.random.default_rng(seed)
    model = case.model(case.weights(randoms), randoms(case.outputs, seed=seed))
    x = rng.standard_normal((case.batch, case.channels, *case.image)).astype(np.float32)
    if missing:
        x[0, 0, case.image[0] // 2, case.image[1] // 2] = np.nan
    whole = tiled(model, lanes).run(x, 1)
    n, k, height, width = whole.shape
    cut = whole[:, :, : height // 2 * 2, : width // 2 * 2]
    windows = cut.reshape(n, k, height // 2, 2, width // 2, 2)
    engine = tiled(with_pool(model), lanes)
    got, plan, memory = run_over(engine, x, SENTINEL, threads)
    taken = winograd.unit_rows(height, width, lanes) <= 2
    assert [step.op for step in engine.steps.steps].count(records.POOL) == (not taken)
    np.testing.assert_array_equal(got, windows.max(axis=(3, 5)))
    assert_nothing_else_written(memory, plan, case.batch)
    if taken:
        assert_zeros_around(memory, plan, records.TILES_CONV, case.batch)
    dirty, _, _ = run_over(engine, x, np.nan, threads)
    np.testing.assert_array_equal(dirty, got)


@pytest.mark.parametrize(
    "changes",
    [
        {"kernel": (3, 3)},
        {"stride": (1, 1)},
        {"stride": (2, 1)},
        {"padding": (1, 1)},
        {"padding": (0, 1)},
        {"ceil_mode": True},
    ],
    ids=str,
)
def test_other_pools_stay_on_their_own(changes):
    b = Builder((3, 9, 70))
    b.node("max_pool2d", b.conv("x", 4), **{**POOL, **changes})
    model = b.model()
    assert winograd.pool_after(model.graph, model.graph.nodes[0], 8) is None
    assert records.POOL in [step.op for step in tiled(model).steps.steps]


def test_a_pool_is_not_taken_in_where_the_values_before_it_are_wanted():
    """By another reader, by an addition, by an activation that is no clamp."""
    read, added, gated, plain = (Builder((4, 8, 70)) for _ in range(4))
    x = read.conv("x", 4)
    read.node("concat", read.node("max_pool2d", x, **POOL), read.conv(x, 3, stride=(2, 2)))
    added.node("max_pool2d", added.conv("x", 4, residual="x"), **POOL)
    gated.node("max_pool2d", gated.conv("x", 4, activation="silu"), **POOL)
    plain.node("max_pool2d", plain.conv("x", 4), **POOL)
    for b, taken in ((read, False), (added, False), (gated, False), (plain, True)):
        graph = b.model().graph
        assert (winograd.pool_after(graph, graph.nodes[0], 8) is not None) == taken


@pytest.mark.parametrize("layout", ["dense", ("nm", 2, 4), ("bsr", (1, 1), 0.5)], ids=str)
def test_the_time_of_a_layer_has_its_pool_in_it(tmp_path, monkeypatch, layout):
    """Tiles take 5 ms, direct sums 4 and the pool behind them 2: tiles are the faster way."""
    monkeypatch.setattr(algorithms, "cache_folder", lambda: tmp_path)
    monkeypatch.setattr(algorithms, "MEASURED_FLOPS", 1)
    b = Builder((8, 8, 70))
    b.node("max_pool2d", b.conv("x", 8, layout=layout), **POOL)
    conv, pool = b.model().graph.nodes
    milliseconds = {True: 5, False: 4}

    def stub(steps, origins, times):
        taken = [
            2 if step.op == records.POOL else
            milliseconds[step.details["way"].transforms == "tiles"] if "way" in step.details else 0
            for step in steps
        ]  # fmt: skip
        return Trace(steps, 1_000_000 * np.array(taken), np.zeros((1, len(taken))))

    monkeypatch.setattr(compiled, "trace", stub)
    engine = compiled.CompiledEngine(b.model())
    engine.run(randoms(1, 8, 8, 70), 1)
    choice = engine.algorithms.choices[conv.name]
    assert choice.algorithm.transforms == "tiles"
    found = {way: ms for way, ms in choice.milliseconds.items() if not way.endswith("tiles")}
    assert set(found.values()) == {6.0}, "the pool is in it"
    assert choice.milliseconds[str(choice.algorithm)] == 5.0
    rows = {row.name: row for row in engine.choices()}
    assert rows[pool.name].kernel == "none"
    assert "the node before it" in rows[pool.name].reason
    assert "takes in the max pool" in rows[conv.name].reason
    weight = b.weights[conv.name]
    assert layer_key(conv, weight, True) != layer_key(conv, weight)
    assert traffic(b.model(), products(engine), 1).activations == 4 * 8 * (8 * 70 + 4 * 35)


def products(engine):
    return [step for step in engine.steps.steps if step.packed is not None]
