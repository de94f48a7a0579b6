"""Where networks are cut, and that both pieces together are the whole."""

from __future__ import annotations

import numpy as np
import pytest
from bare import engine_of
from models import Builder, randoms

from blocksparse.runtime import reference
from blocksparse.runtime.kernels import records
from blocksparse.runtime.pieces import Piece

MEAN = {"output_size": (1, 1)}


def with_pool(b, x):
    return b.node("flatten", b.node("adaptive_avg_pool2d", x, **MEAN))


def agree(got, expected):
    np.testing.assert_allclose(got, expected, atol=1e-5 * np.abs(expected).max())


def classifier():
    b = Builder((3, 12, 12))
    b.linear(b.linear(with_pool(b, b.conv("x", 16)), 24, activation="relu"), 10)
    return b.model()


def flat_map():
    """As VGG: a flattened map, in which every pixel is a feature."""
    b = Builder((3, 6, 6))
    b.linear(
        b.node("activation", b.linear(b.node("flatten", b.conv("x", 16)), 24), activation="relu"), 5
    )
    return b.model()


def two_branches():
    """Only behind the sum of two vectors is one value left."""
    b = Builder((3, 12, 12))
    a, c = (with_pool(b, b.conv("x", 16, seed=seed)) for seed in range(2))
    b.linear(b.node("add", a, c, activation="none"), 10)
    return b.model()


def joined_vectors():
    b = Builder((3, 12, 12))
    a, c = (with_pool(b, b.conv("x", 8, seed=seed)) for seed in range(2))
    b.linear(b.node("concat", b.linear(a, 16), b.linear(c, 16, seed=1)), 10)
    return b.model()


def joined_with_what_it_is_made_of():
    """Part of a concatenation that is written in place comes before the head, part of it in it."""
    b = Builder((3, 12, 12))
    a = with_pool(b, b.conv("x", 16))
    b.linear(b.node("concat", a, b.linear(a, 8)), 10)
    return b.model()


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(
    "model", [classifier, flat_map, two_branches, joined_vectors, joined_with_what_it_is_made_of]
)
def test_both_pieces_compute_the_whole(model, threads):
    engine = engine_of(model())
    engine._in_cache = 1
    x = randoms(5, *engine.model.input_shape)
    agree(engine.run(x, threads), reference.run(engine.model, x))
    pieces = engine._pieces.steps
    assert len(pieces) == 3
    head = [step.op for step in pieces[Piece.HEAD].steps]
    assert head[0] == records.LOAD
    assert records.LINEAR in head
    assert len(pieces[Piece.HEAD].shapes[pieces[Piece.HEAD].input]) == 1
    everything = pieces[Piece.BACKBONE].origins[:-1] + pieces[Piece.HEAD].origins[1:]
    assert everything == list(range(len(pieces[Piece.ALL].steps)))
    for batch, threads_of_part in ((1, 2), (2, 1)):  # in halves, and not
        origins = engine._plan(batch, threads_of_part, Piece.BACKBONE).plan.origins
        assert origins[-1] == origins.max() == pieces[Piece.HEAD].origins[1] - 1


def no_linear():
    b = Builder((3, 12, 12))
    with_pool(b, b.conv("x", 8))
    return b.model()


def linear_in_between():
    """A gate's linear layers are no head."""
    b = Builder((3, 12, 12))
    x = b.conv("x", 8)
    gate = b.node("adaptive_avg_pool2d", x, **MEAN)
    b.conv(b.node("mul", x, b.conv(gate, 8, kernel=(1, 1), padding=(0, 0), seed=1)), 8, seed=2)
    return b.model()


def only_linear():
    b = Builder((3, 4, 4))
    b.linear(b.node("flatten", "x"), 10)
    return b.model()


@pytest.mark.parametrize(
    ("model", "pieces"), [(no_linear, 1), (linear_in_between, 1), (only_linear, 3)]
)
def test_networks_without_a_head_are_not_cut(model, pieces):
    engine = engine_of(model())
    engine._in_cache = 1
    x = randoms(5, *engine.model.input_shape)
    agree(engine.run(x, 2), reference.run(engine.model, x))
    assert len(engine._pieces.steps) == pieces
