"""The proof that the file computes what the model computes.

Legend: N images.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from blocksparse.export.errors import VerificationError
from blocksparse.export.report import Verification
from blocksparse.format import Model, read
from blocksparse.runtime import load
from blocksparse.runtime.tolerance import tolerance

_CHUNK = 32


@dataclass
class _Tally:
    """What the comparisons gave so far."""

    images: int = 0
    same_argmax: int = 0
    max_error: float = 0.0
    tolerance: float = 0.0
    max_logit: float = 0.0


def verify(
    path: str | Path,
    model: Model,
    network: nn.Module,
    inputs: torch.Tensor,
    val_loader: Iterable[Any] | None = None,
) -> Verification:
    """Read the file back, run it, and compare it with PyTorch.

    Parameters
    ----------
    path : str or Path
        The file.
    model : Model
        What was written into it.
    network : nn.Module
        The PyTorch model, float32 on the CPU in evaluation mode.
    inputs : torch.Tensor
        Float32 ``[N, C, H, W]``; compared as one batch after the other, and the first image alone.
    val_loader : iterable of (images, labels), optional
        Compared as well, and the accuracy of both counted.

    Returns
    -------
    Verification

    Raises
    ------
    VerificationError
        The file does not hold what was written, or logits differ by more than `tolerance`.
    """
    if read(path) != model:
        raise VerificationError("what is read from the file is not what was written")
    runtime = load(path)
    engine = str(runtime.engine)
    tally = _Tally()

    def compare(images: torch.Tensor) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
        with torch.no_grad():
            expected = network(images).numpy()
        got = runtime(np.ascontiguousarray(images.numpy()))
        _compare(model, expected, got, tally)
        return expected.argmax(1), got.argmax(1)

    for images in [inputs[:1], *_chunks(inputs)]:
        compare(images)
    hits = np.zeros(2, np.int64)
    seen = 0
    for batch, labels in val_loader or ():
        for images, truth in zip(_chunks(batch), labels.split(_CHUNK), strict=True):
            hits += [int((top == truth.numpy()).sum()) for top in compare(images)]
            seen += len(truth)
    return Verification(
        images=tally.images,
        same_argmax=tally.same_argmax,
        max_error=tally.max_error,
        tolerance=tally.tolerance,
        max_logit=tally.max_logit,
        engine=engine,
        val_images=seen,
        accuracy_torch=float(hits[0] / seen) if seen else None,
        accuracy_runtime=float(hits[1] / seen) if seen else None,
    )


def _compare(
    model: Model,
    expected: npt.NDArray[Any],
    got: npt.NDArray[Any],
    tally: _Tally,
) -> None:
    if not np.isfinite(expected).all():
        raise VerificationError(
            "the model itself gives NaN or infinity on the inputs used to verify it; "
            "check the inputs' normalisation and the weights"
        )
    if got.shape != expected.shape:
        raise VerificationError(f"the file gives {got.shape}, the model {expected.shape}")
    max_logit = float(np.abs(expected).max())
    allowed = tolerance(model, max_logit)
    error = float(np.abs(got - expected).max())
    same = int((got.argmax(1) == expected.argmax(1)).sum())
    # `not <=` so that NaN fails, too.
    if not error <= allowed:
        raise VerificationError(
            f"logits of {len(got)} images differ from PyTorch's by up to {error:.3g}; "
            f"rounding explains {allowed:.3g} at a largest logit of {max_logit:.3g}. The top class "
            f"agrees on {same} of {len(got)}. This is a defect of the export or the runtime, not "
            "of the model; no file was left"
        )
    tally.images += len(got)
    tally.same_argmax += same
    if error >= tally.max_error:
        tally.max_error, tally.tolerance, tally.max_logit = error, allowed, max_logit


def _chunks(images: torch.Tensor) -> Iterator[torch.Tensor]:
    return iter(images.to("cpu", torch.float32).split(_CHUNK))
