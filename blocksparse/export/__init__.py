"""A trained network becomes one compact, verified file.

`export_file` does all of it: capture -> lower -> fold -> fuse -> pack -> write -> verify.
"""

from __future__ import annotations

from blocksparse.export.convert import export_model
from blocksparse.export.errors import (
    CaptureError,
    ExportError,
    UnsupportedOpError,
    VerificationError,
    WeightError,
)
from blocksparse.export.file import export_file
from blocksparse.export.report import ExportReport, LayerRow, Verification

__all__ = [
    "CaptureError",
    "ExportError",
    "ExportReport",
    "LayerRow",
    "UnsupportedOpError",
    "Verification",
    "VerificationError",
    "WeightError",
    "export_file",
    "export_model",
]
