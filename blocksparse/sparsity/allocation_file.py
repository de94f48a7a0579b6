"""An allocation as a file: the sparsity of every layer, worked out before the training.

The file is YAML, and meant to be read and changed by people::

    pattern: block 8x8 shared
    layers:
      layer1.0.conv1: {shape: [16, 16, 3, 3], sparsity: 0.5}
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from blocksparse.sparsity.allocation import (
    Allocation,
    Candidate,
    Unreachable,
    share_of,
    weights_for,
)
from blocksparse.sparsity.layers import FoundLayer
from blocksparse.sparsity.patterns import Pattern
from blocksparse.whole_file import write_whole

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class StoredLayer:
    """One layer of an allocation file.

    Parameters
    ----------
    shape : tuple of int
        Of its weight.
    sparsity : float
        The share of its weights that go, 0..1; 0 leaves it dense.
    """

    shape: tuple[int, ...]
    sparsity: float


@dataclass(frozen=True)
class FileAllocation(Allocation):
    """Sparsities from a file, as ``task=sensitivity`` and ``task=allocate`` write it.

    The file names every layer that is pruned, and no other. ``sparsity.target`` does not count: the
    target is what the layers of the file come to together.

    Parameters
    ----------
    path : str
        Of the file.

    Raises
    ------
    FileNotFoundError, ValueError
        If there is no such file, or it is no allocation.
    """

    path: str = field(repr=False)  # a run that goes on may find the file elsewhere
    layers: Mapping[str, StoredLayer] = field(init=False)
    pattern: str = field(init=False)  # "" where the file does not say

    def __post_init__(self) -> None:
        layers, pattern = read_allocation(Path(self.path))
        object.__setattr__(self, "layers", layers)
        object.__setattr__(self, "pattern", pattern)

    def overall(self, target: float) -> float:
        """Return the sparsity of all layers of the file together."""
        sizes = [math.prod(layer.shape) for layer in self.layers.values()]
        zeros = sum(
            size * layer.sparsity for size, layer in zip(sizes, self.layers.values(), strict=True)
        )
        return zeros / max(sum(sizes), 1)

    def check(self, layers: Sequence[FoundLayer], pattern: Pattern) -> None:
        """Refuse a file of another network, or of other layers of it; see `Allocation.check`.

        A file made for another pattern is used, for its sparsities are good for any, and a warning
        says so.
        """
        found = {layer.name: layer for layer in layers}
        wrong = []
        for name, stored in self.layers.items():
            if name not in found:
                wrong.append(f"{name} is not in the network")
            elif found[name].shape != stored.shape:
                shapes = ["x".join(map(str, shape)) for shape in (stored.shape, found[name].shape)]
                wrong.append(f"{name} is {shapes[0]} in the file, {shapes[1]} in the network")
            elif found[name].reason and stored.sparsity > 0:
                wrong.append(f"{name} stays dense ({found[name].reason})")
        wrong += [
            f"{layer.name} is not in the file"
            for layer in layers
            if not layer.reason and layer.name not in self.layers
        ]
        if wrong:
            more = f"; and {len(wrong) - 6} more" if len(wrong) > 6 else ""
            raise ValueError(
                f"{self.path}: made for another network, or for other layers of it: "
                f"{'; '.join(wrong[:6])}{more}. Use the network, sparsity and sparsity.dense it "
                "was made with, or make one for this network with task=allocate"
            )
        if self.pattern not in ("", str(pattern)):
            logger.warning(
                "%s: was made for %s, and the layers are pruned with %s, which may need other "
                "sparsities; task=allocate makes a file for it",
                self.path,
                self.pattern,
                pattern,
            )

    def zeros(self, layers: Sequence[Candidate], target: float, limit: float) -> list[int | None]:
        """Return the weights that must go per layer; see `Allocation.zeros`."""
        result: list[int | None] = []
        for layer in layers:
            sparsity = self.layers[layer.name].sparsity
            wanted = weights_for(share_of(sparsity, limit), layer.full)
            if wanted > layer.most:
                raise Unreachable(
                    f"at most {layer.most / layer.full * limit:.4f} in {layer.name}, for which "
                    f"{self.path} asks {sparsity:g}"
                )
            result.append(wanted)
        return result


def read_allocation(path: Path) -> tuple[dict[str, StoredLayer], str]:
    """Read an allocation file.

    Returns
    -------
    layers : dict of str to StoredLayer
        By module name, in the order of the file.
    pattern : str
        What it was made for; empty where the file does not say.

    Raises
    ------
    FileNotFoundError
        If there is no such file.
    ValueError
        If it is no allocation; the text says which entry is wrong.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"sparsity.allocation.path={path}: no such file. python train.py task=allocate writes "
            "one as runs/<name>/<time>/allocation.yaml"
        )
    try:
        content = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path}: not a YAML file: {' '.join(str(error).split())}") from error
    entries = content.get("layers") if isinstance(content, dict) else None
    if not isinstance(entries, dict) or not entries:
        raise ValueError(
            f"{path}: not an allocation, which has `layers:` and below it lines such as "
            "`layer1.0.conv1: {shape: [16, 16, 3, 3], sparsity: 0.5}`"
        )
    layers = {str(name): _stored(path, str(name), entry) for name, entry in entries.items()}
    return layers, str(content.get("pattern") or "")


def write_allocation(
    path: Path, layers: Mapping[str, StoredLayer], facts: Mapping[str, Any]
) -> None:
    """Write an allocation file, whole or not at all.

    Parameters
    ----------
    path : Path
        Of the file.
    layers : mapping of str to StoredLayer
        Every layer that may be pruned, by its module name.
    facts : mapping of str to plain value
        What a reader may want to know. Of these, only ``pattern`` is read again.
    """
    lines = [yaml.safe_dump(dict(facts), sort_keys=False, allow_unicode=True)] if facts else []
    lines.append("layers:\n")
    for name, layer in layers.items():
        key = yaml.safe_dump(name).removesuffix("\n...\n").strip()
        lines.append(f"  {key}: {{shape: {list(layer.shape)}, sparsity: {layer.sparsity!r}}}\n")
    write_whole(path, "".join(lines))


def _stored(path: Path, name: str, entry: object) -> StoredLayer:
    shape = entry.get("shape") if isinstance(entry, dict) else None
    sparsity = entry.get("sparsity") if isinstance(entry, dict) else None
    good = (
        isinstance(shape, list)
        and all(isinstance(side, int) and side > 0 for side in shape)
        and isinstance(sparsity, int | float)
        and 0.0 <= sparsity <= 1.0
    )
    if not good:
        raise ValueError(
            f"{path}: {name}: {entry} is not a shape and a sparsity in 0..1, such as "
            "{shape: [16, 16, 3, 3], sparsity: 0.5}"
        )
    return StoredLayer(tuple(shape), float(sparsity))  # type: ignore[arg-type]
