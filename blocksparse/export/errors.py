"""What can go wrong in an export, each with its own class so that callers can tell them apart."""

from __future__ import annotations


class ExportError(ValueError):
    """Any failure of an export; the classes below say which."""


class CaptureError(ExportError):
    """``torch.export`` could not turn the model into a graph with a dynamic batch dimension."""


class UnsupportedOpError(ExportError):
    """An operation of the model has no counterpart in the file.

    Attributes
    ----------
    op : str
        The ATen operation, for example ``aten.gelu.default``.
    module : str
        Path of the module that called it, for example ``features.3.act``; empty for the root.
    """

    def __init__(self, op: str, module: str, reason: str, hint: str, where: str = "") -> None:
        self.op = op
        self.module = module
        place = f"module '{module}'" if module else "the root module"
        source = f" ({where})" if where else ""
        super().__init__(f"{place}{source}: {op} cannot be exported: {reason}. {hint}")


class WeightError(ExportError):
    """A tensor of the model cannot be stored: NaN or infinity in it, or not a real number."""


class VerificationError(ExportError):
    """The file, run by the runtime, does not compute what the model computes."""
