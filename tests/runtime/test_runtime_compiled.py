"""The compiled engine against the reference, op by op and where ops meet."""

from __future__ import annotations

import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from models import POOL, Builder, randoms

from blocksparse.format import ACTIVATIONS
from blocksparse.runtime import algorithms, load, reference, steps
from blocksparse.runtime.compiled import PLANS, CompiledEngine

EPS = float(np.finfo(np.float32).eps)


def terms(model):
    """Longest chain of additions from input to output, in terms."""
    return sum(int(np.prod(weight.shape[1:])) + 2 for weight in model.weights.values()) + 16


def assert_agrees(model, batches=(1, 3), threads=(1, 2), x=None):
    network = load(model, engine="compiled")
    for batch in batches:
        images = randoms(batch, *model.input_shape, seed=3) if x is None else x
        expected = reference.run(model, images)
        for count in threads:
            network.threads = count
            got = network(images)
            scale = np.nanmax(np.abs(np.where(np.isfinite(expected), expected, np.nan)), initial=1)
            tolerance = 8 * EPS * np.sqrt(terms(model)) * scale
            np.testing.assert_allclose(got, expected, rtol=0, atol=tolerance)


LAYOUTS = ["dense", ("bsr", (8, 8), 0.5), ("bsr", (1, 1), 0.2), ("bsr", (16, 4), 0.5),
           ("bsr", (12, 3), 0.5), ("bsr", (5, 11), 0.5), ("nm", 2, 4), ("nm", 1, 3), ("nm", 4, 8),
           ("nm", 1, 16), ("nm", 3, 32)]  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("channels", [(16, 24), (13, 21)], ids=["whole", "ragged"])
def test_convolution_in_every_layout(layout, channels):
    b = Builder((channels[0], 9, 11))
    x = b.conv("x", channels[1], layout=layout)
    b.conv(x, 10, layout=layout, kernel=(1, 1), padding=(0, 0), activation="none", seed=1)
    assert_agrees(b.model())


@pytest.mark.parametrize("layout", ["dense", ("bsr", (8, 8), 0.5), ("bsr", (16, 4), 0.5)], ids=str)
@pytest.mark.parametrize("outputs", [256, 333])
def test_many_output_channels(layout, outputs):
    """So many that several row tiles are computed of one tile of pixels before the next."""
    b = Builder((8, 5, 7))
    options = {"kernel": (1, 1), "padding": (0, 0), "activation": "none", "layout": layout}
    side = b.conv("x", outputs, **options)
    b.conv("x", outputs, residual=side, seed=1, **options)
    assert_agrees(b.model())


@settings(max_examples=60)
@given(
    image=st.tuples(st.integers(1, 20), st.integers(1, 20)),
    channels=st.integers(1, 20),
    outputs=st.integers(1, 20),
    kernel=st.tuples(st.integers(1, 4), st.integers(1, 5)),
    stride=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    padding=st.tuples(st.integers(0, 3), st.integers(0, 3)),
    dilation=st.tuples(st.integers(1, 2), st.integers(1, 2)),
    layout=st.sampled_from(LAYOUTS),
    residual=st.booleans(),
    batch=st.integers(1, 4),
)
def test_any_convolution(
    image, channels, outputs, kernel, stride, padding, dilation, layout, residual, batch
):
    spans = [d * (k - 1) + 1 for d, k in zip(dilation, kernel, strict=True)]
    padding = tuple(
        max(p, -(-(span - size) // 2)) for p, span, size in zip(padding, spans, image, strict=True)
    )
    b = Builder((channels, *image))
    options = {
        "kernel": kernel, "stride": stride, "padding": padding, "dilation": dilation,
        "layout": layout,
    }  # fmt: skip
    side = b.conv("x", outputs, activation="none", **options) if residual else None
    b.conv("x", outputs, residual=side, seed=1, **options)
    assert_agrees(b.model(), batches=(batch,), threads=(2,))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("layout", ["dense", ("nm", 2, 4)], ids=str)
def test_activations_after_a_residual(activation, layout):
    b = Builder((8, 6, 5))
    side = b.conv("x", 11, activation="none")
    x = b.conv("x", 11, residual=side, activation=activation, layout=layout, seed=1)
    b.conv(x, 3, activation="none")  # sees the padding of what came before
    assert_agrees(b.model())


@pytest.mark.parametrize("groups", [2, 4, 8, 16])
@pytest.mark.parametrize("stride", [1, 2])
def test_grouped_convolution(groups, stride):
    b = Builder((16, 8, 7))
    x = b.conv("x", 48, groups=groups, stride=(stride, stride))
    b.conv(x, 5, kernel=(1, 1), padding=(0, 0), activation="none")
    assert_agrees(b.model())


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("image", [(3, 2), (9, 5), (30, 17)], ids=str)
def test_depthwise_convolution(image, stride):
    """From less than one vector to more than the widest tile, and what is left over."""
    b = Builder((6, *image))
    options = {"groups": 6, "stride": (stride, stride)}
    side = b.conv("x", 6, activation="none", **options)
    x = b.conv("x", 6, activation="relu6", residual=side, seed=1, **options)
    b.conv(x, 5, activation="none")  # sees the padding
    assert_agrees(b.model())


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("features", [(40, 32), (37, 19), (1, 1)], ids=str)
def test_linear(layout, features):
    b = Builder((features[0], 1, 1))
    x = b.linear(b.node("flatten", "x"), features[1], layout=layout, activation="relu")
    b.linear(x, 7, layout=layout, activation="silu", seed=2)
    assert_agrees(b.model(), batches=(1, 2, 7))


@pytest.mark.parametrize("kind", ["max", "avg", "avg_without_pad", "dilated"])
@pytest.mark.parametrize("ceil_mode", [False, True])
@pytest.mark.parametrize("image", [(7, 7), (8, 10), (3, 2)], ids=str)
def test_pools(kind, ceil_mode, image):
    b = Builder((5, *image))
    x = b.conv("x", 9, activation="none")
    attrs = {**POOL, "ceil_mode": ceil_mode}
    if kind == "max":
        x = b.node("max_pool2d", x, dilation=(1, 1), **attrs)
    elif kind == "dilated":
        x = b.node("max_pool2d", x, dilation=(2, 1), **{**attrs, "kernel": (2, 2)})
    else:
        x = b.node("avg_pool2d", x, count_include_pad=kind == "avg", **attrs)
    b.conv(x, 4, activation="none")
    assert_agrees(b.model())


@pytest.mark.parametrize("size", [(1, 1), (2, 3), (7, 7), (9, 11)], ids=str)
def test_adaptive_pool(size):
    b = Builder((6, 7, 9))
    x = b.node("adaptive_avg_pool2d", b.conv("x", 10), output_size=size)
    b.conv(x, 3, activation="none")
    assert_agrees(b.model())


def test_concat_in_place_and_copied():
    """One part is the input, one is used twice, one is itself a concatenation."""
    b = Builder((4, 6, 7))
    a = b.conv("x", 5)
    c = b.conv(a, 6, layout=("bsr", (8, 8), 0.9))
    inner = b.node("concat", a, c)
    outer = b.node("concat", inner, "x", c, b.conv(inner, 3, activation="silu"))
    again = b.node("concat", c, outer)
    b.conv(again, 4, activation="none")
    assert_agrees(b.model())


def test_concat_of_vectors():
    b = Builder((6, 1, 1))
    flat = b.node("flatten", "x")
    parts = [b.linear(flat, n, seed=n) for n in (3, 18, 5)]
    b.linear(b.node("concat", *parts), 4)
    assert_agrees(b.model())


def test_concat_of_vectors_that_lie_elsewhere():
    b = Builder((6, 1, 1))
    flat = b.node("flatten", "x")
    part = b.linear(flat, 3)
    twice = b.node("concat", part, part)
    b.linear(b.node("concat", twice, flat, part, b.node("concat", part, flat)), 4)
    assert_agrees(b.model())


def test_slices_pads_gates_and_scales():
    b = Builder((6, 9, 8))
    x = b.node("affine", "x", activation="none")
    cut = b.node("slice", x, start=(1, 0, 1), stop=(6, 9, 8), step=(2, 2, 3))
    wide = b.node("pad", cut, before=(2, 1, 0), after=(1, 0, 2))
    x = b.conv(wide, 7)
    gate = b.conv(b.node("adaptive_avg_pool2d", x, output_size=(1, 1)), 7, kernel=(1, 1),
                  padding=(0, 0), activation="sigmoid")  # fmt: skip
    x = b.node("mul", x, gate)
    x = b.node("add", x, b.node("activation", x, activation="hardswish"), activation="relu6")
    x = b.node("mul", x, x)
    b.conv(x, 4, activation="none")
    assert_agrees(b.model())


def test_valid_and_padded_convolutions_share_a_frame():
    """Inception's stem: 3x3 without padding, then with, then 1x7 and 7x1."""
    b = Builder((3, 15, 13))
    x = b.conv("x", 8, stride=(2, 2), padding=(0, 0))
    x = b.conv(x, 9, padding=(0, 0))
    y = b.conv(x, 10)
    z = b.conv(b.conv(x, 6, kernel=(1, 7), padding=(0, 3)), 10, kernel=(7, 1), padding=(3, 0))
    b.conv(b.node("add", y, z, activation="relu"), 4, padding=(3, 3))
    assert_agrees(b.model(), batches=(1, 2, 5))


def test_padding_is_zero_whatever_memory_held():
    """Memory is reused between layers and calls; huge values must not leak into padding."""
    b = Builder((8, 5, 6))
    x = "x"
    for seed in range(6):
        x = b.conv(x, 8, padding=(1, 1), seed=seed, layout=("bsr", (8, 8), 1.0))
    model = b.model()
    network = load(model, engine="compiled")
    images = randoms(2, 8, 5, 6)
    expected = network(images)
    network(np.full_like(images, 1e30))
    network(np.full_like(images, np.nan))
    np.testing.assert_array_equal(network(images), expected)


def test_nan_and_infinity_pass():
    b = Builder((8, 6, 6))
    x = b.conv("x", 8, padding=(0, 0), kernel=(1, 1))
    b.node("max_pool2d", x, dilation=(1, 1), **POOL)
    model = b.model()
    images = randoms(1, 8, 6, 6)
    images[0, 0, 2, 3] = np.nan
    images[0, 1, 5, 5] = np.inf
    got = load(model, engine="compiled")(images)
    expected = reference.run(model, images)
    np.testing.assert_array_equal(np.isnan(got), np.isnan(expected))
    np.testing.assert_array_equal(np.isposinf(got), np.isposinf(expected))
    assert np.isnan(got).any()


def test_empty_rows_and_empty_weights():
    b = Builder((16, 5, 5))
    x = b.conv("x", 16, layout=("bsr", (8, 8), 0.0))
    b.conv(x, 24, layout=("bsr", (8, 8), 0.2), activation="none", seed=5)
    model = b.model()
    assert any(0 in np.diff(w.indptr) for w in model.weights.values())
    assert_agrees(model)


def test_bits_do_not_depend_on_threads_or_repetition():
    b = Builder((16, 20, 20))
    x = b.conv("x", 32, layout=("bsr", (8, 8), 0.5))
    x = b.conv(x, 64, layout=("bsr", (8, 8), 0.5), stride=(2, 2))
    b.linear(b.node("flatten", b.node("adaptive_avg_pool2d", x, output_size=(1, 1))), 10)
    network = load(b.model(), engine="compiled", threads=1)
    images = randoms(3, 16, 20, 20)
    expected = network(images)
    for threads in (1, 2, 3, 5):
        network.threads = threads
        for _ in range(5):
            np.testing.assert_array_equal(network(images), expected)


def test_images_of_a_batch_do_not_mix():
    b = Builder((8, 7, 7))
    b.conv(b.conv("x", 16, padding=(2, 2), kernel=(5, 5)), 4, activation="none")
    network = load(b.model(), engine="compiled")
    images = randoms(5, 8, 7, 7)
    together = network(images)
    rounding = 1e-6 * np.abs(together).max()
    for i in range(5):
        np.testing.assert_allclose(network(images[i : i + 1])[0], together[i], atol=rounding)


def test_old_batch_sizes_are_dropped():
    b = Builder((3, 4, 4))
    b.conv("x", 8)
    network = load(b.model(), engine="compiled")
    for batch in range(1, PLANS + 6):
        network(randoms(batch, 3, 4, 4))
    assert len(network.engine._ready) == PLANS


@pytest.mark.slow
def test_too_large_a_batch_says_so():
    b = Builder((64, 64, 64))
    b.conv("x", 256)
    network = load(b.model(), engine="compiled")
    with pytest.raises(ValueError, match="smaller batches"):
        network.engine._plan(3000, 1)


def test_timed_run_says_where_the_time_went():
    b = Builder((8, 40, 40))
    x = b.conv("x", 32)
    b.conv(x, 8, seed=1)
    network = load(b.model(), engine="compiled", threads=2)
    images = randoms(2, *network.input_shape, seed=3)
    started = time.perf_counter_ns()
    output, trace = network.engine.timed_run(images, 2)
    elapsed = time.perf_counter_ns() - started
    np.testing.assert_array_equal(output, network(images))
    assert trace.steps == network.engine.steps.steps
    assert trace.step_ns.shape == (len(trace.steps),)
    assert trace.busy_ns.shape == (2, len(trace.steps))
    assert (trace.step_ns > 0).all()
    assert trace.step_ns.sum() < elapsed
    assert (trace.busy_ns[0] <= trace.step_ns).all()
    assert (trace.busy_ns >= 0).all()
    # the convolution of the larger plane takes most of the work
    assert trace.steps[int(trace.busy_ns.sum(axis=0).argmax())].packed is not None


def test_every_weight_is_packed_once_while_ways_are_measured(tmp_path, monkeypatch):
    """That of VGG's first linear layer has 400 MB, and the network is lowered for every way."""
    monkeypatch.setattr(algorithms, "cache_folder", lambda: tmp_path)  # nothing measured yet
    monkeypatch.setattr(algorithms, "MEASURED_FLOPS", 0)
    packed = []
    pack = steps.pack
    monkeypatch.setattr(steps, "pack", lambda *given: packed.append(given[0]) or pack(*given))
    b = Builder((3, 8, 8))
    b.linear(b.node("flatten", b.conv("x", 8)), 4)
    model = b.model()
    engine = CompiledEngine(model)
    assert len(engine.algorithms.open) == 1
    engine.run(randoms(1, 3, 8, 8), 1)
    assert packed == list(model.weights.values())
