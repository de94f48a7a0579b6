"""Image files in class folders, decoded and augmented one by one, or all at once into memory."""

# N images in the set, B batch, C channels, H W image height and width.

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from blocksparse.image_files import SUFFIXES, read_image
from blocksparse.training.data.order import BatchKey, stream_seed


def class_names(folder: Path) -> list[str]:
    """List the class folders in a folder, sorted: their order is that of the labels."""
    return sorted(entry.name for entry in folder.iterdir() if entry.is_dir())


def list_images(folder: Path, classes: Sequence[str]) -> tuple[list[Path], Tensor]:
    """List the images of all classes and their labels [N] int64.

    Raises
    ------
    FileNotFoundError
        A class has no image.
    """
    paths: list[Path] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        found = sorted(p for p in (folder / name).rglob("*") if p.suffix.lower() in SUFFIXES)
        if not found:
            raise FileNotFoundError(
                f"{folder / name}: there is no image ({', '.join(SUFFIXES)}) of the class {name!r}"
            )
        paths += found
        labels += [label] * len(found)
    return paths, torch.tensor(labels)


def to_pixels(image: Image.Image) -> Tensor:
    """Return the bytes of an image, uint8 [C, H, W]."""
    pixels = torch.from_numpy(np.array(image))
    return pixels[None] if pixels.ndim == 2 else pixels.permute(2, 0, 1)


def decode_all(paths: Sequence[Path], channels: int, prepare: Callable, threads: int) -> Tensor:
    """Decode images that `prepare` brings to one size; uint8 [N, C, H, W]."""
    first = to_pixels(prepare(read_image(paths[0], channels)))
    pixels = torch.empty((len(paths), *first.shape), dtype=torch.uint8)

    def decode(i: int) -> None:
        pixels[i] = to_pixels(prepare(read_image(paths[i], channels)))

    with ThreadPoolExecutor(max(1, threads)) as pool:
        list(pool.map(decode, range(len(paths)), chunksize=64))
    return pixels


class FileImages:
    """A source of batches over image files.

    Parameters
    ----------
    paths : sequence of path
        The N files.
    labels : int64 tensor [N]
        Class of each file.
    transform : callable
        From a PIL image to a PIL image of the network's size. What it draws from PyTorch's global
        generator becomes a function of the batch's seed and the place in the batch.
    mean, std : sequence of float
        Normalisation per channel of pixels scaled to 0..1.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        labels: Tensor,
        transform: Callable[[Image.Image], Image.Image],
        mean: Sequence[float],
        std: Sequence[float],
    ) -> None:
        self.paths = paths
        self.labels = labels
        self.transform = transform
        self._mean = torch.tensor(mean)[:, None, None]
        self._std = torch.tensor(std)[:, None, None]

    def __len__(self) -> int:
        """Return N."""
        return len(self.paths)

    def __getitem__(self, key: BatchKey) -> tuple[Tensor, Tensor]:
        """Make the batch: images [B, C, H, W] float32, labels [B] int64."""
        images = []
        with torch.random.fork_rng(devices=[]):
            for place, index in enumerate(key.indices):
                # Not torch.manual_seed: for every kind of accelerator it notes down the call stack,
                # which took 44 % of the time of a batch of 32x32 images (215 ms, now 120, for 128).
                torch.default_generator.manual_seed(stream_seed(key.seed, place))
                image = self.transform(read_image(self.paths[index], len(self._mean)))
                images.append(to_pixels(image))
        batch = (torch.stack(images) / 255 - self._mean) / self._std
        return batch, self.labels[list(key.indices)]
