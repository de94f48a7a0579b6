"""Concatenations and slices: what is written in place, lies in another value, or is copied."""

from __future__ import annotations

import numpy as np
import pytest
from bare import engine_of, run_over
from hypothesis import given, settings
from hypothesis import strategies as st
from models import Builder, randoms

from blocksparse.runtime import memory, reference
from blocksparse.runtime.kernels import records
from blocksparse.runtime.step import Place


def copies(engine):
    """Parts that are copied into a concatenation."""
    return [
        step.source
        for step in engine.steps.steps
        if step.node.op in ("concat", "slice") and step.op != records.STORE
    ]


def dense_block(layers, each):
    """A dense block of DenseNet: every layer reads all before it, joined anew or by one more."""
    b = Builder((4, 9, 7))
    parts, whole = [b.conv("x", 8)], None
    for layer in range(layers):
        if each:
            whole = b.node("concat", *parts) if layer else parts[0]
        elif layer:
            whole = b.node("concat", whole, parts[-1])
        else:
            whole = parts[0]
        normal = b.node("affine", whole, activation="relu")
        parts.append(b.conv(b.conv(normal, 6, (1, 1), padding=(0, 0)), 5))
    b.node("concat", *parts) if each else b.node("concat", whole, parts[-1])
    return b.model()


def test_a_dense_block_copies_nothing():
    """All its concatenations are the first channels of the last one, however they are written."""
    for each in (True, False):
        model = dense_block(4, each)
        engine = engine_of(model)
        assert copies(engine) == []
        joined = [node.name for node in model.graph.nodes if node.op == "concat"]
        places = [engine.steps.places[name] for name in joined]
        assert {(place.owner, place.channel) for place in places} == {(joined[-1], 0)}
        x = randoms(2, 4, 9, 7)
        expected = reference.run(model, x)
        for batch in (1, 2):
            got, _, _ = run_over(engine, x[:batch], np.nan, 2)
            atol = 1e-5 * np.abs(expected).max()
            np.testing.assert_allclose(got, expected[:batch], rtol=0, atol=atol)


def test_the_same_parts_joined_twice_lie_there_once():
    b = Builder((4, 9, 7))
    parts = [b.conv("x", 8, seed=seed) for seed in range(2)]
    one, two = b.node("concat", *parts), b.node("concat", *parts)
    b.node("add", one, two, activation="none")
    engine, x = engine_of(b.model()), randoms(1, 4, 9, 7)
    assert copies(engine) == []
    places, _ = memory.place_values(engine.steps, 1)
    assert {one, two} & places.keys() == {two}
    expected = reference.run(b.model(), x)
    np.testing.assert_allclose(engine.run(x, 1), expected, rtol=1e-5, atol=1e-5)


def test_what_came_in_is_copied_once():
    """A concatenation that holds a copy can lie in another one, too."""
    b = Builder((4, 9, 7))
    part = b.conv("x", 8)
    small = b.node("concat", "x", part)
    b.node("concat", "x", part, b.conv(small, 3))
    engine, x = engine_of(b.model()), randoms(1, 4, 9, 7)
    assert copies(engine) == ["x"]
    expected = reference.run(b.model(), x)
    np.testing.assert_allclose(engine.run(x, 2), expected, rtol=1e-5, atol=1e-5)


def test_channels_that_are_taken_lie_where_they_are():
    """A unit of ShuffleNet V2: one part goes through, and is copied behind the mixed channels."""
    b = Builder((8, 9, 7))
    x = b.conv("x", 16)
    left = b.node("slice", x, start=(0, 0, 0), stop=(8, 9, 7), step=(1, 1, 1))
    right = b.node("slice", x, start=(8, 0, 0), stop=(16, 9, 7), step=(1, 1, 1))
    b.node("concat", left, b.conv(right, 8))
    engine, x = engine_of(b.model()), randoms(2, 8, 9, 7)
    (copy,) = (
        step
        for step in engine.steps.steps
        if step.node.op in ("concat", "slice") and step.op != records.STORE
    )
    assert copy.target == left
    assert engine.steps.places[right] == Place("conv2d0", 8)
    rows = {row.name: row for row in engine.choices()}
    assert rows[right].reason == "some channels of the node before it, where they are"
    expected = reference.run(b.model(), x)
    for batch in (1, 2):
        got, _, _ = run_over(engine, x[:batch], np.nan, 2)
        np.testing.assert_allclose(got, expected[:batch], rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize(
    ("start", "stop", "step"),
    [
        ((0, 1, 0), (16, 9, 7), (1, 1, 1)),
        ((0, 0, 0), (16, 9, 6), (1, 1, 1)),
        ((0, 0, 0), (16, 9, 7), (2, 1, 1)),
        ((0, 0, 0), (16, 9, 7), (1, 2, 1)),
    ],
)
def test_other_slices_are_copied(start, stop, step):
    b = Builder((8, 9, 7))
    b.node("slice", b.conv("x", 16), start=start, stop=stop, step=step)
    engine, x = engine_of(b.model()), randoms(2, 8, 9, 7)
    assert copies(engine) == ["conv2d0"]
    expected = reference.run(b.model(), x)
    np.testing.assert_allclose(engine.run(x, 2), expected, rtol=1e-5, atol=1e-4)


@settings(max_examples=80)
@given(data=st.data(), threads=st.integers(1, 2), batch=st.integers(1, 2))
def test_any_parts_in_any_order(data, threads, batch):
    """Prefixes, repetitions, nested and crossing ones, slices; each is read once more, or twice."""
    b = Builder((3, 24, 5))
    names, read = ["x"], []
    for step in range(data.draw(st.integers(2, 6))):
        kind = data.draw(st.sampled_from(["conv", "concat", "slice", "activation"]))
        name = data.draw(st.sampled_from(names))
        if kind == "conv":
            names.append(b.conv(name, 2 + step, seed=step))
        elif kind == "activation":  # may take the place of what it reads
            names.append(b.node("activation", name, activation="hardswish"))
        elif kind == "slice":
            channels = b.shapes[name][0]
            first = data.draw(st.integers(0, channels - 1))
            last = data.draw(st.integers(first + 1, channels))
            names.append(
                b.node("slice", name, start=(first, 0, 0), stop=(last, 24, 5), step=(1, 1, 1))
            )
        else:
            joined = [name for name in names if name.startswith("concat")]
            first = [node.inputs for node in b.nodes if joined and node.name == joined[-1]]
            start = list(*first) if first and data.draw(st.booleans()) else []
            more = data.draw(st.lists(st.sampled_from(names), min_size=2, max_size=3))
            names.append(b.node("concat", *start, *more))
        read.append(b.conv(names[-1], 4, (1, 1), padding=(0, 0), seed=step))
    late = data.draw(st.booleans())
    read += [b.conv(name, 4, (1, 1), padding=(0, 0), seed=9) for name in names if late]
    b.node("concat", *read)
    model, x = b.model(), randoms(batch, 3, 24, 5)
    got, _, _ = run_over(engine_of(model), x, np.nan, threads)
    np.testing.assert_allclose(got, reference.run(model, x), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("features", [5, 16, 40])
def test_vectors_are_copied_where_they_are_wanted_twice(features):
    b = Builder((4, 3, 3))
    a = b.linear(b.node("flatten", "x"), features)
    c = b.linear(a, 7)
    b.node("concat", a, c, a, b.node("concat", c, a))
    engine, x = engine_of(b.model()), randoms(3, 4, 3, 3)
    assert copies(engine) == [a, "concat3"]  # c and a, joined, lie where they are wanted first
    expected = reference.run(b.model(), x)
    for batch in (1, 3):
        got, _, _ = run_over(engine, x[:batch], np.nan, 2)
        np.testing.assert_allclose(got, expected[:batch], rtol=1e-5, atol=1e-4)
