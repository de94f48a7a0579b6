"""Any images sorted into class folders, ImageNet included."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path

import torch
from torchvision.transforms import v2

from blocksparse.training.data.base import ImageData
from blocksparse.training.data.files import FileImages, class_names, decode_all, list_images
from blocksparse.training.data.loader import Source
from blocksparse.training.data.memory import Augmentation, MemoryImages

logger = logging.getLogger(__name__)


class ImageFolder(ImageData):
    """Images in `root/train/<class>/` and `root/val/<class>/`, of any size and kind Pillow reads.

    Validation images are resized and cropped about the centre. Training images are, with
    `in_memory`, the same and then shifted; without, cut out at random places and sizes (as ImageNet
    is trained on). Either way some are mirrored.

    Parameters
    ----------
    root : path
        Folder with `train` and `val` in it.
    size : int
        Height and width of the network's input.
    resize : int, optional
        Shorter side before the crop; None resizes to `size` x `size` exactly, without a crop.
    in_memory : bool
        Decode all images once and hold them as bytes: fast, for images of CIFAR's size.
    min_area : float
        Without `in_memory`: smallest share of an image that a random cut takes.
    shift : int
        With `in_memory`: largest random shift in pixels along each axis.
    flip : bool
        Mirror training images at random.
    channels : 3 or 1
        Colour or grey.
    mean, std : sequence of float
        Normalisation per channel of pixels scaled to 0..1; ImageNet's by default.
    batch_size, val_batch_size, num_workers, seed
        See `ImageData`.

    Raises
    ------
    FileNotFoundError
        A folder is missing or has no class folders in it.
    ValueError
        `train` and `val` have different classes.
    """

    def __init__(
        self,
        *,
        root: str | Path,
        size: int = 224,
        resize: int | None = 256,
        in_memory: bool = False,
        min_area: float = 0.08,
        shift: int = 4,
        flip: bool = True,
        channels: int = 3,
        mean: Sequence[float] = (0.485, 0.456, 0.406),
        std: Sequence[float] = (0.229, 0.224, 0.225),
        batch_size: int = 128,
        val_batch_size: int | None = None,
        num_workers: int = 0,
        seed: int = 0,
    ) -> None:
        if resize is not None and resize < size:
            raise ValueError(
                f"data.resize is {resize}, below data.size {size}: the crop would not fit"
            )
        if channels not in (1, 3):
            raise ValueError(f"data.channels is {channels}; it may be 3 (colour) or 1 (grey)")
        self.root = Path(root).expanduser()
        super().__init__(
            classes=_classes(self.root),
            input_shape=(channels, size, size),
            mean=mean,
            std=std,
            resize=(size, size) if resize is None else resize,
            crop=None if resize is None else (size, size),
            batch_size=batch_size,
            val_batch_size=val_batch_size,
            num_workers=num_workers,
            seed=seed,
        )
        self.in_memory = in_memory
        self.min_area = min_area
        self.augmentation = Augmentation(shift=shift, flip=flip)

    def load(self) -> tuple[Source, Source, Source]:
        """List the files, and decode them if they are to be held in memory."""
        train_paths, train_labels = list_images(self.root / "train", self.classes)
        val_paths, val_labels = list_images(self.root / "val", self.classes)
        whole = self._whole()
        scale = (self.mean, self.std)
        if not self.in_memory:
            return (
                FileImages(train_paths, train_labels, self._cut(), *scale),
                FileImages(train_paths, train_labels, whole, *scale),
                FileImages(val_paths, val_labels, whole, *scale),
            )
        logger.info("decoding %d images of %s", len(train_paths) + len(val_paths), self.root)
        channels, threads = self.input_shape[0], torch.get_num_threads()
        train = decode_all(train_paths, channels, whole, threads)
        val = decode_all(val_paths, channels, whole, threads)
        return (
            MemoryImages(train, train_labels, *scale, self.augmentation),
            MemoryImages(train, train_labels, *scale),
            MemoryImages(val, val_labels, *scale),
        )

    def _whole(self) -> v2.Transform:
        # antialias is what Pillow always does; it is said for the runtime, which must do the same.
        steps = [v2.Resize(self.resize, antialias=True)]
        return v2.Compose([*steps, v2.CenterCrop(self.crop)] if self.crop else steps)

    def _cut(self) -> v2.Transform:
        steps = [v2.RandomResizedCrop(self.input_shape[1:], (self.min_area, 1.0), antialias=True)]
        return v2.Compose([*steps, v2.RandomHorizontalFlip()] if self.augmentation.flip else steps)


def _classes(root: Path) -> list[str]:
    """Read the class names off both folders, which must agree."""
    found = {}
    for part in ("train", "val"):
        folder = root / part
        if not folder.is_dir():
            raise FileNotFoundError(
                f"{folder}: there is no such folder. Put one folder of images per class into it, "
                f"or set data.root to the folder that holds train/ and val/ (now {root})"
            )
        found[part] = class_names(folder)
        if not found[part]:
            raise FileNotFoundError(
                f"{folder}: there are no class folders in it. Put the images of each class into a "
                "folder of that class's name"
            )
    if found["train"] != found["val"]:
        differing = sorted(set(found["train"]) ^ set(found["val"]))
        raise ValueError(
            f"{root}: train has {len(found['train'])} classes and val {len(found['val'])}, and "
            "they differ in "
            f"{', '.join(differing[:8])}: both need the same class folders"
        )
    return found["train"]
