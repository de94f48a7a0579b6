"""What all image data modules share: loaders, the resume position, and facts for the network."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
from lightning.pytorch import LightningDataModule

from blocksparse.training.data.loader import EpochLoader, Source
from blocksparse.training.data.order import EpochOrder


class ImageData(LightningDataModule):
    """Images with one label each, split into a training and a validation set.

    Parameters
    ----------
    classes : sequence of str
        Class names, in the order of the labels.
    input_shape : (C, H, W)
        Shape of one image as the network sees it.
    mean, std : sequence of float
        Normalisation per channel, of pixels scaled to 0..1.
    resize : int, (H, W) or None
        How an image of any size is brought to the network's size: an int is the shorter side. None:
        not resized.
    crop : (H, W) or None
        Centred crop after that.
    batch_size : int
        Images per training step (and per rank).
    val_batch_size : int, optional
        Images per validation step; the training batch size if not given.
    num_workers : int
        Processes that make batches; 0 makes them in the training process.
    seed : int
        Seed of the order and the augmentation of the training images.
    """

    def __init__(
        self,
        *,
        classes: Sequence[str],
        input_shape: tuple[int, int, int],
        mean: Sequence[float],
        std: Sequence[float],
        resize: int | tuple[int, int] | None = None,
        crop: tuple[int, int] | None = None,
        batch_size: int = 128,
        val_batch_size: int | None = None,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        channels = input_shape[0]
        if len(mean) != channels or len(std) != channels:
            raise ValueError(
                f"data.mean has {len(mean)} and data.std {len(std)} values, but the images have "
                f"{channels} channel(s): "
                "give one value per channel"
            )
        if min(std) <= 0:
            raise ValueError(f"data.std is {list(std)}: every value must be above zero")
        self.classes = tuple(classes)
        self.input_shape = input_shape
        self.mean = tuple(float(m) for m in mean)
        self.std = tuple(float(s) for s in std)
        self.resize = resize
        self.crop = crop
        self.batch_size = batch_size
        self.val_batch_size = val_batch_size or batch_size
        self.num_workers = num_workers
        self.seed = seed
        self._sources: tuple[Source, Source, Source] | None = None

    @property
    def num_classes(self) -> int:
        """Number of classes."""
        return len(self.classes)

    @property
    def preprocessing(self) -> dict[str, Any]:
        """Return the fields of `blocksparse.format.Preprocessing`: image file to input."""
        return {
            "resize": self.resize,
            "crop": self.crop,
            "mean": self.mean,
            "std": self.std,
            "channels": "rgb" if self.input_shape[0] == 3 else "gray",
        }

    @abstractmethod
    def load(self) -> tuple[Source, Source, Source]:
        """Read the data: training images augmented, not augmented, and validation images."""

    def setup(self, stage: str | None = None) -> None:
        """Read the data, once."""
        if self._sources is None:
            self._sources = self.load()

    def train_dataloader(self) -> EpochLoader:
        """Return training images, shuffled and augmented, from where the fit loop stands."""
        source = self._source(0)
        order = EpochOrder(len(source), self.batch_size, self.seed, shuffle=True, drop_last=True)
        return self._loader(source, order, training=True)

    def calibration_dataloader(self) -> EpochLoader:
        """Return training images as they are, mixed, to look at a network without training it."""
        return self._first_epoch(1)

    def statistics_dataloader(self) -> EpochLoader:
        """Return the same images in the same order, augmented, to take batch-norm statistics on.

        Statistics belong to the images that the weights were trained on: taken from images that are
        not augmented, they cost a trained ResNet-20 on CIFAR-10 3.7 points of accuracy, and these
        0.05 (2,000 images).
        """
        return self._first_epoch(0)

    def val_dataloader(self) -> EpochLoader:
        """Return validation images in their own order, the last batch included."""
        source = self._source(2)
        return self._loader(source, EpochOrder(len(source), self.val_batch_size))

    def test_dataloader(self) -> EpochLoader:
        """Return the validation images: there is no third set."""
        return self.val_dataloader()

    def _first_epoch(self, which: int) -> EpochLoader:
        source = self._source(which)
        order = EpochOrder(len(source), self.batch_size, self.seed, shuffle=True, drop_last=True)
        return self._loader(source, order)

    def _source(self, which: int) -> Source:
        self.setup()
        assert self._sources is not None
        return self._sources[which]

    def _loader(self, source: Source, order: EpochOrder, training: bool = False) -> EpochLoader:
        return EpochLoader(
            source,
            order,
            position=self._position if training else None,
            num_workers=self.num_workers,
            pin_memory=torch.cuda.is_available(),
            shard=self._shard if training else None,
        )

    def _position(self) -> tuple[int, int]:
        trainer = self.trainer
        if trainer is None or not trainer.training:
            return 0, 0
        # As restored from the checkpoint; a batch counts once the loop has taken it up.
        return trainer.current_epoch, trainer.fit_loop.epoch_loop.batch_progress.current.ready

    def _shard(self) -> tuple[int, int]:
        return (self.trainer.global_rank, self.trainer.world_size) if self.trainer else (0, 1)
