"""From a model to a verified file, in one call."""

from __future__ import annotations

import logging
import secrets
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from blocksparse.export.convert import convert
from blocksparse.export.errors import VerificationError
from blocksparse.export.pack import Packed
from blocksparse.export.report import ExportReport, Verification
from blocksparse.export.verify import verify
from blocksparse.format import Preprocessing, write
from blocksparse.sparsity.patterns import Pattern
from blocksparse.whole_file import check_place

_log = logging.getLogger(__name__)


def export_file(
    model: nn.Module,
    path: str | Path,
    inputs: torch.Tensor,
    *,
    val_loader: Iterable[Any] | None = None,
    patterns: Mapping[str, Pattern] | None = None,
    block: tuple[int, int] | None = None,
    classes: Sequence[str] | None = None,
    preprocessing: Preprocessing | Mapping[str, Any] | None = None,
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
    patterns : mapping of parameter name to Pattern, optional
        What each weight was pruned to; found from the zeros where missing.
    block : (int, int), optional
        Store sparse layers as BSR of this block shape, whatever their pattern.
    classes : sequence of str, optional
        Class names, stored in the file.
    preprocessing : mapping or blocksparse.format.Preprocessing, optional
        What turns an image file into an input, stored in the file.
    provenance : mapping, optional
        What JSON can say, to store in the file: configuration, metrics, versions. Tuples become
        lists, and keys that are numbers become texts.
    report_path : str or Path, optional
        Also save the report there as JSON. Missing folders are made.

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
    FormatError
        `provenance` cannot be said in JSON.
    IsADirectoryError, NotADirectoryError, PermissionError
        `path` or `report_path` cannot be written to.
    VerificationError
        The file does not compute what the model computes; no file is left under the final name.
    """
    if inputs.dim() != 4 or len(inputs) < 1:
        raise ValueError(
            f"inputs must be at least one image, [N, C, H, W]; their shape is {tuple(inputs.shape)}"
        )
    path = Path(path)
    for target in (path, report_path):
        if target is not None:
            check_place(Path(target))  # before the work, and before anything is replaced
    converted = convert(
        model,
        tuple(inputs.shape[1:]),
        patterns=patterns,
        block=block,
        classes=classes,
        preprocessing=preprocessing,
        provenance=provenance,
    )
    packed = converted.packed
    path.parent.mkdir(parents=True, exist_ok=True)
    unverified = path.with_name(f".{path.name}.{secrets.token_hex(4)}.unverified")
    try:
        write(unverified, packed.model)
        verification = verify(unverified, packed.model, converted.capture.model, inputs, val_loader)
        file_bytes = unverified.stat().st_size
        unverified.replace(path)
    except VerificationError as error:
        raise VerificationError(f"{path} was not written: {error}") from error
    finally:
        unverified.unlink(missing_ok=True)
    report = _report(path, packed, file_bytes, verification)
    _log.info(
        "%s: %d bytes, %.2f of dense; logits within %.2g of PyTorch's (%.2g allowed)",
        path,
        file_bytes,
        report.ratio,
        verification.max_error,
        verification.tolerance,
    )
    if report_path is not None:
        report.save(report_path)
    return report


def _report(
    path: Path, packed: Packed, file_bytes: int, verification: Verification
) -> ExportReport:
    weights = packed.model.weights.values()
    vectors = sum(vector.nbytes for vector in packed.model.vectors.values())
    values = sum(weight.nbytes_values for weight in weights) + vectors
    indices = sum(weight.nbytes_indices for weight in weights)
    return ExportReport(
        path=path,
        layers=packed.layers,
        values_bytes=values,
        indices_bytes=indices,
        metadata_bytes=file_bytes - values - indices,
        file_bytes=file_bytes,
        dense_bytes=packed.dense_bytes,
        flushed=packed.flushed,
        verification=verification,
    )
