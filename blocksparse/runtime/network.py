"""A model file made callable."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from blocksparse.format import Model, check_model, read
from blocksparse.runtime import reference

Engine = Literal["auto", "compiled", "reference"]


@dataclass(frozen=True)
class LayerChoice:
    """What runs one node, and why.

    Parameters
    ----------
    name, op : str
    shape : tuple of int
        Shape of the node's value, batch axis excluded.
    density : float or None
        Stored over dense size of the weight; None for a node without one.
    kernel : str
    reason : str
    """

    name: str
    op: str
    shape: tuple[int, ...]
    density: float | None
    kernel: str
    reason: str


@dataclass(frozen=True)
class Explanation:
    """One row per node of the graph, in execution order; ``str()`` is a table."""

    rows: list[LayerChoice]

    def __str__(self) -> str:
        cells = [("layer", "op", "shape", "density", "kernel", "reason")]
        for row in self.rows:
            density = "" if row.density is None else f"{row.density:.3f}"
            shape = "x".join(map(str, row.shape))
            cells.append((row.name, row.op, shape, density, row.kernel, row.reason))
        widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
        lines = (
            "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True))
            for line in cells
        )
        return "\n".join(line.rstrip() for line in lines)


class Network:
    """A model that can be called; made by :func:`load`.

    Parameters
    ----------
    model : Model
        One that was checked.
    threads : int
        Threads a call may use.
    """

    engine: Engine = "reference"

    def __init__(self, model: Model, threads: int) -> None:
        self.model = model
        self.threads = threads

    @property
    def threads(self) -> int:
        """Threads a call may use; may be set."""
        return self._threads

    @threads.setter
    def threads(self, count: int) -> None:
        if type(count) is not int or count < 1:
            raise ValueError(f"threads must be an integer of at least 1, is {count!r}")
        self._threads = count

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Shape of one image, (C, H, W)."""
        return self.model.input_shape

    @property
    def output_shape(self) -> tuple[int, ...]:
        """Shape of the output for one image, (classes,)."""
        return self.model.output_shape

    def __call__(self, x: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        """Run the network.

        Parameters
        ----------
        x : ndarray of float32, shape (N, C, H, W)
            N may be 0.

        Returns
        -------
        ndarray of float32, shape (N, classes)

        Raises
        ------
        ValueError
            Where shape or dtype is another, with the expected and the given one.
        """
        x = np.asarray(x)
        if x.shape[1:] != self.input_shape or x.ndim != len(self.input_shape) + 1:
            wanted = ", ".join(map(str, self.input_shape))
            raise ValueError(f"input must have shape (N, {wanted}), has {x.shape}")
        if x.dtype != np.float32:
            raise ValueError(f"input must be float32, is {x.dtype}; use x.astype(np.float32)")
        return reference.run(self.model, x)

    def warmup(self, batch: int = 1) -> None:
        """Do now what the first call with `batch` images would do once."""
        self(np.zeros((batch, *self.input_shape), np.float32))

    def explain(self) -> Explanation:
        """Say what runs each node, and why."""
        rows = []
        for node in self.model.graph.nodes:
            weight = self.model.weights.get(node.name)
            density = None if weight is None else weight.density
            kernel = f"numpy_{node.op}"
            rows.append(
                LayerChoice(node.name, node.op, node.shape, density, kernel, "reference engine")
            )
        return Explanation(rows)

    def close(self) -> None:
        """Let go of what the network holds besides its model."""


def load(
    source: str | os.PathLike[str] | Model,
    threads: int | None = None,
    engine: Engine = "auto",
) -> Network:
    """Make a model callable.

    Parameters
    ----------
    source : path-like or Model
        A model file, or a model in memory.
    threads : int, optional
        Threads a call may use; by default one per processor this process may run on.
    engine : {"auto", "compiled", "reference"}
        ``"reference"`` is NumPy alone; ``"auto"`` is the fastest there is.

    Returns
    -------
    Network

    Raises
    ------
    FormatError
        Where the file or model breaks a rule of the format.
    FileNotFoundError
        Where there is no such file.
    """
    if engine not in ("auto", "reference"):
        raise ValueError(f"engine must be 'auto' or 'reference', is {engine!r}")
    if isinstance(source, Model):
        check_model(source)
        model = source
    else:
        model = read(source)
    return Network(model, _processors() if threads is None else threads)


def _processors() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
