"""From a PyTorch model to a model of the file, in memory."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import torch
from torch import nn

from blocksparse.export.capture import Capture, capture
from blocksparse.export.fold import fold
from blocksparse.export.fuse import fuse
from blocksparse.export.lower import lower
from blocksparse.export.pack import Packed, pack
from blocksparse.format import Model, Preprocessing
from blocksparse.sparsity.patterns import Pattern


@dataclass(frozen=True)
class Conversion:
    """A packed model, and the PyTorch model it was captured from.

    Attributes
    ----------
    packed : Packed
    capture : Capture
        Holds the copy of the model to compare with.
    """

    packed: Packed
    capture: Capture


def convert(
    model: nn.Module,
    input_shape: tuple[int, ...],
    *,
    patterns: Mapping[str, Pattern] | None = None,
    block: tuple[int, int] | None = None,
    classes: Sequence[str] | None = None,
    preprocessing: Preprocessing | Mapping[str, Any] | None = None,
    provenance: Mapping[str, Any] | None = None,
) -> Conversion:
    """Capture, lower, fold, fuse and pack a model; parameters are those of `export_model`."""
    captured = capture(model, input_shape)
    draft = lower(captured)
    fold(draft)
    fuse(draft)
    packed = pack(
        draft,
        patterns=patterns,
        block=block,
        classes=classes,
        preprocessing=_preprocessing(preprocessing),
        provenance={
            "exporter": {"blocksparse": version("blocksparse"), "torch": str(torch.__version__)},
            **(provenance or {}),
        },
    )
    return Conversion(packed, captured)


def export_model(
    model: nn.Module,
    input_shape: tuple[int, ...],
    *,
    patterns: Mapping[str, Pattern] | None = None,
    block: tuple[int, int] | None = None,
    classes: Sequence[str] | None = None,
    preprocessing: Preprocessing | Mapping[str, Any] | None = None,
    provenance: Mapping[str, Any] | None = None,
) -> Model:
    """Turn a PyTorch model into a model of the file, in memory and not verified.

    Parameters
    ----------
    model : nn.Module
        Float32 ``[N, C, H, W]`` to logits ``[N, classes]``. It is copied, never changed.
    input_shape : tuple of int
        ``(C, H, W)``.
    patterns : mapping of parameter name to Pattern, optional
        What each weight was pruned to; found from the zeros where missing.
    block : (int, int), optional
        Store sparse layers as BSR of this block shape, whatever their pattern.
    classes, preprocessing, provenance : optional
        Stored in the file; see `blocksparse.format.Model`. `preprocessing` may be a mapping with
        the fields of `blocksparse.format.Preprocessing`; `provenance` becomes what JSON makes of
        it, lists of its tuples and texts of its numeric keys.

    Returns
    -------
    Model

    Raises
    ------
    CaptureError, UnsupportedOpError, WeightError
        See `blocksparse.export.errors`.
    FormatError
        `provenance` cannot be said in JSON.
    """
    return convert(
        model,
        input_shape,
        patterns=patterns,
        block=block,
        classes=classes,
        preprocessing=preprocessing,
        provenance=provenance,
    ).packed.model


def _preprocessing(given: Preprocessing | Mapping[str, Any] | None) -> Preprocessing | None:
    if given is None or isinstance(given, Preprocessing):
        return given
    known = {field.name for field in dataclasses.fields(Preprocessing)}
    if set(given) != known:
        raise ValueError(
            f"preprocessing must have exactly the fields {sorted(known)}, it has {sorted(given)}"
        )
    fields: dict[str, Any] = {
        name: value if isinstance(value, str) or not isinstance(value, Sequence) else tuple(value)
        for name, value in given.items()
    }
    return Preprocessing(**fields)
