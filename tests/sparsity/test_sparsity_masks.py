"""Masks against their definitions: hand-made, random, ragged, tied, and hostile weights."""

from __future__ import annotations

import math
import time

import numpy as np
import pytest
import sparsity_naive as naive
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.sparse import csr_array
from scipy.sparse.csgraph import maximum_bipartite_matching

from blocksparse.sparsity import (
    NM,
    Block,
    Floors,
    Global,
    Layers,
    Unstructured,
    VectorNM,
    l1,
    l2,
    layer_mask,
    pack_mask,
    patterns,
    plan_masks,
    resolve,
    unpack_mask,
)
from blocksparse.sparsity.selection import channel_cover, keep_units, most_zeros, protect

KERNELS = [(), (1, 1), (3, 3), (1, 3), (2,)]
SCORES = {1: l1, 2: l2}


@st.composite
def weights(draw, most=14):
    """Weights with K != C more often than not, and few values, so that ties abound."""
    shape = (
        draw(st.integers(1, most)),
        draw(st.integers(1, most)),
        *draw(st.sampled_from(KERNELS)),
    )
    seed = draw(st.integers(0, 2**16))
    rng = np.random.default_rng(seed)
    if draw(st.booleans()):
        return rng.integers(-2, 3, shape).astype(np.float32)
    return rng.standard_normal(shape).astype(np.float32)


blocks = st.builds(Block, st.integers(1, 9), st.integers(1, 9), st.booleans())
nms = st.one_of(
    st.sampled_from([NM(2, 4), NM(1, 2), NM(1, 4), NM(3, 5)]),
    st.builds(VectorNM, st.integers(1, 5), st.integers(1, 2), st.integers(3, 5)),
)
sparsities = st.sampled_from([0.0, 0.1, 0.25, 0.5, 0.57, 0.75, 0.9, 1.0])


def wanted(share, total):
    return math.ceil(round(share * total, 6))


@given(weights(), blocks, sparsities, st.sampled_from([1, 2]), st.sampled_from([1, 30, 2**18]))
@settings(max_examples=60, deadline=None)
def test_block_masks_follow_the_definition(weight, pattern, sparsity, power, together):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(patterns, "_TOGETHER", together)
        mask = layer_mask(torch.from_numpy(weight), pattern, sparsity, SCORES[power])
    zeros = wanted(sparsity, weight.size)
    twin = naive.block_mask(weight, pattern.rows, pattern.cols, pattern.shared, zeros, power)
    assert mask.shape == weight.shape
    assert mask.dtype == torch.bool
    np.testing.assert_array_equal(mask.numpy(), twin)


@given(weights(), blocks, st.sampled_from([0.0, 0.05, 0.3]), st.booleans())
@settings(max_examples=60, deadline=None)
def test_floors_hold_at_the_most_that_they_allow(weight, pattern, min_density, keep_channels):
    weight = np.where(weight == 0, np.float32(0.5), weight)  # the twin knows no zero blocks
    floors = Floors(min_density, keep_channels)
    zeros = most_zeros(pattern, weight.shape, floors)
    mask = layer_mask(torch.from_numpy(weight), pattern, zeros / weight.size, l2, floors).numpy()
    twin = naive.block_mask(
        weight, pattern.rows, pattern.cols, pattern.shared, zeros, 2, keep_channels, min_density
    )
    np.testing.assert_array_equal(mask, twin)
    assert mask.size - mask.sum() >= zeros
    assert mask.mean() >= min_density - 1e-9
    if keep_channels:
        flat = mask.reshape(*mask.shape[:2], -1)
        for top in range(0, flat.shape[0], pattern.rows):
            assert flat[top : top + pattern.rows].any()
        for left in range(0, flat.shape[1], pattern.cols):
            assert flat[:, left : left + pattern.cols].any()


@given(weights(), nms, sparsities, st.sampled_from([1, 2]))
@settings(max_examples=60, deadline=None)
def test_nm_masks_follow_the_definition(weight, pattern, share, power):
    mask = layer_mask(torch.from_numpy(weight), pattern, share * pattern.limit, SCORES[power])
    gains = int(pattern.sizes(weight.shape).sum())
    twin = naive.nm_mask(weight, pattern.vector, pattern.n, pattern.m, wanted(share, gains), power)
    assert mask.shape == weight.shape
    np.testing.assert_array_equal(mask.numpy(), twin)


@given(weights(), nms)
@settings(max_examples=40, deadline=None)
def test_every_group_obeys_along_the_input_channels(weight, pattern):
    mask = layer_mask(torch.from_numpy(weight), pattern, pattern.limit).numpy()
    flat = mask.reshape(*mask.shape[:2], -1)
    for k in range(flat.shape[0]):
        for t in range(flat.shape[2]):
            for left in range(0, flat.shape[1], pattern.m):
                group = flat[k, left : left + pattern.m, t]
                assert group.sum() == min(pattern.n, len(group))
                first = k // pattern.vector * pattern.vector
                np.testing.assert_array_equal(group, flat[first, left : left + pattern.m, t])


@given(weights(), st.one_of(blocks, nms, st.just(Unstructured())), sparsities, sparsities)
@settings(max_examples=60, deadline=None)
def test_a_sparser_mask_is_a_subset(weight, pattern, one, other):
    low, high = sorted((one, other))
    low_mask = layer_mask(torch.from_numpy(weight), pattern, low * pattern.limit)
    high_mask = layer_mask(torch.from_numpy(weight), pattern, high * pattern.limit)
    assert not (high_mask & ~low_mask).any()


@given(weights(), st.one_of(blocks, nms, st.just(Unstructured())), sparsities)
@settings(max_examples=60, deadline=None)
def test_masking_a_masked_weight_changes_nothing(weight, pattern, share):
    weight = torch.from_numpy(weight)
    weight = torch.where(weight == 0, 0.5, weight)  # a real weight of 0 ties with a pruned one
    mask = layer_mask(weight, pattern, share * pattern.limit)
    again = layer_mask(weight * mask, pattern, share * pattern.limit)
    assert torch.equal(weight * mask * again, weight * mask)


@given(weights(), sparsities)
@settings(max_examples=30, deadline=None)
def test_unstructured_counts_are_exact(weight, sparsity):
    mask = layer_mask(torch.from_numpy(weight), Unstructured(), sparsity)
    assert int((~mask).sum()) == wanted(sparsity, weight.size)


def test_ties_keep_the_lower_index():
    ones = torch.ones(4, 4)
    assert layer_mask(ones, Block(2, 2), 0.5).tolist() == [[True] * 4] * 2 + [[False] * 4] * 2
    assert layer_mask(torch.ones(1, 8), NM(2, 4), 0.25).tolist() == [
        [True] * 4 + [True, True, False, False]
    ]
    assert layer_mask(torch.ones(1, 4), Unstructured(), 0.5).tolist() == [
        [True, True, False, False]
    ]


def test_a_ragged_block_is_ranked_by_its_mean():
    # Columns 0..3 hold a full block of small weights, column 4 a ragged one of larger weights: by
    # its sum the ragged block would go, by its mean it stays.
    weight = torch.tensor([[1.0, 1.0, 1.0, 1.0, 3.0]])
    assert layer_mask(weight, Block(1, 4), 0.2, l1).tolist() == [[False] * 4 + [True]]


def test_shared_blocks_are_alike_at_all_positions_and_others_are_not():
    weight = torch.randn(16, 24, 3, 3, generator=torch.Generator().manual_seed(0))
    shared = layer_mask(weight, Block(8, 8), 0.5)
    assert (shared == shared[:, :, :1, :1]).all()
    single = layer_mask(weight, Block(8, 8, shared=False), 0.5)
    assert not (single == single[:, :, :1, :1]).all()
    tiles = single.reshape(2, 8, 3, 8, 3, 3)
    assert (tiles == tiles[:, :1, :, :1]).all()


@pytest.mark.parametrize("score", [l1, l2])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_scoring_leaves_the_weight_alone(score, dtype):
    weight = torch.tensor([[3.0, -4.0], [-0.5, 2.0]], dtype=dtype)
    before = weight.clone()
    expected = [[float(w) ** 2 if score is l2 else abs(float(w)) for w in row] for row in weight]
    assert score.terms(weight).tolist() == expected
    assert torch.equal(weight, before)


def test_the_order_of_summation_does_not_show():
    """Blocks that are permutations of each other tie, and the lower index is kept."""
    rng = np.random.default_rng(3)
    block = rng.standard_normal(64 * 9).astype(np.float32)
    tiles = np.stack([rng.permutation(block) for _ in range(16)]).reshape(4, 4, 8, 8, 9)
    weight = torch.from_numpy(tiles.transpose(0, 2, 1, 3, 4).reshape(32, 32, 3, 3).copy())
    for score in (l1, l2):
        mask = layer_mask(weight, Block(8, 8), 0.5, score)
        assert mask[:16].all()
        assert not mask[16:].any()


def test_memory_layout_and_dtype_do_not_show():
    weight = torch.randn(20, 12, 3, 3, generator=torch.Generator().manual_seed(1))
    for pattern in (Block(8, 8), Block(8, 8, shared=False), NM(2, 4), Unstructured()):
        plain = layer_mask(weight, pattern, 0.5)
        last = weight.to(memory_format=torch.channels_last)
        assert torch.equal(layer_mask(last, pattern, 0.5), plain)
        assert torch.equal(layer_mask(weight.double(), pattern, 0.5), plain)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_weights_that_are_not_finite_are_refused(bad):
    weight = torch.ones(8, 8)
    weight[3, 3] = bad
    with pytest.raises(ValueError, match="diverged"):
        layer_mask(weight, Block(4, 4), 0.5)


def test_a_sparsity_that_the_floors_forbid_is_refused():
    with pytest.raises(ValueError, match="floors leave only"):
        layer_mask(torch.rand(16, 16), Block(8, 8), 0.75, l2, Floors(0.0, True))


@given(st.integers(1, 12), st.integers(1, 12), st.integers(1, 3), st.integers(0, 999))
@settings(max_examples=60, deadline=None)
def test_the_cover_is_as_small_as_can_be_and_calls_no_zero_back(rows, cols, positions, seed):
    rng = np.random.default_rng(seed)
    grid = rng.integers(0, 4, (rows, cols, positions)) * (rng.random((rows, cols, 1)) < 0.4)
    taken = channel_cover(grid.astype(np.float32)).reshape(grid.shape)
    assert taken.sum() == max(rows, cols)
    assert taken.any((1, 2)).all()
    assert taken.any((0, 2)).all()
    edges = grid.any(2)
    matching = maximum_bipartite_matching(csr_array(edges), perm_type="column")
    if edges.any(0).all() and edges.any(1).all() and (matching >= 0).sum() == min(rows, cols):
        assert grid[taken].all()


@given(
    st.integers(1, 400),
    st.sampled_from([[1], [64], [64, 24], [4, 0], [1, 2, 3]]),
    st.sampled_from([1, 2, 5, 10**6]),
    st.floats(0.0, 1.0),
    st.integers(0, 999),
)
@settings(max_examples=150, deadline=None)
def test_the_choice_is_that_of_a_full_stable_sort(units, sizes, values, share, seed):
    """With one unit size and with several, and with hardly any or mostly ties."""
    rng = np.random.default_rng(seed)
    importance = rng.integers(0, values, units).astype(np.float32)
    size = rng.choice(sizes, units)
    protected = rng.random(units) < 0.2
    zeros = math.floor(share * size[~protected].sum())
    order = [u for u in np.argsort(-importance, kind="stable") if not protected[u]]
    expected = np.ones(units, dtype=bool)
    while size[~expected].sum() < zeros:
        expected[order.pop()] = False
    arguments = (torch.from_numpy(x) for x in (importance, size, protected))
    np.testing.assert_array_equal(keep_units(*arguments, zeros).numpy(), expected)


@given(weights(), st.one_of(blocks, nms), st.sampled_from([0.0, 0.05, 0.3, 0.8]), sparsities)
@settings(max_examples=80, deadline=None)
def test_a_density_floor_is_left_out_only_where_it_cannot_matter(weight, pattern, density, share):
    shape, floors = weight.shape, Floors(density, keep_channels=True)
    units = pattern.units(torch.from_numpy(weight), l2)
    zeros = int(share * int(units.size.sum()))

    def choice(told: int | None) -> list[bool] | str:
        kept = protect(pattern, shape, units.importance, units.size, floors, told)
        try:
            return keep_units(units.importance, units.size, kept, zeros).tolist()
        except ValueError as error:
            return str(error)

    assert choice(zeros) == choice(None)


@given(st.integers(1, 9), st.integers(1, 9), st.integers(1, 2), st.integers(0, 999))
@settings(max_examples=60, deadline=None)
def test_zeros_complete_a_cover_in_order(rows, cols, positions, seed):
    """Units that cannot be matched otherwise, or among equals, go by index."""
    rng = np.random.default_rng(seed)
    grid = np.zeros((rows, cols, positions), dtype=np.float32)
    lit = rng.permutation(min(rows, cols))[: rng.integers(0, min(rows, cols) + 1)]
    grid[lit, lit] = rng.integers(1, 3, (len(lit), positions))
    taken = channel_cover(grid).reshape(grid.shape)
    pairs = {(r, r) for r in range(min(rows, cols))}
    pairs |= {(r, int(grid[r].any(1).argmax())) for r in range(cols, rows)}
    pairs |= {(int(grid[:, c].any(1).argmax()), c) for c in range(rows, cols)}
    assert {(int(r), int(c)) for r, c in np.argwhere(taken.any(2))} == pairs


@pytest.mark.long
def test_every_weight_of_a_large_layer_for_itself_is_fast():
    weight = torch.randn(2048, 4096, generator=torch.Generator().manual_seed(0))
    mask = layer_mask(weight, Unstructured(), 0.8, floors=Floors())
    began = time.process_time()
    layer_mask(weight * mask, Unstructured(), 0.9, floors=Floors())
    layer_mask(torch.zeros_like(weight).T, Unstructured(), 0.5, floors=Floors())
    assert time.process_time() - began < 8  # a rematching of every row would take minutes


@pytest.mark.parametrize("sparsity", [0.51, 1.5])
def test_more_than_the_pattern_can_give_is_refused(sparsity):
    with pytest.raises(ValueError, match=r"more than the pattern can give, which is 0\.5"):
        layer_mask(torch.ones(8, 8), NM(2, 4), sparsity)
    with pytest.raises(ValueError, match="more than the pattern can give, which is 1"):
        layer_mask(torch.ones(8, 8), Block(2, 2), 1.5)


def test_a_global_ramp_takes_from_the_weakest_layer_and_heeds_floors():
    network = torch.nn.Sequential(torch.nn.Linear(32, 32), torch.nn.Linear(32, 32))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        # Two scales in the first layer: half its blocks are negligible. The second is even, and a
        # thousand times smaller, which must not count.
        network[0].weight.normal_(generator=generator)
        network[0].weight[:16] *= 1e-3
        network[1].weight.fill_(1e-3)
    plan = resolve(
        network,
        target=0.25,
        pattern=Block(8, 8),
        allocation=Global(),
        layers=Layers(classifier_dense=False),
        floors=Floors(0.0, keep_channels=False),
    )
    masks = plan_masks(plan, plan.weights(network), 1.0)
    assert not masks["0.weight"][:16].any()
    assert masks["0.weight"][16:].all()
    assert masks["1.weight"].all()
    floored = resolve(
        network,
        target=0.25,
        pattern=Block(8, 8),
        allocation=Global(),
        layers=Layers(classifier_dense=False),
    )
    masks = plan_masks(floored, floored.weights(network), 1.0)
    assert masks["0.weight"].reshape(4, 8, 32).any((1, 2)).all()
    assert sum(int((~mask).sum()) for mask in masks.values()) == floored.zeros == 512


@given(st.integers(1, 40), st.integers(1, 5), st.integers(0, 99))
@settings(max_examples=30, deadline=None)
def test_masks_survive_packing(rows, cols, seed):
    mask = torch.from_numpy(np.random.default_rng(seed).random((rows, cols, 3)) < 0.5)
    packed = pack_mask(mask)
    assert packed.dtype == torch.uint8
    assert packed.numel() == -(-mask.numel() // 8)
    assert torch.equal(unpack_mask(packed, tuple(mask.shape)), mask)


def test_the_first_entry_is_the_lowest_bit():
    assert pack_mask(torch.tensor([[True, False, False], [True, True, False]])).tolist() == [
        0b11001
    ]
    with pytest.raises(ValueError, match="packs into 1 bytes, not 2"):
        unpack_mask(torch.zeros(2, dtype=torch.uint8), (2, 3))
