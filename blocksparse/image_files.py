"""Image files, read in one way for training, for validation and by the command line.

Pillow is imported when it is needed: what runs models can do without.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from PIL import Image

__all__ = ["SUFFIXES", "read_image"]

SUFFIXES = (".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp")
"""Names, in small letters, that are taken for those of images."""


def read_image(path: Path, channels: int) -> Image.Image:
    """Decode a file.

    Parameters
    ----------
    path
        The file.
    channels
        3 for RGB, 1 for grey: what other images are converted to.

    Returns
    -------
    PIL.Image.Image
        8 bits a channel.

    Raises
    ------
    ImportError
        Pillow is not installed.
    ValueError
        The file is not an image, is damaged, or has pixels of more than 8 bits that Pillow would
        cut off at 255. The text names it.
    """
    from PIL import Image

    try:
        with Image.open(path) as image:
            wide = image.mode if image.mode.startswith(("I", "F")) else None
            decoded = image if wide else image.convert("RGB" if channels == 3 else "L")
    except Exception as error:  # Pillow's decoders raise what they like: SyntaxError, struct.error
        raise ValueError(
            f"{path} is not a readable image: {error}. Mend, replace or remove it"
        ) from error
    if wide:
        raise ValueError(
            f"{path} has pixels of more than 8 bits (Pillow's mode {wide}), nearly all of which "
            "would become white. Save it with 8 bits a channel"
        )
    return decoded
