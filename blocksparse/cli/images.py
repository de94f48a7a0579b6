"""Image files and arrays become the network's input, as the model file says.

The steps are those of torchvision's transforms on PIL images, so that a model sees the pixels it
was validated on: resize (bilinear, antialiased), centre crop, scale to 0..1, normalise.
"""

# N images, C channels, H W height and width.

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt

from blocksparse import image_files
from blocksparse.cli.console import CommandError, UsageError
from blocksparse.format.ops import MAX_VALUE

if TYPE_CHECKING:
    from blocksparse.format import Preprocessing

Pixels: TypeAlias = npt.NDArray[np.uint8]
Input: TypeAlias = npt.NDArray[np.float32]

SUFFIXES = (".npy", *image_files.SUFFIXES)
PILLOW_MISSING = (
    "reading and resizing images needs Pillow, which is not installed; "
    "`pip install pillow`, or give float32 .npy arrays"
)


def expand(paths: Sequence[str]) -> list[Path]:
    """Return the files that are meant: files as they are, folders as all images below them, sorted.

    Raises
    ------
    UsageError
        If a path does not exist, or a folder holds nothing that can be read.
    """
    files: list[Path] = []
    for text in paths:
        path = Path(text)
        if not text:
            raise UsageError("an image has an empty name; is a variable of the shell empty?")
        if path.is_dir():
            found = sorted(f for f in path.rglob("*") if f.suffix.lower() in SUFFIXES)
            if not found:
                raise UsageError(f"the folder {text} holds no file {', '.join(SUFFIXES)}")
            files += found
        elif path.is_file():
            files.append(path)
        else:
            raise UsageError(f"there is no image {text}")
    return files


def inputs(
    path: Path, preprocessing: Preprocessing | None, shape: tuple[int, ...]
) -> Iterator[tuple[str, Input]]:
    """Yield the network inputs that one file holds.

    Parameters
    ----------
    path : Path
        An image, or a .npy array: floats (C, H, W) or (N, C, H, W) are taken as the network's input
        as they are; uint8 (H, W) or (H, W, C) is one image of pixels.
    preprocessing : Preprocessing or None
        What the model file says about images.
    shape : tuple of int
        (C, H, W), what the network takes.

    Yields
    ------
    str
        Name of the image: the path, with ``[i]`` behind it for one of several.
    ndarray of float32, shape (C, H, W)
        The input.

    Raises
    ------
    CommandError
        If the file cannot be read or does not fit, with its path.
    """
    if path.suffix.lower() != ".npy":
        yield str(path), _input_of(_open(path, preprocessing), preprocessing, path, shape)
        return
    try:
        array = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise CommandError(f"{path} is not a readable .npy array: {error}") from error
    if not isinstance(array, np.ndarray):  # NumPy looks at the content, not at the name
        array.close()
        raise CommandError(
            f"{path} is no .npy array but an .npz archive of several under that name; save each "
            "with numpy.save"
        )
    if array.size == 0:
        raise CommandError(f"{path}: holds no image, its shape is {array.shape}")
    if array.dtype == np.uint8 and array.ndim in (2, 3):
        image = _image_of(array, preprocessing, path)
        yield str(path), _input_of(image, preprocessing, path, shape)
    elif array.dtype.kind == "f" and array.ndim in (3, 4):
        for index, one in enumerate(array.reshape(-1, *array.shape[-3:])):
            name = f"{path}[{index}]" if array.ndim == 4 else str(path)
            with np.errstate(over="ignore"):
                values = one.astype(np.float32)
            if not np.isfinite(values).all():
                raise CommandError(
                    f"{name}: holds NaN, infinity or numbers beyond float32, so there is nothing "
                    "to predict"
                )
            yield name, _fitting(values, path, shape)
    else:
        raise CommandError(
            f"{path}: shape {array.shape} of {array.dtype} is neither floats (C, H, W) or "
            f"(N, C, H, W), taken as the network's input, nor uint8 pixels (H, W) or (H, W, C)"
        )


def from_pixels(image: Any, preprocessing: Preprocessing | None) -> Input:
    """Resize, crop, scale and normalise an image.

    Parameters
    ----------
    image : PIL.Image.Image
        In the channels the model wants.
    preprocessing : Preprocessing or None
        The steps.

    Returns
    -------
    ndarray of float32, shape (C, H, W)

    Raises
    ------
    CommandError
        If the model file does not say how images become inputs, or the image gets too large.
    """
    steps = _known(preprocessing)
    if steps.resize is not None:
        width, height = _target_size(image.size, steps.resize)
        # The file bounds the shorter side: how long the other gets, a narrow image decides.
        if width * height * len(steps.mean) > MAX_VALUE:
            raise CommandError(
                f"an image of {image.size[0]}x{image.size[1]} pixels would be resized to "
                f"{width}x{height}, more than {MAX_VALUE} values; cut it, so that its sides "
                "differ less"
            )
        image = image.resize((width, height), _pillow().Resampling.BILINEAR)
    if steps.crop is not None:
        height, width = steps.crop
        left, top = _crop_start(image.width, width), _crop_start(image.height, height)
        image = image.crop((left, top, left + width, top + height))  # black where it sticks out
    pixels = np.asarray(image, dtype=np.float32) / np.float32(255)
    if pixels.ndim == 2:
        pixels = pixels[:, :, np.newaxis]
    mean = np.asarray(steps.mean, dtype=np.float32)
    std = np.asarray(steps.std, dtype=np.float32)
    return np.ascontiguousarray(((pixels - mean) / std).transpose(2, 0, 1))


def _crop_start(size: int, crop: int) -> int:
    """Return where a centre crop begins, negative where the image is smaller, as torchvision."""
    return round((size - crop) / 2.0) if size >= crop else -((crop - size) // 2)


def _target_size(size: tuple[int, int], resize: tuple[int, int] | int) -> tuple[int, int]:
    """Return (width, height) after the resize; torchvision truncates the longer side."""
    if not isinstance(resize, int):
        return resize[1], resize[0]
    width, height = size
    if width <= height:
        return resize, int(resize * height / width)
    return int(resize * width / height), resize


def _open(path: Path, preprocessing: Preprocessing | None) -> Any:
    channels = 1 if _known(preprocessing).channels == "gray" else 3
    try:
        return image_files.read_image(path, channels)
    except ImportError as error:
        raise CommandError(PILLOW_MISSING) from error
    except ValueError as error:
        raise CommandError(str(error)) from error


def _image_of(pixels: Pixels, preprocessing: Preprocessing | None, path: Path) -> Any:
    channels = 1 if pixels.ndim == 2 else pixels.shape[2]
    if channels not in (1, 3):
        raise CommandError(f"{path}: uint8 pixels have 1 or 3 channels, not {channels}")
    mode = "L" if _known(preprocessing).channels == "gray" else "RGB"
    squeezed = pixels if channels == 3 else pixels.reshape(pixels.shape[:2])
    return _pillow().fromarray(squeezed).convert(mode)


def _known(preprocessing: Preprocessing | None) -> Preprocessing:
    if preprocessing is None:
        raise CommandError(
            "the model file does not say how an image becomes an input; give float .npy arrays, "
            "or export the model again with its preprocessing"
        )
    return preprocessing


def _pillow() -> Any:
    try:
        from PIL import Image
    except ImportError as error:
        raise CommandError(PILLOW_MISSING) from error
    return Image


def _input_of(
    image: Any, preprocessing: Preprocessing | None, path: Path, shape: tuple[int, ...]
) -> Input:
    try:
        array = from_pixels(image, preprocessing)
    except CommandError as error:
        raise CommandError(f"{path}: {error}") from error
    return _fitting(array, path, shape)


def _fitting(array: Input, path: Path, shape: tuple[int, ...]) -> Input:
    if array.shape != shape:
        raise CommandError(
            f"{path}: gives an input of shape {array.shape}, and the network takes {shape} "
            f"(channels, height, width)"
        )
    return array
