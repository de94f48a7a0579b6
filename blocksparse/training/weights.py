"""Read a network's weights from a file, and load them strictly."""

from __future__ import annotations

import logging
import pickle
import zipfile
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
_NESTED = (
    "state_dict",
    "model_state_dict",
    "model",
    "net",
    "network",
    "ema",
    "model_ema",
    "state_dict_ema",
)
_PREFIXES = ("module.", "model.")
_LISTED = 8

_log = logging.getLogger(__name__)


class WeightsError(ValueError):
    """Weights that cannot be read, or do not fit the network they are for."""


def read_weights(path: str | Path, key: str = "model.weights") -> dict[str, Tensor]:
    """Read a state dict.

    Parameters
    ----------
    path : path
        A `.safetensors` file, or a `.pth`, `.pt` or `.ckpt` file that holds tensors and plain
        values only: it is read with `weights_only=True`, so that opening a file from elsewhere runs
        no code. A training checkpoint's weights are found in it, and the name under which Lightning
        (`model.`) or DataParallel (`module.`) keeps the network is taken off.
    key : str
        The configuration key that named the file, for the error.

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
        raise FileNotFoundError(f"{path}: there is no such weights file; check {key}")
    content = read_content(path)
    state = _find_state(content)
    if state is None:
        raise WeightsError(
            f"{path}: no weights found; expected tensors by name, at the top or under one of "
            f"{', '.join(_NESTED)}. {_at_the_top(content)}"
        )
    for prefix in _PREFIXES:
        if all(name.startswith(prefix) for name in state):
            state = {name.removeprefix(prefix): value for name, value in state.items()}
    return state


def read_content(path: Path) -> Any:
    """Read all that a file of weights holds.

    Raises
    ------
    WeightsError
        The file is damaged, or holds more than tensors and plain values.
    """
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise WeightsError(
            f"{path}: is damaged, or holds Python objects besides tensors, and unpickling those "
            "could run any code. Save only the state dict (torch.save(model.state_dict(), ...)), "
            "or convert the file to .safetensors where you trust it"
        ) from error
    except SafetensorError as error:
        raise WeightsError(f"{path}: cannot be read, it may be cut short: {error}") from error
    except Exception as error:  # of junk, PyTorch raises whatever its bytes lead to
        raise WeightsError(
            f"{path}: is damaged or cut short, and cannot be read: {type(error).__name__}: {error}"
        ) from error


def check_whole(path: Path) -> None:
    """Check that a checkpoint was not damaged or cut short, without reading what it holds.

    Raises
    ------
    WeightsError
        It was.
    """
    try:
        with zipfile.ZipFile(path) as archive:  # PyTorch's format
            damaged = archive.testzip()
    except (zipfile.BadZipFile, OSError, EOFError) as error:
        raise WeightsError(_damaged(path, str(error))) from error
    if damaged is not None:
        raise WeightsError(_damaged(path, f"wrong checksum of {damaged}"))


def _damaged(path: Path, why: str) -> str:
    return (
        f"{path}: is damaged or cut short ({why}), so nothing can go on from it. Remove it: then "
        "its stage is trained anew, from the last checkpoint before"
    )


def load_weights(
    model: nn.Module,
    state: Mapping[str, Tensor],
    source: str,
    *,
    other_classes: str = "set model.new_classifier=true to start a new classifier on the other "
    "weights",
) -> None:
    """Load a state dict whose names and shapes must be the network's own.

    One thing may be missing: batch norm's `num_batches_tracked`. Files from before PyTorch 0.4.1
    lack it; it counts updates and changes no output.

    A training tool may keep more than the network: where all that is named `<prefix>.*` for one
    prefix is exactly this network, that is loaded, and the log lists the rest.

    Parameters
    ----------
    model : nn.Module
        Changed in place, or not at all.
    state : mapping of str to tensor
        The weights.
    source : str
        Where they come from, for the error.
    other_classes : str
        What to do where the file was trained for another number of classes, for the error; it may
        mention that number as ``{theirs}``.

    Raises
    ------
    WeightsError
        Lists missing, unexpected and misshapen entries.
    """
    own = model.state_dict()
    prefix, state, ignored = _take_prefix(own, state, source)
    missing = _missing(own, state)
    unexpected = [n for n in state if n not in own]
    misshapen = _misshapen(own, state)
    if missing or unexpected or misshapen:
        under = f", under {prefix}*," if prefix else ""
        lines = [f"{source}{under} does not fit {type(model).__name__}:"]
        lines += _listing("missing in the file", missing)
        lines += _listing("unexpected in the file", unexpected)
        lines += _listing(
            "other shape in the file",
            [f"{n} {tuple(state[n].shape)}, expected {tuple(own[n].shape)}" for n in misshapen],
        )
        lines += _listing(f"besides {prefix}* in the file", ignored)
        lines.append(_how_to_mend(own, state, missing, misshapen, other_classes))
        raise WeightsError("\n".join(lines))
    if ignored:
        _log.warning(
            "%s: the network is what is named %s*; ignored: %s", source, prefix, _cut(ignored)
        )
    model.load_state_dict(dict(state), strict=False)


def _missing(own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> list[str]:
    return [n for n in own if n not in state and not n.endswith("num_batches_tracked")]


def _misshapen(own: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> list[str]:
    return [n for n in own if n in state and own[n].shape != state[n].shape]


def _take_prefix(
    own: Mapping[str, Tensor], state: Mapping[str, Tensor], source: str
) -> tuple[str, Mapping[str, Tensor], list[str]]:
    """Return a prefix, what is named with it (without it), and the names of the rest.

    The prefix is empty where the entries fit as they are, or better so than under any prefix.
    """

    def differences(state: Mapping[str, Tensor]) -> int:
        unexpected = sum(name not in own for name in state)
        return len(_missing(own, state)) + unexpected + len(_misshapen(own, state))

    fewest = differences(state)
    best: tuple[str, Mapping[str, Tensor], list[str]] = ("", state, [])
    fitting: list[str] = []
    # "model." and "model.net." of "model.net.conv.weight".
    prefixes = {name[: at + 1] for name in state for at, char in enumerate(name) if char == "."}
    for prefix in sorted(prefixes) if fewest else ():
        inner = {n.removeprefix(prefix): v for n, v in state.items() if n.startswith(prefix)}
        if own.keys().isdisjoint(inner):
            continue
        found = differences(inner)
        if found < fewest:
            best = (prefix, inner, [name for name in state if not name.startswith(prefix)])
            fewest = found
        if not found:
            fitting.append(prefix)
    if len(fitting) > 1:
        raise WeightsError(
            f"{source} holds {len(fitting)} networks of this kind, under "
            f"{', '.join(f'{prefix}*' for prefix in fitting)}. Save the one that is meant on its "
            "own: torch.save(network.state_dict(), FILE)"
        )
    return best


def _find_state(content: Any) -> dict[str, Tensor] | None:
    if not isinstance(content, Mapping):
        return None
    if content and all(isinstance(value, Tensor) for value in content.values()):
        return dict(content)
    for key in _NESTED:
        if key in content and (found := _find_state(content[key])) is not None:
            return found
    return None


def _at_the_top(content: Any) -> str:
    """Say what a file without weights holds."""
    if not isinstance(content, Mapping):
        return f"The file holds a {type(content).__name__}"
    return f"At its top are: {_cut(sorted(map(str, content))) or 'nothing'}"


def _listing(title: str, names: list[str]) -> list[str]:
    if not names:
        return []
    return [f"  {title} ({len(names)}): {_cut(names)}"]


def _cut(names: list[str]) -> str:
    more = [f"... and {len(names) - _LISTED} more"] if len(names) > _LISTED else []
    return "; ".join(names[:_LISTED] + more)


def _how_to_mend(
    own: Mapping[str, Tensor],
    state: Mapping[str, Tensor],
    missing: list[str],
    misshapen: list[str],
    other_classes: str,
) -> str:
    counts = {(len(state[n]), len(own[n])) for n in misshapen if own[n].ndim}
    same_inputs = all(own[n].shape[1:] == state[n].shape[1:] for n in misshapen)
    if not missing and len(counts) == 1 and same_inputs:
        theirs, ours = counts.pop()
        return (
            f"The file was trained for {theirs} classes, the network has {ours}: "
            + other_classes.format(theirs=theirs)
        )
    return (
        "Check that model.name, model.widths and the channels of the images are those the file was "
        "trained with"
    )
