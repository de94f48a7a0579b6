"""The layout of each weight: by pattern, by its zeros, and by bytes."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from blocksparse.export.layouts import SLACK, choose
from blocksparse.format import BsrWeight
from blocksparse.sparsity.patterns import NM, Block, Unstructured, VectorNM


def random_weight(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def with_blocks(shape, block, density, shared=False, seed=0):
    """Keep random blocks, zeroing the others entry by entry."""
    weight = random_weight(shape, seed)
    draws = np.random.default_rng(seed + 1)
    for k in range(0, shape[0], block[0]):
        for c in range(0, shape[1], block[1]):
            area = weight[k : k + block[0], c : c + block[1]]
            kept = draws.random(() if shared else area.shape[2:]) < density
            area *= kept
    return weight


def with_groups(shape, n, m, seed=0):
    """Keep n random ones of every m input channels, fewer where fewer are left."""
    weight = random_weight(shape, seed)
    draws = np.random.default_rng(seed + 1)
    for start in range(0, shape[1], m):
        group = weight[:, start : start + m]
        group[draws.random(group.shape).argsort(1).argsort(1) >= n] = 0
    return weight


FOUND = {
    "8x8, shared": (with_blocks((64, 32, 3, 3), (8, 8), 0.5, shared=True), "bsr 8x8"),
    "8x8, per position": (with_blocks((64, 32, 3, 3), (8, 8), 0.25), "bsr 8x8"),
    # Halves of 8x8 blocks: 44 channels need no padding then.
    "8x8, ragged": (with_blocks((60, 44, 3, 3), (8, 8), 0.3), "bsr 8x4"),
    "16x4": (with_blocks((64, 64, 1, 1), (16, 4), 0.4), "bsr 16x4"),
    "32x32": (with_blocks((128, 256), (32, 32), 0.4), "bsr 32x32"),
    "whole rows": (with_blocks((64, 64), (1, 64), 0.4), "bsr 1x32"),
    "2:4": (with_groups((32, 64, 3, 3), 2, 4), "nm 2:4"),
    "2:4, ragged": (with_groups((32, 30, 3, 3), 2, 4), "nm 2:4"),
    "1:4": (with_groups((40, 64), 1, 4), "nm 1:4"),
    "1:2": (with_groups((40, 64), 1, 2), "nm 1:2"),
    "4:8": (with_groups((40, 64, 3, 3), 4, 8), "nm 4:8"),
    "3:16": (with_groups((40, 64), 3, 16), "nm 3:16"),
    "unstructured": (with_blocks((64, 64, 3, 3), (1, 1), 0.05), "bsr 1x1"),
    "all zero": (np.zeros((16, 16, 3, 3), np.float32), "bsr 16x1"),
    "no zeros": (random_weight((64, 32, 3, 3)), "dense"),
    "few zeros": (with_blocks((64, 32, 3, 3), (8, 8), 0.95), "dense"),
    "scattered zeros": (with_blocks((64, 64, 3, 3), (1, 1), 0.6), "dense"),
}


@pytest.mark.parametrize(("weight", "label"), FOUND.values(), ids=FOUND)
def test_layouts_are_found_from_the_zeros(weight, label):
    choice, reason = choose(weight)
    assert choice.label == label
    assert reason.startswith(label)
    np.testing.assert_array_equal(choice.build(weight).to_dense(), weight)


BLOCKS = with_blocks((64, 32, 3, 3), (8, 8), 0.4)
GROUPS = with_groups((64, 32, 3, 3), 2, 4)
VECTORS = np.repeat(with_groups((8, 32, 3, 3), 2, 4), 8, axis=0)
BY_PATTERN = {
    "its block": (BLOCKS, Block(8, 8), "bsr 8x8"),
    "a smaller block": (BLOCKS, Block(4, 4, shared=False), "bsr 4x4"),
    "a block that does not fit": (BLOCKS, Block(64, 64), "dense"),
    "unstructured": (with_blocks((64, 32), (1, 1), 0.1), Unstructured(), "bsr 1x1"),
    "n:m": (GROUPS, NM(2, 4), "nm 2:4"),
    "n:m with fewer than n": (with_groups((64, 32), 1, 4), NM(2, 4), "nm 2:4"),
    "n:m of large groups": (with_groups((4, 256), 32, 256), NM(32, 256), "nm 32:256"),
    "n:m too large for the file": (with_groups((8, 512), 64, 512), NM(64, 512), "bsr 1x1"),
    "n:m broken": (BLOCKS, NM(2, 4), "bsr 8x8"),
    "vectors": (VECTORS, VectorNM(8, 2, 4), "bsr 8x1"),
    "block not pruned": (random_weight((64, 32)), Block(8, 8), "dense"),
}


@pytest.mark.parametrize(("weight", "pattern", "label"), BY_PATTERN.values(), ids=BY_PATTERN)
def test_patterns_decide(weight, pattern, label):
    choice, reason = choose(weight, pattern=pattern)
    assert choice.label == label
    assert reason.startswith(label)
    np.testing.assert_array_equal(choice.build(weight).to_dense(), weight)


def test_a_given_block_comes_before_the_pattern():
    assert choose(BLOCKS, pattern=Block(8, 8), block=(8, 4))[0].label == "bsr 8x4"
    assert choose(GROUPS, pattern=NM(2, 4), block=(8, 1))[0].label == "dense"


def test_grouped_convolutions_are_dense():
    choice, reason = choose(np.zeros((64, 2, 3, 3), np.float32), groups=32)
    assert (choice.label, reason) == ("dense", "dense: convolution in 32 groups")


def test_reasons_give_figures():
    quarter = np.zeros((64, 64, 1, 1), np.float32)
    quarter[:16] = 1
    block = choose(quarter, pattern=Block(8, 8))
    assert block[1] == "bsr 8x8: 25.0% of blocks, 0.26 of dense bytes"
    assert choose(GROUPS)[1] == "nm 2:4: 2 of every 4 channels, 0.53 of dense bytes"
    assert choose(np.ones((8, 8)))[1] == "dense: no zeros"
    scattered = choose(with_blocks((64, 64), (1, 1), 0.6), pattern=Unstructured())[1]
    assert scattered.startswith("dense: 39.5% of it is zero")
    assert "but bsr 1x1 takes 1.2" in scattered


shapes = st.tuples(st.integers(1, 20), st.integers(1, 20), st.integers(1, 3), st.integers(1, 3))
patterns = st.sampled_from(
    [None, Block(8, 8), Block(3, 5, shared=False), Unstructured(), NM(2, 4), VectorNM(4, 1, 4)]
)


@given(shapes, patterns, st.floats(0, 1), st.sampled_from([(1, 1), (4, 2), (8, 8)]), st.integers(0))
def test_every_choice_is_exact_and_its_bytes_are_right(shape, pattern, density, block, seed):
    weight = with_blocks(shape, block, density, seed=seed % 1000)
    choice, reason = choose(weight, pattern=pattern)
    stored = choice.build(weight)
    assert reason.startswith(choice.label)
    assert choice.bytes == stored.nbytes_values + stored.nbytes_indices
    assert choice.bytes <= SLACK * 4 * weight.size
    np.testing.assert_array_equal(stored.to_dense(), weight)


@given(shapes, st.sampled_from([(1, 1), (4, 2), (8, 8)]), st.floats(0, 1), st.integers(0, 1000))
def test_no_block_layout_is_smaller(shape, block, density, seed):
    weight = with_blocks(shape, block, density, seed=seed)
    stored = BsrWeight.from_dense(weight, block)
    assert choose(weight)[0].bytes <= SLACK * (stored.nbytes_values + stored.nbytes_indices)
