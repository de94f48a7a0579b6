"""Random images of any size and number: to try a setup out before the data is there."""

# N images in the set, B batch, C channels, H W image height and width.

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from blocksparse.training.data.base import ImageData
from blocksparse.training.data.order import BatchKey, stream_seed


class NoiseImages:
    """A source of batches of noise, made when asked for: an image is a function of (seed, index).

    Parameters
    ----------
    length : int
        N.
    num_classes : int
        Labels go round: image i is of class i modulo this.
    input_shape : (C, H, W)
        Shape of an image.
    seed : int
        Seed of all images.
    """

    def __init__(
        self, length: int, num_classes: int, input_shape: tuple[int, int, int], seed: int
    ) -> None:
        self.length = length
        self.num_classes = num_classes
        self.input_shape = input_shape
        self.seed = seed

    def __len__(self) -> int:
        """Return N."""
        return self.length

    def __getitem__(self, key: BatchKey) -> tuple[Tensor, Tensor]:
        """Make the batch: images [B, C, H, W] float32 of mean 0 and deviation 1, labels [B]."""
        images = torch.empty(len(key.indices), *self.input_shape)
        for image, index in zip(images, key.indices, strict=True):
            image.normal_(generator=torch.Generator().manual_seed(stream_seed(self.seed, index)))
        return images, torch.tensor(key.indices) % self.num_classes


class Fake(ImageData):
    """Noise with labels: nothing to learn, and nothing to store.

    Parameters
    ----------
    num_classes : int
        Number of classes.
    input_shape : (C, H, W)
        Shape of an image.
    train_size, val_size : int
        Images in each set.
    batch_size, val_batch_size, num_workers, seed
        See `ImageData`.
    """

    def __init__(
        self,
        *,
        num_classes: int = 1000,
        input_shape: Sequence[int] = (3, 224, 224),
        train_size: int = 1024,
        val_size: int = 256,
        batch_size: int = 32,
        val_batch_size: int | None = None,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        channels, height, width = input_shape
        super().__init__(
            classes=[f"class {i}" for i in range(num_classes)],
            input_shape=(channels, height, width),
            mean=[0.5] * channels,
            std=[0.25] * channels,
            resize=(height, width),
            batch_size=batch_size,
            val_batch_size=val_batch_size,
            num_workers=num_workers,
            seed=seed,
        )
        self.train_size = train_size
        self.val_size = val_size

    def load(self) -> tuple[NoiseImages, NoiseImages, NoiseImages]:
        """Make nothing yet."""
        train = NoiseImages(self.train_size, self.num_classes, self.input_shape, seed=0)
        val = NoiseImages(self.val_size, self.num_classes, self.input_shape, seed=1)
        return train, train, val
