"""Where values lie: apart while they exist together, in place of another where they may."""

from __future__ import annotations

import numpy as np
import pytest
from bare import engine_of, forced, run_over
from hypothesis import given
from hypothesis import strategies as st
from models import Builder, randoms

from blocksparse.runtime import halves, reference
from blocksparse.runtime.algorithms import Algorithm
from blocksparse.runtime.memory import Lifetime, assign, place_values
from blocksparse.runtime.tolerance import tolerance

BLOCKS = ("bsr", (8, 8), 0.6)


def close(model, found, x):
    """Whether an output is the reference's but for rounding."""
    expected = reference.run(model, x)
    allowed = 20 * tolerance(model, float(np.abs(expected).max()))
    np.testing.assert_allclose(found, expected, rtol=0, atol=allowed)


@given(st.lists(st.tuples(st.integers(1, 50), st.integers(0, 20), st.integers(0, 20)), max_size=30))
def test_values_that_exist_together_are_apart(values):
    sizes = {str(i): size for i, (size, _, _) in enumerate(values)}
    lives = {str(i): Lifetime(min(a, b), max(a, b)) for i, (_, a, b) in enumerate(values)}
    places, total = assign(sizes, lives)
    used = [set() for _ in range(21)]
    for name, place in places.items():
        floats = set(range(place, place + sizes[name]))
        assert max(floats) < total
        for step in range(lives[name].first, lives[name].last + 1):
            assert not used[step] & floats
            used[step] |= floats


def test_memory_beside_what_is_placed():
    """Values go where those placed before are gone, and not below the start."""
    lives = {"early": Lifetime(0, 1), "late": Lifetime(2, 3), "both": Lifetime(1, 2)}
    placed = {"early": (0, 10)}
    assert assign({"late": 10}, lives, 0, placed) == ({"late": 0}, 10)
    assert assign({"both": 10}, lives, 0, placed) == ({"both": 10}, 20)
    assert assign({"late": 10}, lives, 30, placed) == ({"late": 30}, 40)
    assert assign({}, lives, 7) == ({}, 7)


def test_no_value_lies_below_the_start():
    """Also behind one that had to go beside another."""
    lives = {
        "up": Lifetime(0, 9),
        "big": Lifetime(0, 5),
        "small": Lifetime(2, 9),
        "tiny": Lifetime(6, 9),
    }
    sizes = {"big": 8, "small": 4, "tiny": 2}
    places, total = assign(sizes, lives, 30, {"up": (0, 10)})
    assert places == {"big": 30, "small": 38, "tiny": 30}
    assert total == 42


def test_memory_is_reused():
    lives = {str(i): Lifetime(i, i + 1) for i in range(10)}
    assert assign(dict.fromkeys(lives, 100), lives)[1] == 200


# in place of another


def shared(model):
    """Pairs of values of which the later lies where the other was, and the results are right."""
    engine = engine_of(model)
    places, _ = place_values(engine.steps, 1)
    x = randoms(2, *model.graph.inputs[0].shape)
    close(model, engine.run(x, 1), x)
    names = ["x", *(node.name for node in model.graph.nodes)]
    pairs = [(a, b) for i, a in enumerate(names) for b in names[i + 1 :]]
    return {(a, b) for a, b in pairs if engine.steps.shapes[a] == engine.steps.shapes[b]
            and places.get(a, -1) == places.get(b, -2)}  # fmt: skip


def test_a_sum_overwrites_what_it_adds_last():
    """Two blocks in a row, as in ResNet: the whole stage in one place."""
    b = Builder((8, 6, 6))
    stem = b.conv("x", 16)
    first = b.conv(b.conv(stem, 8), 16, residual=stem)
    second = b.conv(b.conv(first, 8), 16, residual=first)
    assert {(stem, first), (first, second), (stem, second)} <= shared(b.model())


def test_a_value_that_is_read_later_stays():
    b = Builder((8, 6, 6))
    stem = b.conv("x", 16)
    total = b.conv(b.conv(stem, 8), 16, residual=stem)
    b.conv(stem, 16, residual=total)
    assert (stem, total) not in shared(b.model())


@pytest.mark.parametrize("kernel", [1, 3])
def test_what_a_window_reads_is_not_overwritten(kernel):
    """A convolution that adds its own input reads all channels of a pixel, and its neighbours."""
    b = Builder((16, 6, 6))
    stem = b.conv("x", 16)
    pad = (kernel // 2, kernel // 2)
    total = b.conv(stem, 16, (kernel, kernel), padding=pad, residual=stem)
    assert (stem, total) not in shared(b.model())


@pytest.mark.parametrize("kernel", [1, 3])
@pytest.mark.parametrize("layout", ["dense", BLOCKS, ("nm", 2, 4)])
def test_what_a_window_reads_a_part_of_is_not_overwritten(kernel, layout):
    """A convolution of one part of a concatenation that adds the whole."""
    b = Builder((8, 60, 60))
    left, right = b.conv("x", 8), b.conv("x", 8, seed=1)
    both = b.node("concat", left, right)
    pad = (kernel // 2, kernel // 2)
    total = b.conv(left, 16, (kernel, kernel), layout, padding=pad, residual=both)
    assert (both, total) not in shared(b.model())


def test_element_wise_operations_overwrite_what_they_read_last():
    b = Builder((16, 6, 6))
    left, right = b.conv("x", 16), b.conv("x", 16, seed=1)
    total = b.node("add", left, right, activation="none")
    product = b.node("mul", total, total)
    scaled = b.node("affine", product, activation="relu")
    assert {(right, total), (total, product), (product, scaled)} <= shared(b.model())


def test_a_gate_that_both_halves_read_stays(monkeypatch):
    """Of two rows each half has one pixel a channel, as many as the gate."""
    monkeypatch.setattr(halves, "LEAST_ROWS", 2)
    b = Builder((8, 4, 2))
    pool = b.node("max_pool2d", "x", kernel=(2, 2), stride=(2, 2), padding=(0, 0), dilation=(1, 1),
                  ceil_mode=False)  # fmt: skip
    mean = b.node("adaptive_avg_pool2d", pool, output_size=(1, 1))
    gate = b.node("activation", mean, activation="sigmoid")
    b.node("mul", pool, gate)
    model = b.model()
    x = randoms(1, 8, 4, 2)
    engine = engine_of(model)
    places, _ = place_values(halves.halve(model, engine.steps), 1)
    assert places["mul3.upper"] == places["max_pool2d0.upper"] != places[gate]
    for _ in range(5):
        close(model, engine.run(x, 2), x)


def test_parts_of_a_concatenation_stay_there():
    b = Builder((16, 6, 6))
    left, right = b.conv("x", 16), b.conv("x", 16, seed=1)
    both = b.node("concat", left, b.conv("x", 8))
    first = b.conv(b.conv("x", 8), 16, residual=left)
    second = b.conv(first, 16, residual=right)
    b.conv(b.node("concat", second, both), 16, residual=first)
    pairs = shared(b.model())
    assert (left, first) not in pairs
    assert (right, second) not in pairs


@pytest.mark.parametrize(
    ("way", "layout"),
    [(Algorithm.DIRECT, ("nm", 2, 4)), *((way, BLOCKS) for way in Algorithm if not way.dense)],
)
@pytest.mark.parametrize("height", [5, 14])
def test_every_way_to_convolve_writes_only_what_it_has_added(way, layout, height):
    """In memory full of NaN; a tile or row that an image ends in, too."""
    kernel, padding = ((1, 3), (0, 1)) if way.transforms == "rows" else ((3, 3), (1, 1))
    b = Builder((8, height, 21))
    stem = b.conv("x", 16)
    inner = b.conv(stem, 8, kernel, layout, padding=padding)
    total = b.conv(inner, 16, kernel, layout, padding=padding, residual=stem)
    b.node("flatten", total)
    model = b.model()
    places, _ = place_values(forced(model, way).steps, 1)
    assert places[stem] == places[total]
    x = randoms(2, 8, height, 21)
    for lanes in (4, 16):
        found, _, _ = run_over(forced(model, way, lanes), x, np.nan)
        close(model, found, x)
