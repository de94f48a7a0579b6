"""The order of samples is a function of (seed, epoch, position) and of nothing else."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from blocksparse.training.data.loader import EpochLoader
from blocksparse.training.data.order import BatchKey, EpochOrder, stream_seed


class Keys:
    """A source whose batches are the keys themselves."""

    def __init__(self, length: int):
        self.length = length

    def __len__(self):
        return self.length

    def __getitem__(self, key: BatchKey):
        return torch.tensor(key.indices), torch.tensor(key.seed)


def read(loader: EpochLoader) -> list[tuple[list[int], int]]:
    return [(indices.tolist(), int(seed)) for indices, seed in loader]


def test_stream_seed_is_the_same_everywhere():
    # Written down once: these must not change with NumPy's version or the machine.
    assert stream_seed(0) == 7896617691693857887
    assert stream_seed(1, 2, 3) == 6498626229777268288


def test_stream_seeds_of_neighbours_differ():
    seeds = {stream_seed(a, b, c) for a in range(5) for b in range(5) for c in range(5)}
    assert len(seeds) == 125
    assert all(0 <= seed < 2**63 for seed in seeds)


@given(
    length=st.integers(1, 40),
    batch_size=st.integers(1, 50),
    shuffle=st.booleans(),
    drop_last=st.booleans(),
    epoch=st.integers(0, 3),
    start=st.integers(0, 5),
)
def test_batches(length, batch_size, shuffle, drop_last, epoch, start):
    order = EpochOrder(length, batch_size, 7, shuffle, drop_last)
    batches = order.batches(epoch)
    samples = [i for batch in batches for i in batch.indices]
    assert len(batches) == len(order)
    assert len(set(samples)) == len(samples)
    assert all(len(batch.indices) == batch_size for batch in batches[:-1])
    if drop_last and length >= batch_size:
        assert len(samples) == length - length % batch_size
    else:
        assert sorted(samples) == list(range(length))
    if not shuffle:
        assert samples == list(range(len(samples)))
    assert order.batches(epoch, start) == batches[start:]


def test_epochs_and_seeds_shuffle_differently():
    orders = {
        tuple(b.indices for b in EpochOrder(50, 7, seed, shuffle=True).batches(epoch))
        for seed in range(3)
        for epoch in range(3)
    }
    assert len(orders) == 9


@pytest.mark.parametrize(("length", "batch_size", "text"), [(0, 4, "empty"), (4, 0, "batch_size")])
def test_nothing_to_batch(length, batch_size, text):
    with pytest.raises(ValueError, match=text):
        EpochOrder(length, batch_size)


def test_loader_starts_at_the_position_of_the_first_batch_wanted():
    order = EpochOrder(20, 3, 1, shuffle=True)
    position = (0, 0)
    loader = EpochLoader(Keys(20), order, position=lambda: position)
    iterator = iter(loader)
    position = (2, 4)
    got = [(indices.tolist(), int(seed)) for indices, seed in iterator]
    assert got == [(list(k.indices), k.seed) for k in order.batches(2, 4)]
    assert len(loader) == 7


def test_loader_leaves_the_global_generator_alone():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    read(EpochLoader(Keys(20), EpochOrder(20, 3, 1, shuffle=True)))
    assert torch.equal(torch.get_rng_state(), before)


def test_ranks_share_the_batches():
    order = EpochOrder(22, 3, 1, shuffle=True, drop_last=True)
    shares = [
        read(EpochLoader(Keys(22), order, shard=lambda rank=rank: (rank, 3))) for rank in range(3)
    ]
    assert [len(share) for share in shares] == [2, 2, 2]
    samples = [i for share in shares for indices, _ in share for i in indices]
    assert len(set(samples)) == 18


@pytest.mark.long
def test_workers_make_the_same_batches():
    order = EpochOrder(20, 3, 1, shuffle=True)
    assert read(EpochLoader(Keys(20), order, num_workers=2)) == read(EpochLoader(Keys(20), order))
