"""A data loader that can start anywhere in any epoch.

Lightning's fit loop counts epochs and batches and keeps those counts in every checkpoint. This
loader asks for them when its first batch is wanted and starts there, so it needs no state of its
own and cannot disagree with the loop about what was already trained on (a loader that counts what
it handed out can: a batch fetched is not yet a batch trained on).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from blocksparse.training.data.order import BatchKey, EpochOrder


class Source(Protocol):
    """Samples that can be turned into batches."""

    def __len__(self) -> int:
        """Return the number of samples."""

    def __getitem__(self, key: BatchKey) -> tuple[Tensor, Tensor]:
        """Make a batch: normalised images [N, C, H, W] float32 and labels [N] int64."""


class EpochLoader:
    """Iterate over the batches of an epoch; every call of `iter` is one epoch.

    Parameters
    ----------
    source : Source
        Where batches come from.
    order : EpochOrder
        Which batches an epoch has.
    position : callable, optional
        Returns (epoch, batches of it that are done). Asked when the first batch of an iteration is
        wanted. Without it each iteration is epoch 0 from its start.
    num_workers : int
        Processes that make batches; 0 makes them in this one. The batches are the same either way.
    pin_memory : bool
        Copy batches to page-locked memory, which a GPU reads faster.
    shard : callable, optional
        Returns (rank, ranks) in distributed training; each rank then takes every `ranks`-th batch.
    """

    def __init__(
        self,
        source: Source,
        order: EpochOrder,
        *,
        position: Callable[[], tuple[int, int]] | None = None,
        num_workers: int = 0,
        pin_memory: bool = False,
        shard: Callable[[], tuple[int, int]] | None = None,
    ) -> None:
        self.source = source
        self.order = order
        self.num_workers = num_workers
        self.pin_memory = pin_memory
        self._position = position
        self._shard = shard

    def __len__(self) -> int:
        """Batches of a whole epoch (on this rank)."""
        ranks = self._shard()[1] if self._shard else 1
        return max(1, len(self.order) // ranks)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        epoch, done = self._position() if self._position else (0, 0)
        rank, ranks = self._shard() if self._shard else (0, 1)
        keys = self.order.batches(epoch)
        if ranks > 1:
            keys = [keys[(i * ranks + rank) % len(keys)] for i in range(len(self))]
        yield from DataLoader(
            self.source,  # type: ignore[arg-type]  # a map from keys to whole batches
            sampler=keys[done:],
            batch_size=None,
            num_workers=self.num_workers,
            pin_memory=self.pin_memory,
            # Or it would draw the workers' seed from the global generator, once per epoch and once
            # per resume.
            generator=torch.Generator().manual_seed(0),
        )

    def state_dict(self) -> dict[str, Any]:
        """Return nothing, as the position is the fit loop's; Lightning looks for this method."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take nothing, see `state_dict`."""
