"""CIFAR-10 and CIFAR-100, read by torchvision's loaders and held in memory."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torchvision import datasets

from blocksparse.training.data.base import ImageData
from blocksparse.training.data.memory import Augmentation, MemoryImages

# In the order of the labels.
CIFAR10_CLASSES = "airplane automobile bird cat deer dog frog horse ship truck"

# The 100 fine labels.
CIFAR100_CLASSES = """
apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus butterfly
camel can castle caterpillar cattle chair chimpanzee clock cloud cockroach couch crab crocodile cup
dinosaur dolphin elephant flatfish forest fox girl hamster house kangaroo keyboard lamp lawn_mower
leopard lion lizard lobster man maple_tree motorcycle mountain mouse mushroom oak_tree orange orchid
otter palm_tree pear pickup_truck pine_tree plain plate poppy porcupine possum rabbit raccoon ray
road rocket rose sea seal shark shrew skunk skyscraper snail snake spider squirrel streetcar
sunflower sweet_pepper table tank telephone television tiger tractor train trout tulip turtle
wardrobe whale willow_tree wolf woman worm
"""


class Cifar10(ImageData):
    """50,000 training and 10,000 validation images of 32x32 pixels (A. Krizhevsky, 2009).

    Parameters
    ----------
    root : path
        Folder that holds the unpacked Python version (`cifar-10-batches-py`).
    download : bool
        Fetch and unpack it into `root` if it is not there.
    shift : int
        Largest random shift of a training image, in pixels along each axis.
    flip : bool
        Mirror training images at random.
    mean, std : sequence of three floats
        Normalisation of pixels scaled to 0..1.
    batch_size, val_batch_size, num_workers, seed
        See `ImageData`.

    Raises
    ------
    FileNotFoundError
        The data is not there and `download` is off.
    """

    dataset: type[datasets.CIFAR10] = datasets.CIFAR10
    names: str = CIFAR10_CLASSES

    def __init__(
        self,
        *,
        root: str | Path,
        download: bool = False,
        shift: int = 4,
        flip: bool = True,
        mean: Sequence[float] = (0.4914, 0.4822, 0.4465),
        std: Sequence[float] = (0.2470, 0.2435, 0.2616),
        batch_size: int = 128,
        val_batch_size: int | None = 500,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        super().__init__(
            classes=self.names.split(),
            input_shape=(3, 32, 32),
            mean=mean,
            std=std,
            resize=(32, 32),
            batch_size=batch_size,
            val_batch_size=val_batch_size,
            num_workers=num_workers,
            seed=seed,
        )
        self.root = Path(root).expanduser()
        self.download = download
        self.augmentation = Augmentation(shift=shift, flip=flip)
        folder = self.root / self.dataset.base_folder
        if not download and not folder.is_dir():
            raise FileNotFoundError(
                f"{folder}: there is no such folder. Unpack {self.dataset.filename} "
                f"({self.dataset.url}) into {self.root}, set data.root to the folder that holds "
                f"{self.dataset.base_folder}, or set data.download=true"
            )

    def prepare_data(self) -> None:
        """Download the data if asked (Lightning calls this in one process)."""
        if self.download:
            self.dataset(str(self.root), download=True)

    def load(self) -> tuple[MemoryImages, MemoryImages, MemoryImages]:
        """Read all images."""
        pixels, labels = self._read(train=True)
        return (
            MemoryImages(pixels, labels, self.mean, self.std, self.augmentation),
            MemoryImages(pixels, labels, self.mean, self.std),
            MemoryImages(*self._read(train=False), self.mean, self.std),
        )

    def _read(self, train: bool) -> tuple[torch.Tensor, torch.Tensor]:
        try:
            images = self.dataset(str(self.root), train=train, download=self.download)
        except RuntimeError as error:
            raise FileNotFoundError(
                f"{self.root / self.dataset.base_folder}: files are missing or damaged ({error}). "
                f"Unpack {self.dataset.filename} again, or set data.download=true"
            ) from error
        pixels = torch.from_numpy(images.data).permute(0, 3, 1, 2).contiguous()
        return pixels, torch.tensor(images.targets)


class Cifar100(Cifar10):
    """The same with 100 classes, in `cifar-100-python`; parameters as for `Cifar10`."""

    dataset = datasets.CIFAR100
    names = CIFAR100_CLASSES
