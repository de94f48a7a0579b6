"""In which order, and with which random numbers, a data set is walked through.

Nothing here draws from a global generator: the batches of an epoch, and the seed of each batch's
augmentation, are functions of (seed, epoch, position). So a run that stops anywhere and resumes
sees exactly what it would have seen.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch


def stream_seed(*parts: int) -> int:
    """Mix integers into one seed; different parts give unrelated random streams.

    Parameters
    ----------
    *parts : int
        Non-negative numbers that name the stream, such as (seed, epoch, position).

    Returns
    -------
    int
        A number in 0 .. 2**63 - 1, the same on every machine (NumPy's `SeedSequence` is specified).
    """
    return int(np.random.SeedSequence(parts).generate_state(1, np.uint64)[0] >> np.uint64(1))


class BatchKey(NamedTuple):
    """What a source needs to make one batch: which samples, and the seed of their augmentation."""

    indices: tuple[int, ...]
    seed: int


@dataclass(frozen=True)
class EpochOrder:
    """The batches of every epoch over a set of samples.

    Attributes
    ----------
    length : int
        Number of samples.
    batch_size : int
        Samples per batch.
    seed : int
        Seed of the order and of the augmentation.
    shuffle : bool
        A new permutation each epoch; otherwise the samples in their own order.
    drop_last : bool
        Leave out an incomplete last batch, unless it is the only one. (In training its batch-norm
        statistics would be noisier than the others', and a single sample has none at all.)
    """

    length: int
    batch_size: int
    seed: int = 0
    shuffle: bool = False
    drop_last: bool = False

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ValueError(f"batch_size is {self.batch_size}; it must be at least 1")
        if self.length < 1:
            raise ValueError("the data set is empty: it has no samples to make a batch of")

    def __len__(self) -> int:
        """Batches per epoch."""
        whole, rest = divmod(self.length, self.batch_size)
        return max(1, whole if self.drop_last else whole + (rest > 0))

    def batches(self, epoch: int, start: int = 0) -> list[BatchKey]:
        """List the batches of an epoch from position `start` on."""
        if self.shuffle:
            generator = torch.Generator().manual_seed(stream_seed(self.seed, epoch))
            samples = torch.randperm(self.length, generator=generator).tolist()
        else:
            samples = list(range(self.length))
        return [
            BatchKey(
                tuple(samples[i * self.batch_size : (i + 1) * self.batch_size]),
                stream_seed(self.seed, epoch, i),
            )
            for i in range(start, len(self))
        ]
