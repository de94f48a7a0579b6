"""Large batches in parts: how they are divided, and what comes out."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from models import Builder, randoms

from blocksparse.runtime import load
from blocksparse.runtime.batches import CACHE, MOST_IMAGES, divide, images_in_cache
from blocksparse.runtime.pieces import Piece


def network(side):
    """Convolutions that read and write 11 and 24 channels, and a classifier."""
    b = Builder((3, side, side))
    x = b.conv(b.conv("x", 8), 16, layout=("bsr", (8, 8), 0.5))
    b.linear(b.node("flatten", b.node("adaptive_avg_pool2d", x, output_size=(1, 1))), 10)
    return b.model()


@given(st.integers(1, 60), st.integers(0, 16), st.integers(1, 9))
def test_parts_cover_the_batch(count, in_cache, threads):
    own, shared = divide(count, in_cache, threads)
    images = range(count)
    assert [i for part in own + shared for i in images[part]] == list(images)
    sizes = [[part.stop - part.start for part in parts] for parts in (own, shared)]
    for some in sizes:
        assert some == sorted(some, reverse=True)
        assert min(some, default=0) >= max(some, default=0) - 1
    fits = max(1, in_cache)
    if threads == 1 or count <= fits:
        assert not own
        assert len(shared) == -(-count // max(fits, threads))  # no more than there must be
        return
    assert max(sizes[0], default=0) <= fits
    assert sizes[0][::threads] == sizes[0][threads - 1 :: threads]  # every thread has as many
    assert len(own) == threads * -(-(count // threads) // fits)
    assert sum(sizes[1]) < threads
    assert len(shared) <= 1


def test_images_are_those_whose_activations_fit():
    side = int((CACHE / (3 * 4 * 24)) ** 0.5)  # three images
    assert images_in_cache(network(side).graph) == 3
    assert images_in_cache(network(side + 1).graph) == 2
    assert images_in_cache(network(8).graph) == MOST_IMAGES
    assert images_in_cache(network(400).graph) == 0


@pytest.mark.parametrize(
    ("threads", "plans"),
    [
        (1, {(1, False), (2, False)}),
        (2, {(1, False), (2, False), (1, True)}),
        (3, {(2, False), (1, True)}),
    ],
)
def test_parts_compute_what_the_whole_batch_does(threads, plans, monkeypatch):
    net = load(network(20), threads=threads)
    x = randoms(7, 3, 20, 20)
    whole = net(x)
    assert set(net.engine._ready) == {(7, False, Piece.ALL)}
    monkeypatch.setattr(net.engine, "_in_cache", 2)
    net.engine._ready.clear()
    divided = net(x)
    parts = {(*plan, Piece.BACKBONE) for plan in plans}
    assert set(net.engine._ready) == {*parts, (7, False, Piece.HEAD)}
    np.testing.assert_allclose(divided, whole, rtol=1e-5, atol=1e-5)
    each = np.concatenate([net(x[i : i + 1]) for i in range(7)])
    np.testing.assert_allclose(divided, each, rtol=1e-5, atol=1e-5)
    for _ in range(5):
        np.testing.assert_array_equal(net(x), divided)  # whichever thread took which part


@pytest.mark.parametrize("count", [5, 6, 8])
def test_time_is_that_of_all_parts(count, monkeypatch):
    net = load(network(20), threads=2)
    x = randoms(count, 3, 20, 20)
    monkeypatch.setattr(net.engine, "_in_cache", 2)
    output, trace = net.engine.timed_run(x, 2)
    np.testing.assert_array_equal(output, net(x))
    _, one = net.engine.timed_run(x[:1], 2)
    assert trace.steps is one.steps is net.engine.steps.steps
    assert trace.busy_ns.shape == one.busy_ns.shape
    assert trace.busy_ns.any(axis=0).all(), "a step took no time"
    assert trace.step_ns.min() > 0
    assert set(trace.by_node()) == set(one.by_node())
    total = trace + one
    np.testing.assert_array_equal(total.step_ns, trace.step_ns + one.step_ns)
    np.testing.assert_array_equal(total.busy_ns, trace.busy_ns + one.busy_ns)


def test_who_runs_parts_of_their_own_shares_the_time():
    """Each thread's steps take their own time; side by side, the call takes their mean."""
    net = load(network(64), threads=2)
    x = randoms(2, 3, 64, 64)
    net.engine._in_cache = 1
    net(x)
    ratios, helped = [], 0
    for _ in range(50):
        _, trace = net.engine.timed_run(x, 2)
        backbone = [step.node.op == "conv2d" for step in trace.steps]
        busy = trace.busy_ns[:, backbone].sum(axis=1)
        ratios.append(busy.sum() / (2 * trace.step_ns[backbone].sum()))
        helped += busy[1] > 0
    assert 0.95 < np.median(ratios) <= 1.001
    assert helped, "one thread did all"


def test_close_ends_the_threads_and_the_next_call_brings_them_back():
    net = load(network(20), threads=2)
    net.engine._in_cache = 1
    x = randoms(4, 3, 20, 20)
    before = set(threading.enumerate())
    expected = net(x)
    assert set(threading.enumerate()) - before
    net.close()
    assert set(threading.enumerate()) <= before
    np.testing.assert_array_equal(net(x), expected)


def test_batches_from_several_threads_at_once():
    net = load(network(20), threads=2)
    net.engine._in_cache = 1
    inputs = [randoms(5, 3, 20, 20, seed=seed) for seed in range(8)]
    expected = [net(x) for x in inputs]
    with ThreadPoolExecutor(4) as pool:
        for _ in range(10):
            for got, wanted in zip(pool.map(net, inputs), expected, strict=True):
                np.testing.assert_array_equal(got, wanted)
