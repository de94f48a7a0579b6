"""PyTorch's own view of a model: an ATen graph with a dynamic batch dimension."""

from __future__ import annotations

import copy
import warnings
from dataclasses import dataclass

import torch
from torch import nn
from torch.export import ExportedProgram

from blocksparse.export.errors import CaptureError

# Activations the file knows by name: kept whole where `run_decompositions` would take them apart.
_KEPT_WHOLE = (
    torch.ops.aten.hardsigmoid.default,
    torch.ops.aten.hardswish.default,
    torch.ops.aten.silu.default,
)


@dataclass(frozen=True)
class Capture:
    """A model as ``torch.export`` sees it.

    Attributes
    ----------
    program : ExportedProgram
        Decomposed to core ATen operations; the first axis of the input is symbolic.
    model : nn.Module
        The copy that was captured: evaluation mode, float32, on the CPU.
    input_shape : tuple of int
        ``(C, H, W)``.
    """

    program: ExportedProgram
    model: nn.Module
    input_shape: tuple[int, ...]


def capture(model: nn.Module, input_shape: tuple[int, ...]) -> Capture:
    """Capture a copy of `model`, in evaluation mode and float32, for any batch size.

    Parameters
    ----------
    model : nn.Module
        Takes one float tensor ``[N, C, H, W]``. Never changed: a deep copy is captured.
    input_shape : tuple of int
        ``(C, H, W)``.

    Returns
    -------
    Capture

    Raises
    ------
    CaptureError
        The model cannot be copied, does not run on such an input, has control flow that depends on
        data, or fixes the batch size.
    """
    if len(input_shape) != 3 or min(input_shape) < 1:
        raise CaptureError(f"input_shape must be (C, H, W), all positive; it is {input_shape}")
    try:
        frozen = copy.deepcopy(model)
    except RuntimeError as error:
        raise CaptureError(
            f"{type(model).__name__} cannot be copied: {error}. Modules reparametrized by "
            "torch.nn.utils.prune have this problem: call torch.nn.utils.prune.remove on each "
            "pruned parameter first"
        ) from error
    frozen = frozen.to(device="cpu", dtype=torch.float32).eval()
    # Two images: with one, models that squeeze or reshape would have their batch fixed to 1.
    example = torch.zeros(2, *input_shape)
    batch = torch.export.Dim("batch")
    try:
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            program = torch.export.export(
                frozen, (example,), dynamic_shapes=({0: batch},), strict=False
            )
            table = torch.export.default_decompositions()
            for op in _KEPT_WHOLE:
                table.pop(op, None)
            program = program.run_decompositions(table)
    except Exception as error:
        raise CaptureError(
            f"torch.export could not capture {type(model).__name__} on inputs of shape "
            f"(batch, {', '.join(map(str, input_shape))}): {_first_lines(error)}. The model must "
            "take one tensor, run on this shape, work with any batch size (write x.shape[0] or "
            "flatten(1), not a number), and not branch on the values of tensors"
        ) from error
    return Capture(program, frozen, tuple(input_shape))


def _first_lines(error: Exception, limit: int = 600) -> str:
    text = f"{type(error).__name__}: {error}".strip()
    return text if len(text) <= limit else text[:limit] + " ..."
