"""What decisions about a network rest on: loss and accuracy on images of the training set.

Validation images stay unseen by any decision: what was chosen on them would look better on them
than it is.
"""

from __future__ import annotations

from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from blocksparse.training import ImageData
from blocksparse.training.batchnorm import reestimate
from blocksparse.training.data import EpochLoader

__all__ = ["CalibrationLoss"]

Batch = tuple[Tensor, Tensor]


class CalibrationLoss:
    """Loss and accuracy on a slice of the training images, without augmentation.

    The slice is the beginning of an epoch mixed by the data module's seed: first the batches that
    batch-norm statistics are re-estimated on, augmented (`ImageData.statistics_dataloader()`), then
    those that count, as they are. No image is in both. All are held in memory.

    Parameters
    ----------
    data
        Whose training images.
    images
        How many count; rounded up to whole batches.
    batchnorm_batches
        How many batches for batch norm.
    channels_last
        Run the network with channels innermost in memory.

    Raises
    ------
    ValueError
        If a count is below one, or there are not so many training images.
    """

    def __init__(
        self, data: ImageData, images: int, batchnorm_batches: int, channels_last: bool = False
    ) -> None:
        if images < 1 or batchnorm_batches < 1:
            raise ValueError(
                f"task.images={images}, task.batchnorm_batches={batchnorm_batches}: both are at "
                "least 1"
            )
        loader = data.calibration_dataloader()
        count = batchnorm_batches - (-images // data.batch_size)
        if count > len(loader):
            raise ValueError(
                f"task.images={images} and task.batchnorm_batches={batchnorm_batches} together "
                f"take {count} batches of {data.batch_size}, and the training images make "
                f"{len(loader)}: lower one of them"
            )
        format_ = torch.channels_last if channels_last else torch.contiguous_format

        def some(source: EpochLoader, first: int, last: int) -> list[Batch]:
            taken = islice(source, first, last)
            return [(x.contiguous(memory_format=format_), labels) for x, labels in taken]

        self.format = format_
        self.for_batchnorm = some(data.statistics_dataloader(), 0, batchnorm_batches)
        self.counted = some(loader, batchnorm_batches, count)
        self.images = sum(len(labels) for _, labels in self.counted)

    @property
    def batches(self) -> list[Batch]:
        """All batches, as a fingerprint needs them."""
        return [*self.for_batchnorm, *self.counted]

    @torch.no_grad()
    def __call__(self, network: nn.Module) -> tuple[float, float]:
        """Re-estimate the batch-norm statistics of ``network``, and evaluate it.

        It runs on a GPU if there is one, and is left on the CPU in evaluation mode.

        Returns
        -------
        float, float
            Mean cross entropy in nats, and the share of images classified correctly, 0..1.
        """
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        arguments: dict[str, Any] = {"memory_format": self.format}
        network.to(device, **arguments).eval()
        reestimate(network, self.for_batchnorm, len(self.for_batchnorm), device)
        loss, hits = 0.0, 0
        for images, labels in self.counted:
            logits = network(images.to(device)).float().cpu()
            loss += float(nn.functional.cross_entropy(logits, labels, reduction="sum"))
            hits += int((logits.argmax(1) == labels).sum())
        network.cpu()
        return loss / self.images, hits / self.images
