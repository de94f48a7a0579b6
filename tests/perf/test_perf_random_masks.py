"""Random masks: as sparse as asked, by whole units, and never a channel lost."""

from __future__ import annotations

from math import ceil, prod

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from blocksparse.format import BsrWeight, NMWeight
from blocksparse.perf.random_masks import Blocks, Groups, parse_pattern

SHAPES = st.one_of(
    st.tuples(st.integers(1, 40), st.integers(1, 40)),
    st.tuples(st.integers(1, 24), st.integers(1, 24), st.integers(1, 3), st.integers(1, 3)),
)
BLOCKS = st.builds(Blocks, st.integers(1, 9), st.integers(1, 9), st.booleans())
GROUPS = st.integers(2, 9).flatmap(
    lambda m: st.builds(Groups, st.integers(1, m - 1), st.just(m), st.sampled_from([1, 3, 8]))
)
SPARSITIES = st.floats(0, 0.99)


def mask_of(pattern, shape, sparsity, seed=0):
    return pattern.mask(shape, sparsity, np.random.default_rng(seed))


def units(pattern, mask):
    """The pieces of a mask that a block pattern drops together, cut out one by one."""
    outs, ins = mask.shape[:2]
    flat = mask.reshape(outs, ins, -1)
    taps = [slice(None)] if pattern.shared else range(flat.shape[2])
    for k in range(0, outs, pattern.rows):
        for c in range(0, ins, pattern.cols):
            for tap in taps:
                yield flat[k : k + pattern.rows, c : c + pattern.cols, tap]


@given(BLOCKS, SHAPES, SPARSITIES)
def test_blocks_go_whole_and_as_many_as_asked(pattern, shape, sparsity):
    mask = mask_of(pattern, shape, sparsity)
    assert mask.shape == shape
    assert mask.dtype == np.bool_
    pieces = list(units(pattern, mask))
    assert all(piece.all() or not piece.any() for piece in pieces)
    zeros = mask.size - np.count_nonzero(mask)
    wanted = ceil(round(sparsity * mask.size, 6))
    cover = max(ceil(shape[0] / pattern.rows), ceil(shape[1] / pattern.cols))
    kept = sum(bool(piece.all()) for piece in pieces)
    assert kept >= cover
    assert zeros < wanted + max(piece.size for piece in pieces)
    if kept > cover:  # the floor does not bind
        assert wanted <= zeros


@given(BLOCKS, SHAPES, SPARSITIES)
def test_no_block_row_and_no_block_column_is_emptied(pattern, shape, sparsity):
    mask = mask_of(pattern, shape, sparsity).reshape(*shape[:2], prod(shape[2:])).any(2)
    assert mask.any(1).all()
    assert mask.any(0).all()


@given(BLOCKS, SHAPES, SPARSITIES)
def test_shared_blocks_are_alike_at_every_position(pattern, shape, sparsity):
    flat = mask_of(pattern, shape, sparsity).reshape(*shape[:2], -1)
    if pattern.shared:
        assert (flat == flat[..., :1]).all()


def test_blocks_per_position_are_not_alike():
    flat = mask_of(Blocks(8, 8, shared=False), (64, 64, 3, 3), 0.5).reshape(64, 64, 9)
    assert (flat != flat[..., :1]).any()


@given(BLOCKS, SHAPES, SPARSITIES, SPARSITIES)
def test_what_goes_at_some_sparsity_goes_at_a_higher_one(pattern, shape, one, other):
    denser = mask_of(pattern, shape, min(one, other))
    sparser = mask_of(pattern, shape, max(one, other))
    assert not (sparser & ~denser).any()


@given(BLOCKS, SHAPES, SPARSITIES)
def test_only_kept_blocks_are_stored(pattern, shape, sparsity):
    mask = mask_of(pattern, shape, sparsity)
    stored = pattern.store(np.where(mask, np.float32(0.5), np.float32(0)))
    assert isinstance(stored, BsrWeight)
    assert stored.block == (pattern.rows, pattern.cols)
    assert (stored.data != 0).any(axis=(1, 2)).all()
    assert np.array_equal(stored.to_dense() != 0, mask)
    assert stored.density == pytest.approx(np.count_nonzero(mask) / mask.size)


@given(BLOCKS, SHAPES)
def test_a_shape_is_refused_exactly_where_nothing_can_go(pattern, shape):
    nothing_goes = mask_of(pattern, shape, 0.999).all()
    assert bool(pattern.refusal(shape)) == bool(nothing_goes)


@given(GROUPS, SHAPES)
def test_groups_keep_n_and_vectors_agree(pattern, shape):
    mask = mask_of(pattern, shape, 0.1)
    assert mask.shape == shape
    for start in range(0, shape[1], pattern.m):
        group = mask[:, start : start + pattern.m]
        assert (group.sum(1) == min(pattern.n, group.shape[1])).all()
    for start in range(0, shape[0], pattern.vector):
        vector = mask[start : start + pattern.vector]
        assert (vector == vector[:1]).all()
    assert bool(pattern.refusal(shape)) == bool(mask.all())
    stored = pattern.store(np.where(mask, np.float32(0.5), np.float32(0)))
    assert isinstance(stored, NMWeight if pattern.vector == 1 else BsrWeight)
    assert np.array_equal(stored.to_dense() != 0, mask)


def test_blocks_go_everywhere():
    kept = mask_of(Blocks(8, 8), (256, 256), 0.5)[::8, ::8]
    for axis in (0, 1):
        assert 4 <= kept.sum(axis).min() <= kept.sum(axis).max() <= 28  # of 32


def test_another_seed_gives_another_mask():
    for pattern in (Blocks(), Groups()):
        one, same, other = (mask_of(pattern, (64, 64), 0.5, seed) for seed in (1, 1, 2))
        assert np.array_equal(one, same)
        assert not np.array_equal(one, other)


@pytest.mark.parametrize(
    ("text", "pattern"),
    [
        ("block8x8", Blocks(8, 8)),
        ("block16x4_per_position", Blocks(16, 4, shared=False)),
        ("unstructured", Blocks(1, 1, shared=False)),
        ("nm2:4", Groups(2, 4)),
        ("nm24", Groups(2, 4)),
        ("nm4:16", Groups(4, 16)),
        ("vector_nm24", Groups(2, 4, 8)),
        ("vector_nm1:4", Groups(1, 4, 8)),
    ],
)
def test_names_of_patterns(text, pattern):
    assert parse_pattern(text) == pattern


@pytest.mark.parametrize(
    "text",
    ["", "block", "block8", "block0x8", "block8x8_shared", "nm42", "nm2", "nm0:4", "nm1:300"],
)
def test_names_that_are_none(text):
    with pytest.raises(ValueError, match="pattern"):
        parse_pattern(text)
