"""CutMix: part of every image replaced by that of another (S. Yun et al., arXiv:1905.04899)."""

# N batch, C channels, H W image height and width.

from __future__ import annotations

import torch
from torch import Tensor


def cutmix(images: Tensor) -> Tensor:
    """Paste a rectangle of every image into another one of the batch, the same for all.

    The share of the area that stays is even over 0..1 (the paper's alpha = 1), and the rectangle's
    centre anywhere, so that a part of it may lie outside.

    Parameters
    ----------
    images : tensor [N, C, H, W]
        They stay as they are. Image i receives its rectangle from image N - 1 - i.
    """
    height, width = images.shape[2:]
    kept, y, x = torch.rand(3).tolist()  # torch's generator: a resumed training draws the same
    side = (1 - kept) ** 0.5
    rows = _span(y, side, height)
    columns = _span(x, side, width)
    mixed = images.clone()
    mixed[:, :, rows, columns] = images.flip(0)[:, :, rows, columns]
    return mixed


def _span(centre: float, share: float, size: int) -> slice:
    """Return the pixels of a share of an axis around a centre, both 0..1."""
    first = round((centre - share / 2) * size)
    last = round((centre + share / 2) * size)
    return slice(max(0, first), min(size, last))
