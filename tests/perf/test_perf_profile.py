"""Bounds and rows of a profile, on figures made by hand; and one real profile."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from blocksparse.format import DenseWeight, Graph, Model, Node, ValueSpec
from blocksparse.perf.bound import Traffic, bound, layer_bound, traffic, weight_bytes
from blocksparse.perf.ceilings import MEMORY, Ceiling, Ceilings
from blocksparse.perf.profile import layers_of, profile
from blocksparse.runtime import load
from blocksparse.runtime.caches import Cache
from blocksparse.runtime.explain import LayerChoice
from blocksparse.runtime.kernels.target import host
from blocksparse.runtime.steps import lower
from blocksparse.runtime.trace import Trace

KIB = 1024


def ceilings(peak=1.0, l1=8.0, l2=4.0, memory=1.0):
    """One core; 1 KiB of L1, 4 KiB of L2; GFLOP/s and GB/s."""
    rows = (("L1", l1), ("L2", l2), (MEMORY, memory))
    return Ceilings(
        "paper", 1, (Cache(1, KIB, 1), Cache(2, 4 * KIB, 1)),
        (Ceiling("f32", "GFLOP/s", peak, peak, peak, peak),),
        tuple(Ceiling(name, "GB/s", value, value, value, value) for name, value in rows),
    )  # fmt: skip


def conv(name, inputs, shape, stride=1):
    attrs = {"stride": (stride, stride), "padding": (0, 0), "dilation": (1, 1), "groups": 1}
    return Node(name, "conv2d", inputs, {**attrs, "activation": "none"}, shape)


def model():
    """2 channels 4x4 -> strided conv -> conv with residual -> both concatenated -> two of all."""
    cut = {"start": (0, 0, 0), "stop": (4, 2, 2), "step": (2, 1, 1)}
    nodes = (
        conv("a", ("x",), (3, 2, 2), stride=2),
        conv("b", ("a", "a"), (3, 2, 2)),
        Node("both", "concat", ("b", "x2"), {}, (5, 2, 2)),
        Node("two", "slice", ("both",), cut, (2, 2, 2)),
        Node("flat", "flatten", ("two",), {}, (8,)),
    )
    pool = {"kernel": (1, 1), "stride": (2, 2), "padding": (0, 0), "ceil_mode": False}
    pooled = Node("x2", "max_pool2d", ("x",), {**pool, "dilation": (1, 1)}, (2, 2, 2))
    return Model(
        Graph((ValueSpec("x", (2, 4, 4)),), ("flat",), (pooled, *nodes)),
        {
            "a": DenseWeight.from_dense(np.ones((3, 2, 1, 1))),
            "b": DenseWeight.from_dense(np.ones((3, 3, 1, 1))),
        },
        {"a.bias": np.ones(3, np.float32)},
    )


# the bound


def slow_bound(flops, traffic, peak, levels):
    """From the definition: nearest level first, each passed by what comes from it or farther."""
    times = {"compute": flops / (peak * 1e9)}
    for i, (name, rate) in enumerate(levels):
        count = 0
        for farther, _ in levels[i:]:
            count += traffic.get(farther, 0)
        times[name] = count / (rate * 1e9)
    return 1e3 * max(times.values()), times


amounts = st.integers(0, 10**9)
rates = st.floats(0.1, 1e4)


@given(amounts, amounts, amounts, amounts, rates, rates, rates, rates)
def test_bound_is_that_of_the_definition(flops, near, middle, far, peak, l1, l2, memory):
    places = {"L1": near, "L2": middle, MEMORY: far}
    found = bound(flops, places, ceilings(peak, l1, l2, memory), 1, "f32")
    levels = (("L1", l1), ("L2", l2), (MEMORY, memory))
    expected, times = slow_bound(flops, places, peak, levels)
    assert found.ms == pytest.approx(expected)
    assert 1e3 * times[found.by] == pytest.approx(expected)


@pytest.mark.parametrize(
    ("flops", "weights", "activations", "all_weights", "ms", "by"),
    [
        (4e6, 100, 100, 100, 4.0, "compute"),
        (0, 0, KIB, 0, KIB / 8e6, "L1"),
        (0, 0, KIB + 4, 0, (KIB + 4) / 4e6, "L2"),
        (0, 500, 500, 5 * KIB, 500 / 1e6, MEMORY),  # all weights do not fit L2: streamed
        (0, 500, 500, 4 * KIB, 500 / 4e6, "L2"),  # 500 bytes from L2 take longer than 1000 from L1
        (0, 100, 3000, 5 * KIB, 3100 / 4e6, "L2"),  # weights from memory pass L2, too
        (0, 0, 0, 0, 0, "compute"),
    ],
)
def test_bound_of_a_layer(flops, weights, activations, all_weights, ms, by):
    found = layer_bound(flops, Traffic(weights, activations), all_weights, ceilings(), 1)
    assert (found.ms, found.by) == (pytest.approx(ms), by)


def test_weight_bytes_are_values_indices_and_bias():
    assert [weight_bytes(model(), name) for name in ("a", "b", "both")] == [4 * 9, 4 * 9, 0]


def grouped(net):
    """Steps by node, without input and output."""
    steps = lower(net, host(), {}).steps
    groups = {}
    for step in steps[1:-1]:
        groups.setdefault(step.node.name, []).append(step)
    return steps, groups


@pytest.mark.parametrize(
    ("kernel", "stride", "padding", "dilation", "outputs", "rows"),
    [
        (2, 3, 1, 1, 3, [0, 2, 3, 5, 6]),
        (3, 2, 1, 1, 5, range(9)),
        (2, 4, 0, 2, 2, [0, 2, 4, 6]),
        (2, 4, 0, 1, 3, [0, 1, 4, 5, 8]),  # the last window reaches beyond the image
    ],
)
def test_traffic_counts_rows_that_a_window_reads(kernel, stride, padding, dilation, outputs, rows):
    attrs = {"kernel": (kernel, 1), "stride": (stride, 1), "padding": (padding, 0)}
    attrs |= {"dilation": (dilation, 1), "ceil_mode": True}
    nodes = (
        Node("pool", "max_pool2d", ("x",), attrs, (2, outputs, 5)),
        Node("flat", "flatten", ("pool",), {}, (10 * outputs,)),
    )
    net = Model(Graph((ValueSpec("x", (2, 9, 5)),), ("flat",), nodes), {}, {})
    _, groups = grouped(net)
    floats = 10 * len(rows) + 10 * outputs
    assert traffic(net, groups["pool"], 3) == Traffic(0, 4 * 3 * floats)


def test_traffic_counts_everything_once():
    net = model()
    steps, groups = grouped(net)
    batch = 3
    floats = {
        "x2": 16 + 8,  # every second row
        "a": 16 + 12,
        "b": 12 + 12,  # the residual is the input
        "two": 8 + 8,  # of the whole, only what is kept
        "flat": 8 + 8,
    }
    assert {name: traffic(net, groups[name], batch).activations for name in floats} == {
        name: 4 * batch * count for name, count in floats.items()
    }
    assert "both" not in groups, "written in place"
    assert [traffic(net, [step], batch) for step in (steps[0], steps[-1])] == [
        Traffic(0, 4 * batch * 64), Traffic(0, 4 * batch * 16),
    ]  # fmt: skip


# rows


def trace(steps, step_us, busy_us):
    as_ns = (1000 * np.array(step_us)).astype(np.int64), (1000 * np.array(busy_us)).astype(np.int64)
    return Trace(steps, *as_ns)


def test_layers_add_up_their_steps():
    net = model()
    steps, _ = grouped(net)
    names = [step.node.name for step in steps]
    assert names == ["x2", "x2", "a", "a", "b", "two", "flat", "flat"]
    slow = trace(steps, [9, 9, 9, 9, 9, 9, 9, 9], np.ones((2, 8)))
    fast = trace(steps, [1, 1, 1, 1, 1, 1, 1, 1], np.ones((2, 8)))
    busy = [[1, 1, 2, 6, 1, 0, 1, 1], [1, 1, 4, 2, 3, 0, 1, 1]]
    quick = trace(steps, [1, 2, 4, 8, 16, 1, 2, 1], busy)
    choices = [LayerChoice(n.name, n.op, n.shape, None, f"k_{n.op}", "") for n in net.graph.nodes]
    layers = layers_of(net, choices, [quick, slow, quick, fast], ceilings(), batch=2)
    assert [(layer.name, layer.op) for layer in layers] == [
        ("x", "load"), ("x2", "max_pool2d"), ("a", "conv2d"), ("b", "conv2d"),
        ("two", "slice"), ("flat", "flatten"), ("flat", "store"),
    ]  # fmt: skip
    assert [layer.ms for layer in layers] == pytest.approx(
        [0.001, 0.002, 0.012, 0.016, 0.001, 0.002, 0.001]
    )
    assert sum(layer.share for layer in layers) == pytest.approx(1)
    load_row, _, a, b, two, _, store = layers
    assert a.parts == (("copy", pytest.approx(0.004)), ("product", pytest.approx(0.008)))
    assert (a.weight_shape, a.output_shape, a.density) == ((3, 2, 1, 1), (3, 2, 2), 1.0)
    assert (load_row.kernel, a.kernel, store.kernel) == ("f32_copy", "k_conv2d", "f32_copy")
    # 2 images, 4 pixels, 6 weights, 2 operations each, in 12 microseconds
    assert a.gflops_useful == pytest.approx(2 * 4 * 6 * 2 / 12e3)
    assert a.gflops_dense_equivalent == a.gflops_useful
    assert two.gflops_useful == 0
    # busiest: 4 + 6 of an average of 3 + 4; 3 of 2
    assert a.imbalance == pytest.approx(10 / 7 - 1)
    assert b.imbalance == pytest.approx(0.5)
    assert two.imbalance == 0  # nobody noted any work
    # 2 * 2 * 24 operations at 1 GFLOP/s, longer than 260 bytes from L1 at 8 GB/s
    assert (a.bound_by, a.bound_ms) == ("compute", pytest.approx(96e-6))
    assert a.bound_share == pytest.approx(96e-6 / 0.012)


def test_a_concatenation_that_copies_counts_what_it_copies():
    nodes = (
        Node("twice", "concat", ("x", "x"), {}, (4, 4, 4)),
        Node("flat", "flatten", ("twice",), {}, (64,)),
    )
    net = Model(Graph((ValueSpec("x", (2, 4, 4)),), ("flat",), nodes), {}, {})
    steps, groups = grouped(net)
    assert traffic(net, groups["twice"], 1) == Traffic(0, 4 * 2 * 64)
    choices = [LayerChoice(n.name, n.op, n.shape, None, "", "") for n in nodes]
    one = trace(steps, [1, 2, 4, 8, 16], [[1] * 5])
    layers = layers_of(net, choices, [one], ceilings(), 1)
    assert layers[1].parts == (("elementwise", pytest.approx(0.006)),)


def test_one_thread_has_no_imbalance():
    net = model()
    steps, _ = grouped(net)
    choices = [LayerChoice(n.name, n.op, n.shape, None, "", "") for n in net.graph.nodes]
    one = trace(steps, [1] * 8, [[1] * 8])
    assert {layer.imbalance for layer in layers_of(net, choices, [one], ceilings(), 1)} == {None}


# a real one


@pytest.mark.parametrize("threads", [1, 2])
def test_profile_of_a_real_network_adds_up(threads):
    network = load(model(), threads=threads, engine="compiled")
    shares = []
    found = profile(network, ceilings(), batch=2, rounds=3, on_round=shares.append)
    network.close()
    assert shares[-1] == 1
    assert (found.batch, found.threads, found.network.rounds) == (2, threads, 3)
    assert all(layer.ms > 0 for layer in found.layers)
    assert found.layers_ms == pytest.approx(sum(layer.ms for layer in found.layers))
    assert found.rest_ms == pytest.approx(found.network.median_ms - found.layers_ms)
    assert found.bound_ms == pytest.approx(sum(layer.bound_ms for layer in found.layers))
    assert {layer.name: layer.tile for layer in found.layers if layer.tile} == {
        step.node.name: f"{step.packed.rows}x{step.packed.columns}"
        for step in network.engine.steps.steps
        if step.packed is not None
    }


def test_only_the_compiled_engine_has_a_profile():
    network = load(model(), engine="reference")
    with pytest.raises(ValueError, match="only the compiled engine can be profiled"):
        profile(network, ceilings())
