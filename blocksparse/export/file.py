"""From a model to a verified file, in one call."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from blocksparse.export.report import ExportReport


def export_file(
    model: nn.Module,
    path: str | Path,
    inputs: torch.Tensor,
    *,
    val_loader: Iterable[Any] | None = None,
    patterns: Mapping[str, Any] | None = None,
    block: tuple[int, int] | None = None,
    classes: Sequence[str] | None = None,
    preprocessing: Any = None,
    provenance: Mapping[str, Any] | None = None,
    report_path: str | Path | None = None,
) -> ExportReport:
    """Export a model, verify the file against it, and only then give the file its name.

    Parameters
    ----------
    model : nn.Module
        Float32 ``[N, C, H, W]`` to logits ``[N, classes]``. It is copied, never changed.
    path : str or Path
        Where the file goes, by custom ``*.bsr.safetensors``. Missing folders are made.
    inputs : torch.Tensor
        Float32 ``[N, C, H, W]``, real inputs to compare the file with the model on.
    val_loader : iterable of (images, labels), optional
        Validation batches; the accuracy of both on them goes into the report.
    patterns : mapping of parameter name to pattern, optional
        What each weight was pruned to (`blocksparse.sparsity`); found from the zeros where missing.
    block : (int, int), optional
        Store sparse layers as BSR of this block shape, whatever their pattern.
    classes : sequence of str, optional
        Class names, stored in the file.
    preprocessing : mapping or blocksparse.format.Preprocessing, optional
        What turns an image file into an input, stored in the file.
    provenance : mapping, optional
        Plain JSON values to store in the file: configuration, metrics, versions.
    report_path : str or Path, optional
        Also save the report there as JSON.

    Returns
    -------
    ExportReport
        Layer table, bytes and the verification.

    Raises
    ------
    UnsupportedOpError
        An operation has no counterpart in the file; names it and its module.
    WeightError
        A weight holds NaN or infinity.
    VerificationError
        The file does not compute what the model computes; no file is left under the final name.
    """
    raise NotImplementedError
