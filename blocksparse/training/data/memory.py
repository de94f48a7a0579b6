"""Images that are small enough to hold decoded in memory: whole batches are augmented at once."""

# N images in the set, B batch, C channels, H W image height and width, s largest shift in pixels.

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from blocksparse.training.data.order import BatchKey


@dataclass(frozen=True)
class Augmentation:
    """Random shifts and mirroring of whole batches.

    Attributes
    ----------
    shift : int
        Largest shift in pixels along each axis; what comes in from outside is black.
    flip : bool
        Mirror left and right with probability one half.
    """

    shift: int = 0
    flip: bool = False

    def __call__(self, images: Tensor, generator: torch.Generator) -> Tensor:
        """Augment images [B, C, H, W] of any dtype with numbers drawn from `generator`."""
        count, _, height, width = images.shape
        if self.flip:
            mirrored = torch.rand(count, generator=generator) < 0.5
            images = torch.where(mirrored[:, None, None, None], images.flip(-1), images)
        if self.shift:
            offsets = torch.randint(0, 2 * self.shift + 1, (2, count, 1), generator=generator)
            rows = offsets[0] + torch.arange(height)
            cols = offsets[1] + torch.arange(width)
            padded = F.pad(images, (self.shift,) * 4).permute(0, 2, 3, 1)
            batch = torch.arange(count)[:, None, None]
            images = padded[batch, rows[:, :, None], cols[:, None, :]].permute(0, 3, 1, 2)
        return images


class MemoryImages:
    """A source of batches over images held as bytes.

    Parameters
    ----------
    images : uint8 tensor [N, C, H, W]
        Pixels, 0..255.
    labels : int64 tensor [N]
        Class of each image.
    mean, std : sequence of float
        Normalisation per channel of pixels scaled to 0..1.
    augmentation : Augmentation, optional
        Applied to the bytes, before normalisation.
    """

    def __init__(
        self,
        images: Tensor,
        labels: Tensor,
        mean: Sequence[float],
        std: Sequence[float],
        augmentation: Augmentation | None = None,
    ) -> None:
        self.images = images
        self.labels = labels
        self.augmentation = augmentation
        self._scale = (1 / (255 * torch.tensor(std)))[:, None, None]
        self._shift = (-torch.tensor(mean) / torch.tensor(std))[:, None, None]

    def __len__(self) -> int:
        """Return N."""
        return len(self.images)

    def __getitem__(self, key: BatchKey) -> tuple[Tensor, Tensor]:
        """Make the batch: images [B, C, H, W] float32, labels [B] int64."""
        indices = torch.tensor(key.indices)
        images = self.images[indices]
        if self.augmentation is not None:
            images = self.augmentation(images, torch.Generator().manual_seed(key.seed))
        batch = (images * self._scale).add_(self._shift)
        return batch.contiguous(), self.labels[indices]
