"""Weights against their slow twins, SciPy and PyTorch."""

from __future__ import annotations

import naive
import numpy as np
import pytest
import scipy.sparse
import torch
from hypothesis import given
from hypothesis import strategies as st

from blocksparse.format import BsrWeight, DenseWeight, NMWeight, weights
from blocksparse.format.weights import index_bits, pack_bits, unpack_bits

axis = st.integers(1, 11)
shapes = st.one_of(
    st.tuples(axis, axis), st.tuples(axis, axis, st.integers(1, 3), st.integers(1, 3))
)
seeds = st.integers(0, 2**32 - 1)
densities = st.sampled_from([0.0, 0.05, 0.3, 0.7, 1.0])


def values(shape, seed, density):
    rng = np.random.default_rng(seed)
    array = rng.standard_normal(shape).astype(np.float32)
    return array * (rng.random(shape) < density)


@st.composite
def bsr_cases(draw):
    array = values(draw(shapes), draw(seeds), draw(densities))
    return array, (draw(st.integers(1, 13)), draw(st.integers(1, 13)))


@st.composite
def nm_cases(draw):
    array = values(draw(shapes), draw(seeds), draw(densities))
    m = draw(st.integers(1, 20) | st.sampled_from([16, 17, 256]))
    n = draw(st.integers(1, min(m, 5)))
    channels = array.shape[1]
    scores = np.random.default_rng(draw(seeds)).random(array.shape)
    for first in range(0, channels, m):
        group = slice(first, min(first + m, channels))
        rank = np.argsort(np.argsort(scores[:, group], axis=1), axis=1)
        array[:, group][rank >= n] = 0
    return array, n, m


@given(bsr_cases())
def test_bsr_round_trip_and_twin(case):
    array, block = case
    weight = BsrWeight.from_dense(array, block)
    back = weight.to_dense()
    assert back.dtype == np.float32
    assert back.flags.c_contiguous
    np.testing.assert_array_equal(back, array)
    twin = naive.bsr_to_dense(array.shape, block, weight.data, weight.indices, weight.indptr)
    np.testing.assert_array_equal(twin, array)
    assert (weight.data != 0).any(axis=(1, 2)).all()


@given(bsr_cases(), st.integers(1, 200))
def test_bsr_cut_in_parts_is_that_cut_at_once(case, together):
    array, block = case
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(weights, "_TOGETHER", together)
        in_parts = BsrWeight.from_dense(array, block)
    assert in_parts == BsrWeight.from_dense(array, block)


@given(bsr_cases())
def test_scipy_and_torch_take_the_bsr_tensors_as_they_are(case):
    array, block = case
    weight = BsrWeight.from_dense(array, block)
    k, channels = array.shape[:2]
    padded = np.zeros((-(-k // block[0]) * block[0], array[0, 0].size, channels), np.float32)
    padded[:k] = array.reshape(k, channels, -1).transpose(0, 2, 1)
    padded = np.pad(padded, ((0, 0), (0, 0), (0, -channels % block[1])))
    matrix = padded.reshape(len(padded), -1)
    assert weight.matrix_shape == matrix.shape
    parts = (weight.data, weight.indices, weight.indptr)
    ours = scipy.sparse.bsr_array(parts, shape=matrix.shape)
    np.testing.assert_array_equal(ours.toarray(), matrix)
    assert ours.has_canonical_format
    crow, col, data = map(torch.from_numpy, (weight.indptr, weight.indices, weight.data))
    theirs = torch.sparse_bsr_tensor(crow, col, data, size=matrix.shape, check_invariants=True)
    np.testing.assert_array_equal(theirs.to_dense().numpy(), matrix)


@given(nm_cases())
def test_nm_round_trip_and_twin(case):
    array, n, m = case
    weight = NMWeight.from_dense(array, n, m)
    back = weight.to_dense()
    assert back.dtype == np.float32
    assert back.flags.c_contiguous
    np.testing.assert_array_equal(back, array)
    twin = naive.nm_to_dense(array.shape, n, m, weight.values, weight.indices)
    np.testing.assert_array_equal(twin, array)


@given(st.sampled_from([1, 2, 4, 8]), axis, st.integers(0, 20), seeds)
def test_bits_pack_and_unpack(bits, rows, length, seed):
    entries = np.random.default_rng(seed).integers(0, 2**bits, (rows, length)).astype(np.uint8)
    packed = pack_bits(entries, bits)
    assert packed.shape == (rows, -(-length * bits // 8))
    np.testing.assert_array_equal(unpack_bits(packed, bits, length), entries)


def test_bits_are_little_endian():
    assert pack_bits(np.array([[1, 2, 3, 0, 2]], np.uint8), 2).tolist() == [[0b00_11_10_01, 2]]
    assert [index_bits(m) for m in (1, 2, 3, 4, 5, 16, 17, 256)] == [1, 1, 2, 2, 4, 4, 8, 8]


def test_bsr_by_hand():
    array = np.zeros((3, 5, 1, 2), np.float32)
    array[0, 4, 0, 0] = 1  # block row 0, position 0, channel block 1 of 2
    array[2, 0, 0, 1] = 2  # block row 1, position 1, channel block 0
    weight = BsrWeight.from_dense(array, (2, 3))
    assert weight.indptr.tolist() == [0, 1, 2]
    assert weight.indices.tolist() == [1, 2]
    assert weight.data.tolist() == [[[0, 1, 0], [0, 0, 0]], [[2, 0, 0], [0, 0, 0]]]
    assert weight.indices.dtype == weight.indptr.dtype == np.int32
    assert (weight.nnz, weight.density) == (12, 2 / 30)
    assert (weight.nbytes_values, weight.nbytes_indices) == (48, 20)


def test_nm_by_hand():
    array = np.array([[0, 5, 0, 6, 0, 7, 0, 0, 0, 0]], np.float32)
    weight = NMWeight.from_dense(array, 2, 4)
    assert weight.values.tolist() == [[[[5, 6], [7, 0], [0, 0]]]]
    assert weight.unpack_indices().tolist() == [[[[1, 3], [1, 1], [0, 0]]]]
    assert weight.indices.tolist() == [[0b01_01_11_01, 0]]
    assert (weight.nnz, weight.density) == (6, 0.3)
    assert (weight.nbytes_values, weight.nbytes_indices) == (24, 2)


@pytest.mark.parametrize(("n", "m"), [(7, 256), (5, 17), (3, 64)])
def test_nm_in_wide_groups(n, m):
    array = np.zeros((5, 600, 1, 1), np.float32)
    rng = np.random.default_rng(m)
    for k in range(5):
        for first in range(0, 600 - m, m):
            array[k, first + rng.permutation(m)[: rng.integers(0, n + 1)]] = 1 + rng.random()
    weight = NMWeight.from_dense(array, n, m)
    np.testing.assert_array_equal(weight.to_dense(), array)
    assert (np.diff(weight.unpack_indices().astype(int), axis=-1) >= 0).all()


@pytest.mark.parametrize(("n", "m"), [(0, 4), (5, 4), (2, 257)])
def test_nm_outside_of_the_format_is_refused(n, m):
    with pytest.raises(ValueError, match=rf"{n}:{m}: n:m needs 1 <= n <= m <= 256"):
        NMWeight.from_dense(np.zeros((8, 600), np.float32), n, m)


def test_two_four_is_half_plus_index_bits():
    array = np.zeros((64, 64, 3, 3), np.float32)
    weight = NMWeight.from_dense(array, 2, 4)
    assert weight.nbytes_values == array.nbytes // 2
    assert weight.nbytes_indices == 64 * 64 * 9 // 2 * 2 // 8


def test_nm_says_where_the_pattern_is_broken():
    array = np.zeros((4, 10, 3, 3), np.float32)
    array[2, [4, 5, 7], 1, 2] = 1
    with pytest.raises(
        ValueError, match=r"not 2:4.*channel 2, kernel position 5, channels 4 to 7 hold 3"
    ):
        NMWeight.from_dense(array, 2, 4)


def test_equality_sees_every_part():
    array = values((6, 8), 0, 0.4)
    weight = BsrWeight.from_dense(array, (2, 2))
    assert weight == BsrWeight.from_dense(array, (2, 2))
    assert weight != BsrWeight.from_dense(array, (2, 4))
    assert weight != BsrWeight.from_dense(array * 2, (2, 2))
    assert weight != DenseWeight(array)
    assert DenseWeight(array) == DenseWeight.from_dense(array.astype(np.float64))
    assert DenseWeight(array) != DenseWeight(array[:5])
    pair = np.array([[1, 0, 0, 0]], np.float32)
    assert NMWeight.from_dense(pair, 1, 4) != NMWeight.from_dense(pair[:, [1, 0, 2, 3]], 1, 4)


def test_a_weight_is_never_three_dimensional():
    with pytest.raises(ValueError, match=r"\(K, C, R, S\) or \(O, F\), not \(2, 3, 4\)"):
        BsrWeight.from_dense(np.zeros((2, 3, 4)), (1, 1))


def test_to_dense_is_a_copy_of_non_contiguous_input():
    array = values((8, 6, 3, 3), 1, 1.0)
    turned = array.transpose(1, 0, 3, 2)[:, ::2]
    for weight in (DenseWeight.from_dense(turned), BsrWeight.from_dense(turned, (4, 3))):
        dense = weight.to_dense()
        np.testing.assert_array_equal(dense, turned)
        dense[...] = 0
        np.testing.assert_array_equal(weight.to_dense(), turned)
