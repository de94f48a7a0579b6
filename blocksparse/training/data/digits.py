"""The digits bundled with scikit-learn: real scans that need no download."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from blocksparse.training.data.base import ImageData
from blocksparse.training.data.memory import Augmentation, MemoryImages


class Digits(ImageData):
    """1,797 scanned handwritten digits of 8x8 pixels, one channel, ten classes.

    The test half of the "Optical Recognition of Handwritten Digits" set (E. Alpaydin and C. Kaynak,
    1998), as `sklearn.datasets.load_digits` gives it. Its grey values 0..16 are spread over the
    bytes 0..255.

    Parameters
    ----------
    val_fraction : float
        Share of each class kept for validation.
    split_seed : int
        Seed of the stratified split. Apart from `seed`, so that a sweep over seeds keeps the split.
    shift : int
        Largest random shift of a training image, in pixels along each axis.
    mean, std : sequence of one float
        Normalisation of pixels scaled to 0..1.
    batch_size, val_batch_size, num_workers, seed
        See `ImageData`.
    """

    def __init__(
        self,
        *,
        val_fraction: float = 0.2,
        split_seed: int = 0,
        shift: int = 1,
        mean: Sequence[float] = (0.3053,),
        std: Sequence[float] = (0.3760,),
        batch_size: int = 64,
        val_batch_size: int | None = 360,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(
            classes=[str(digit) for digit in range(10)],
            input_shape=(1, 8, 8),
            mean=mean,
            std=std,
            resize=(8, 8),
            batch_size=batch_size,
            val_batch_size=val_batch_size,
            num_workers=num_workers,
            seed=seed,
        )
        if not 0 < val_fraction < 1:
            raise ValueError(f"data.val_fraction is {val_fraction}; it must lie between 0 and 1")
        self.val_fraction = val_fraction
        self.split_seed = split_seed
        self.augmentation = Augmentation(shift=shift)

    def load(self) -> tuple[MemoryImages, MemoryImages, MemoryImages]:
        """Read and split the scans."""
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split

        scans = load_digits()
        pixels = torch.from_numpy(np.rint(scans.images * (255 / 16)).astype(np.uint8))[:, None]
        labels = torch.from_numpy(scans.target.astype(np.int64))
        train, val = train_test_split(
            np.arange(len(labels)),
            test_size=self.val_fraction,
            random_state=self.split_seed,
            stratify=scans.target,
        )
        return (
            MemoryImages(pixels[train], labels[train], self.mean, self.std, self.augmentation),
            MemoryImages(pixels[train], labels[train], self.mean, self.std),
            MemoryImages(pixels[val], labels[val], self.mean, self.std),
        )
