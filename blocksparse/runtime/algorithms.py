"""The ways to compute a convolution, and which of them to take for each layer.

A rule of thumb decides for small layers; large ones are measured inside the whole network, where
caches are as full as they will be, once on a machine. What was measured is kept on disk.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from functools import cache
from pathlib import Path
from statistics import median

import numpy as np

from blocksparse.format import BsrWeight, Model, NMWeight, Node, Weight
from blocksparse.whole_file import write_whole

from . import winograd
from .kernels.cache import cache_folder
from .kernels.objects import sources
from .kernels.target import Target, describe

_log = logging.getLogger(__name__)

MEASURED_FLOPS = 10_000_000
"""A layer with less work than this, some 50 microseconds, is not worth a measurement."""

CLOSE = 0.97
"""Another way has to take less than this share of the time of the best so far: a result within the
noise would change from machine start to machine start, and with it the last bits of the outputs."""


class Algorithm(StrEnum):
    """How a convolution is computed."""

    DIRECT = "direct"
    COLUMNS = "winograd columns"
    ROWS = "winograd rows"
    TILES = "winograd tiles"
    DENSE = "dense"
    DENSE_COLUMNS = "dense winograd columns"
    DENSE_ROWS = "dense winograd rows"
    DENSE_TILES = "dense winograd tiles"

    @property
    def dense(self) -> bool:
        """Whether the weight is taken as if it had no zeros."""
        return self.value.startswith("dense")

    @property
    def transforms(self) -> str:
        """Which of Winograd's transforms the sums go through: columns, rows, tiles, or none, ""."""
        _, found, kind = self.value.rpartition("winograd ")
        return kind if found else ""


@dataclass(frozen=True)
class Choice:
    """What computes a layer, and why.

    Parameters
    ----------
    algorithm : Algorithm
        What was taken.
    milliseconds : dict of str to float
        What each way took when it was measured; empty where the rule decided.
    """

    algorithm: Algorithm
    milliseconds: dict[str, float] = field(default_factory=dict)

    @property
    def reason(self) -> str:
        """One phrase for a table."""
        if not self.milliseconds:
            return ""
        times = ", ".join(f"{name} {ms:.3g}" for name, ms in self.milliseconds.items())
        return f"measured, in ms: {times}"


def ways(node: Node, weight: Weight, target: Target, allow_winograd: bool) -> list[Algorithm]:
    """List the ways to compute a convolution, the stored form first.

    Parameters
    ----------
    node : Node
        A convolution.
    weight : Weight
        Its weight.
    target : Target
        What it runs on.
    allow_winograd : bool
        False leaves Winograd out.

    Returns
    -------
    list of Algorithm
        At least `Algorithm.DIRECT`. Taking a sparse weight as dense is only listed where its tiles
        are lower than those of a dense one: whole tiles of blocks cost per nonzero what dense
        weights cost.
    """
    kernel = (weight.shape[2], weight.shape[3])
    fits = allow_winograd and winograd.holds_padding(node, target)
    columns = fits and winograd.fits_columns(node, kernel)
    tiles = fits and winograd.fits_tiles(node, kernel)
    rows = allow_winograd and winograd.fits_rows(node, kernel)
    outputs = weight.shape[0]
    low = isinstance(weight, BsrWeight) and min(weight.block[0], outputs) < min(
        target.rows, outputs
    )
    packed = isinstance(weight, NMWeight)
    as_dense = node.attrs["groups"] == 1 and (low or packed)
    listed = {
        Algorithm.DIRECT: True,
        Algorithm.COLUMNS: columns and not packed,
        Algorithm.ROWS: rows and not packed,
        Algorithm.TILES: tiles and not packed,
        Algorithm.DENSE: as_dense,
        Algorithm.DENSE_COLUMNS: as_dense and columns,
        Algorithm.DENSE_ROWS: as_dense and rows,
        Algorithm.DENSE_TILES: as_dense and tiles,
    }
    return [way for way, possible in listed.items() if possible]


def layer_key(node: Node, weight: Weight, pooled: bool = False) -> str:
    """Name a layer by what its speed and its ways depend on: geometry, stored form, density.

    Times of one that is followed by a pool which tiles can take in have that pool in them.
    """
    if isinstance(weight, BsrWeight):
        stored = "bsr{}x{} {:.2f}".format(*weight.block, _reached(weight))
    elif isinstance(weight, NMWeight):
        stored = f"nm{weight.n}of{weight.m}"
    else:
        stored = "dense"
    geometry = [node.attrs[name] for name in ("stride", "padding", "dilation")]
    sizes = ["x".join(map(str, part)) for part in (weight.shape, node.shape, *geometry)]
    if node.attrs["groups"] > 1:
        sizes.append(f"{node.attrs['groups']} groups")
    pool = " pooled" if pooled else ""
    return f"{' '.join(sizes)} {stored} {weight.density:.2f}{pool}"


def _reached(weight: BsrWeight) -> float:
    """Share of the blocks of channels stored at any kernel position: those of Winograd's planes."""
    rows, per_row = len(weight.indptr) - 1, -(-weight.shape[1] // weight.block[1])
    reached = np.zeros((rows, per_row), bool)
    reached[np.repeat(np.arange(rows), np.diff(weight.indptr)), weight.indices % per_row] = True
    return float(reached.mean())


def work(node: Node, weight: Weight) -> float:
    """FLOPs of a layer for one image, zeros left out."""
    size = 2.0 * weight.density
    for length in (*weight.shape, *node.shape[1:]):
        size *= length
    return size


@cache
def _plan_sources() -> str:
    """Digest of what decides how the kernels are called: the modules beside this one."""
    code = [file.read_bytes() for file in sorted(Path(__file__).parent.glob("*.py"))]
    return hashlib.sha256(b"\0".join(code)).hexdigest()


class Memory:
    """What was measured on this machine, on disk.

    Parameters
    ----------
    target : Target
        The processor; another one has a file of its own, as has every version of this code.
    """

    def __init__(self, target: Target) -> None:
        # times of other code are not believed
        key = f"{describe(target)} {target.features} {sources()} {_plan_sources()}"
        digest = hashlib.sha256(key.encode()).hexdigest()
        self.path: Path = cache_folder() / f"layers-{digest[:16]}.json"

    def read(self) -> dict[str, dict[str, float]]:
        """Return milliseconds by layer and way; nothing where there is no readable file."""
        try:
            content = json.loads(self.path.read_text("utf-8"))
            return {
                str(key): {str(name): float(ms) for name, ms in times.items()}
                for key, times in content.items()
            }
        except (OSError, ValueError, AttributeError, TypeError):
            return {}

    def write(self, measured: Mapping[str, Mapping[str, float]]) -> None:
        """Add to what is there; a folder that cannot be written only costs time."""
        try:
            write_whole(self.path, json.dumps({**self.read(), **measured}, indent=1))
        except OSError as error:
            _log.warning("measured layers are not kept: cannot write %s (%s)", self.path, error)


class Algorithms:
    """The choice for every convolution of a model.

    Parameters
    ----------
    model : Model
        The network.
    target : Target
        What it runs on.
    allow_winograd : bool
        False leaves Winograd out.
    """

    def __init__(self, model: Model, target: Target, allow_winograd: bool = True) -> None:
        self._memory = Memory(target)
        self.allow_winograd = allow_winograd
        known = self._memory.read()
        self.choices: dict[str, Choice] = {}
        self.open: dict[str, list[Algorithm]] = {}
        self._keys: dict[str, str] = {}
        for node in model.graph.nodes:
            if node.op != "conv2d":
                continue
            weight = model.weights[node.name]
            listed = ways(node, weight, target, allow_winograd)
            if len(listed) == 1 or work(node, weight) < MEASURED_FLOPS:
                continue
            pooled = any(way.transforms == "tiles" for way in listed) and bool(
                winograd.pool_after(model.graph, node, target.lanes)
            )
            self._keys[node.name] = layer_key(node, weight, pooled)
            times = known.get(self._keys[node.name], {})
            if set(listed) <= set(times):
                self.choices[node.name] = _best({way: times[way] for way in listed})
            else:
                self.open[node.name] = listed

    def settle(self, milliseconds: Mapping[str, Mapping[Algorithm, float]]) -> None:
        """Choose for the open layers.

        Parameters
        ----------
        milliseconds : mapping
            By layer, the least that each of its ways took. Layers that look alike share the median.
        """
        alike: dict[str, list[Mapping[Algorithm, float]]] = {}
        for name, times in milliseconds.items():
            alike.setdefault(self._keys[name], []).append(times)
        # layers of one key have one entry on disk: choose now what will be chosen from there
        measured = {
            key: {way: median(times[way] for times in each) for way in each[0]}
            for key, each in alike.items()
        }
        for name in milliseconds:
            self.choices[name] = _best(measured[self._keys[name]])
        self.open = {}
        self._memory.write(
            {key: {str(way): ms for way, ms in times.items()} for key, times in measured.items()}
        )


def _best(times: Mapping[Algorithm, float]) -> Choice:
    best = Algorithm.DIRECT
    for way, ms in times.items():
        if ms < CLOSE * times[best]:
            best = way
    return Choice(best, {str(way): ms for way, ms in times.items()})
