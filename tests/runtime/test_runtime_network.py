"""Loading and calling a network: arguments, threads, processes, memory."""

from __future__ import annotations

import copy
import gc
import os
import pickle
import subprocess
import sys
import threading
import tracemalloc

import numpy as np
import pytest
from models import Builder, randoms

from blocksparse.format import BsrWeight, DenseWeight, NMWeight, write
from blocksparse.runtime import load, reference
from blocksparse.runtime.kernels import loops, objects
from blocksparse.runtime.pieces import Piece


@pytest.fixture(scope="module")
def model():
    b = Builder((16, 24, 24))
    x = b.conv("x", 64, layout=("bsr", (8, 8), 0.5))
    x = b.conv(x, 64, layout=("nm", 2, 4), seed=1)
    x = b.conv(x, 96, stride=(2, 2), seed=2)
    flat = b.node("flatten", b.node("adaptive_avg_pool2d", x, output_size=(1, 1)))
    b.linear(flat, 10)
    return b.model()


def test_many_python_threads_at_once(model):
    network = load(model, threads=2)
    images = [randoms(1 + i % 3, 16, 24, 24, seed=i) for i in range(6)]
    expected = [network(x) for x in images]
    wrong = []

    def work(i):
        equal = [np.array_equal(network(images[i]), expected[i]) for _ in range(20)]
        wrong.extend([i] * equal.count(False))

    workers = [threading.Thread(target=work, args=(i,)) for i in range(6)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join(timeout=120)
        assert not worker.is_alive(), "a call hangs"
    assert not wrong


def run_with(program, model, tmp_path):
    """Run a program in a process of its own; it is given the path of the model's file."""
    path = tmp_path / "m.bsr.safetensors"
    write(path, model)
    done = subprocess.run([sys.executable, "-W", "ignore", "-c", program, str(path)], timeout=120)
    assert done.returncode == 0


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_after_a_fork(model, tmp_path):
    """Helper threads do not survive a fork; calls in the child still end, with the same bits."""
    program = """
import os, sys, time, numpy as np, blocksparse
network = blocksparse.load(sys.argv[1], threads=2)
x = np.ones((1, *network.input_shape), np.float32)
expected = network(x)
network.engine._in_cache = 1
several = np.repeat(x, 5, 0)
expected_of_several = network(several)
network(x)
child = os.fork()
if child == 0:
    same = all(np.array_equal(network(x), expected) for _ in range(50))
    same &= all(np.array_equal(network(several), expected_of_several) for _ in range(50))
    # a queue without threads would keep every call; threads may have to wait for a core
    queue, end = network.engine._helpers._queue, time.monotonic() + 30
    while queue.qsize() and time.monotonic() < end:
        time.sleep(0.01)
    # the parent's helper waited for this call when the child was made, but only in the parent
    started = network.engine._helpers._process == os.getpid()
    os._exit(0 if same and started and not queue.qsize() else 3)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    run_with(program, model, tmp_path)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_fork_while_another_thread_holds_the_locks(model, tmp_path):
    program = """
import contextlib, os, signal, sys, threading, numpy as np, blocksparse
from blocksparse.runtime.kernels import loops, objects
network = blocksparse.load(sys.argv[1], threads=2)
x = np.ones((2, *network.input_shape), np.float32)
network(x[:1])
engine = network.engine
engine._in_cache = 1
of_helpers = (engine._helpers._lock, engine._streams._helpers._lock)
locks = (engine._lock, engine._binding, *of_helpers, loops._lock, objects._lock)
held = threading.Event()
def hold():
    with contextlib.ExitStack() as stack:
        for lock in locks:
            stack.enter_context(lock)
        held.set()
        threading.Event().wait()
threading.Thread(target=hold, daemon=True).start()
held.wait()
child = os.fork()
if child == 0:
    signal.alarm(30)
    another = blocksparse.load(sys.argv[1], engine="compiled", threads=2)
    another.engine._in_cache = 1
    os._exit(0 if np.array_equal(network(x), another(x)) else 3)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    run_with(program, model, tmp_path)


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="cores cannot be chosen here")
@pytest.mark.skipif(len(os.sched_getaffinity(0)) < 2, reason="needs two cores")
def test_helpers_keep_off_the_callers_core(model):
    network = load(model, threads=2)
    before = os.sched_getaffinity(0)
    x = randoms(1, 16, 24, 24)
    expected = network(x)
    try:
        for core in sorted(before)[:2]:
            os.sched_setaffinity(0, {core})  # the caller is here, and nowhere else
            os.sched_setaffinity(0, before)
            np.testing.assert_array_equal(network(x), expected)
            (helper,) = network.engine._helpers._threads
            assert len(os.sched_getaffinity(helper.native_id)) == len(before) - 1
    finally:
        os.sched_setaffinity(0, before)
    assert os.sched_getaffinity(0) == before


def test_the_threads_of_a_dropped_network_end(model):
    network = load(model, threads=3)
    network(randoms(1, 16, 24, 24))
    helpers = list(network.engine._helpers._threads)
    assert len(helpers) == 2
    del network
    gc.collect()
    for helper in helpers:
        helper.join(timeout=60)
        assert not helper.is_alive()


def test_threads_are_settable_and_checked(model):
    network = load(model, threads=1)
    network.threads = 3
    assert network.threads == 3
    for wrong in (0, -1, 2.0, True):
        with pytest.raises(ValueError, match="threads must be an integer of 1 to"):
            network.threads = wrong


def test_engines(model, caplog, monkeypatch):
    assert str(load(model).engine).startswith("compiled engine")
    assert str(load(model, engine="reference").engine).startswith("reference engine")
    with pytest.raises(ValueError, match="engine must be"):
        load(model, engine="fast")
    with pytest.raises(ValueError, match="winograd must be True or False"):
        load(model, winograd="off")
    monkeypatch.setenv("NUMBA_DISABLE_JIT", "1")
    with pytest.raises(RuntimeError, match="NUMBA_DISABLE_JIT"):
        load(model, engine="compiled")
    fallback = load(model)
    assert "NUMBA_DISABLE_JIT" in str(fallback.engine)
    assert "running in NumPy" in caplog.text
    x = randoms(1, 16, 24, 24)
    np.testing.assert_array_equal(fallback(x), reference.run(model, x))


def test_where_code_cannot_be_loaded_the_reference_runs(model, monkeypatch, caplog):
    def refuse(symbol, text):
        raise OSError("memory cannot be made executable")

    monkeypatch.setattr(loops, "_addresses", {})
    monkeypatch.setattr(objects, "loop_address", refuse)
    assert "memory cannot be made executable" in str(load(model).engine)
    with pytest.raises(RuntimeError, match="executable; use engine='reference'"):
        load(model, engine="compiled")


def test_explain_names_kernels_and_reasons(model, tmp_path, monkeypatch):
    monkeypatch.setenv("BLOCKSPARSE_CACHE", str(tmp_path))  # no layer has been measured
    text = str(load(model).explain())
    for part in (
        "f32_bsr8x8_conv_relu", "f32_nm2of4_conv_relu", "f32_dense_linear_none", "phase planes",
        "blocks stored", "packed 2:4", "f32_adaptive_avg_pool2d",
    ):  # fmt: skip
        assert part in text
    rows = load(model).explain().rows
    assert [row.name for row in rows] == [node.name for node in model.graph.nodes]


def test_wrong_inputs_say_what_was_expected(model):
    network = load(model)
    with pytest.raises(ValueError, match=r"\(N, 16, 24, 24\), has \(16, 24, 24\)"):
        network(randoms(16, 24, 24))
    with pytest.raises(ValueError, match="float32, is float64"):
        network(randoms(1, 16, 24, 24).astype(np.float64))
    assert network(np.zeros((0, 16, 24, 24), np.float32)).shape == (0, 10)


def test_inputs_that_are_not_contiguous(model):
    network = load(model)
    x = randoms(2, 16, 24, 24)
    np.testing.assert_array_equal(network(np.asfortranarray(x)), network(x))
    np.testing.assert_array_equal(network(x[:, :, ::-1][:, :, ::-1]), network(x))


def test_a_read_only_input(model):
    network = load(model)
    x = randoms(2, 16, 24, 24)
    expected = network(x)
    x.setflags(write=False)
    np.testing.assert_array_equal(network(x), expected)


def test_warmup_and_close(model):
    network = load(model)
    network.warmup(batch=2)
    assert list(network.engine._ready) == [(2, False, Piece.ALL)]
    network.close()
    assert not network.engine._ready
    assert network(randoms(1, 16, 24, 24)).shape == (1, 10)  # a closed network opens itself again
    for wrong in (0, -1, 1.0):
        with pytest.raises(ValueError, match="batch must be an integer of at least 1"):
            network.warmup(wrong)


@pytest.mark.parametrize("engine", ["compiled", "reference"])
@pytest.mark.parametrize(
    "again", [copy.deepcopy, lambda network: pickle.loads(pickle.dumps(network))]
)
def test_a_copy_for_another_process(model, engine, again):
    network = load(model, threads=2, engine=engine, winograd=False)
    x = randoms(2, 16, 24, 24)
    expected = network(x)
    other = again(network)
    assert other.engine is not network.engine
    assert other.engine.model is other.model
    assert str(other.engine) == str(network.engine)
    assert other.threads == 2
    np.testing.assert_array_equal(other(x), expected)
    if engine == "compiled":
        assert not other.engine.algorithms.allow_winograd


def one_layer(layout):
    b = Builder((256, 4, 4))
    b.conv("x", 256, layout=layout, bias=False)
    return b.model()


@pytest.mark.parametrize(
    ("layout", "kind", "share"),
    [(("bsr", (8, 8), 0.25), BsrWeight, 0.27), (("nm", 2, 4), NMWeight, 0.56),
     (("nm", 1, 4), NMWeight, 0.29), ("dense", DenseWeight, 1.02)],
    ids=str,
)  # fmt: skip
def test_no_dense_copy_of_a_sparse_weight(layout, kind, share):
    """What an engine holds of a weight is its stored values and indices, and little else."""
    model = one_layer(layout)
    weight = next(iter(model.weights.values()))
    assert isinstance(weight, kind)
    dense = 4 * 256 * 256 * 9
    # Winograd's transformed weights are larger, and whether they pay is measured on this machine.
    load(model, winograd=False)(randoms(1, 256, 4, 4))  # compiled before memory is counted
    tracemalloc.start()
    network = load(model, winograd=False)
    held, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    packed = sum(s.packed.nbytes for s in network.engine.steps.steps if s.packed is not None)
    assert packed <= share * dense
    assert held <= 1.1 * share * dense
    if kind is NMWeight:
        assert peak <= 1.2 * share * dense
