"""Read a network's weights from a file, and load them strictly."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

SUFFIXES = (".pth", ".pt", ".ckpt", ".safetensors")

# Where training tools put the network's weights inside a checkpoint, and what they prepend to
# names.
_NESTED = ("state_dict", "model", "model_state_dict")
_PREFIXES = ("module.", "model.")
_LISTED = 8


class WeightsError(ValueError):
    """Weights that cannot be read, or do not fit the network they are for."""


def read_weights(path: str | Path) -> dict[str, Tensor]:
    """Read a state dict.

    Parameters
    ----------
    path : path
        A `.safetensors` file, or a `.pth`, `.pt` or `.ckpt` file that holds tensors and plain
        values only: it is read with `weights_only=True`, so that opening a file from elsewhere runs
        no code. A training checkpoint's weights are found in it, and the name under which Lightning
        (`model.`) or DataParallel (`module.`) keeps the network is taken off.

    Returns
    -------
    dict of str to tensor
        On the CPU.

    Raises
    ------
    FileNotFoundError
        There is no such file.
    WeightsError
        The file is damaged, of another kind, or has no weights in it.
    """
    path = Path(path)
    if path.suffix not in SUFFIXES:
        raise WeightsError(f"{path}: weights are read from files named {', '.join(SUFFIXES)}")
    if not path.is_file():
        raise FileNotFoundError(f"{path}: there is no such weights file; check model.weights")
    try:
        if path.suffix == ".safetensors":
            content: Any = load_file(path)
        else:
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise WeightsError(
            f"{path}: is damaged, or holds Python objects besides tensors, and unpickling those "
            "could run any code. Save only the state dict (torch.save(model.state_dict(), ...)), "
            "or convert the file to .safetensors where you trust it"
        ) from error
    except (SafetensorError, RuntimeError, OSError, EOFError) as error:
        raise WeightsError(f"{path}: cannot be read, it may be cut short: {error}") from error
    state = _find_state(content)
    if state is None:
        raise WeightsError(
            f"{path}: no weights found; expected tensors by name, at the top or under one of "
            f"{', '.join(_NESTED)}"
        )
    for prefix in _PREFIXES:
        if all(name.startswith(prefix) for name in state):
            state = {name.removeprefix(prefix): value for name, value in state.items()}
    return state


def load_weights(model: nn.Module, state: Mapping[str, Tensor], source: str) -> None:
    """Load a state dict whose names and shapes must be the network's own.

    One thing may be missing: batch norm's `num_batches_tracked`. Files from before PyTorch 0.4.1
    lack it; it counts updates and changes no output.

    Parameters
    ----------
    model : nn.Module
        Changed in place, or not at all.
    state : mapping of str to tensor
        The weights.
    source : str
        Where they come from, for the error.

    Raises
    ------
    WeightsError
        Lists missing, unexpected and misshapen entries.
    """
    own = model.state_dict()
    missing = [n for n in own if n not in state and not n.endswith("num_batches_tracked")]
    unexpected = [n for n in state if n not in own]
    misshapen = [n for n in own if n in state and own[n].shape != state[n].shape]
    if missing or unexpected or misshapen:
        lines = [f"{source} does not fit {type(model).__name__}:"]
        lines += _listing("missing in the file", missing)
        lines += _listing("unexpected in the file", unexpected)
        lines += _listing(
            "other shape in the file",
            [f"{n} {tuple(state[n].shape)}, expected {tuple(own[n].shape)}" for n in misshapen],
        )
        lines.append(_how_to_mend(own, state, missing, misshapen))
        raise WeightsError("\n".join(lines))
    model.load_state_dict(dict(state), strict=False)


def _find_state(content: Any) -> dict[str, Tensor] | None:
    if not isinstance(content, Mapping):
        return None
    if content and all(isinstance(value, Tensor) for value in content.values()):
        return dict(content)
    for key in _NESTED:
        if key in content and (found := _find_state(content[key])) is not None:
            return found
    return None


def _listing(title: str, names: list[str]) -> list[str]:
    if not names:
        return []
    more = [f"... and {len(names) - _LISTED} more"] if len(names) > _LISTED else []
    return [f"  {title} ({len(names)}): " + "; ".join(names[:_LISTED] + more)]


def _how_to_mend(
    own: Mapping[str, Tensor],
    state: Mapping[str, Tensor],
    missing: list[str],
    misshapen: list[str],
) -> str:
    counts = {(len(state[n]), len(own[n])) for n in misshapen if own[n].ndim}
    same_inputs = all(own[n].shape[1:] == state[n].shape[1:] for n in misshapen)
    if not missing and len(counts) == 1 and same_inputs:
        theirs, ours = counts.pop()
        return (
            f"The file was trained for {theirs} classes, the data has {ours}: set "
            "model.new_classifier=true to start a new classifier on the other weights"
        )
    return (
        "Check that model.name, model.widths and the data's channels are those the file was "
        "trained with"
    )
