"""A model file made callable."""

from __future__ import annotations

import logging
import os
from typing import Literal, Protocol

import numpy as np
import numpy.typing as npt

from blocksparse.format import Model, check_model, read
from blocksparse.runtime import reference
from blocksparse.runtime.explain import Explanation, LayerChoice
from blocksparse.runtime.limits import usable_cores

_FLOAT32 = np.dtype(np.float32)

_log = logging.getLogger(__name__)

MOST_THREADS = 256
"""Threads a call may use, or one per core where there are more: on two cores one with 10,000 took
20 seconds."""

EngineName = Literal["auto", "compiled", "reference"]


class Engine(Protocol):
    """What runs a model."""

    def run(self, x: npt.NDArray[np.float32], threads: int) -> npt.NDArray[np.float32]:
        """Run a batch of at least one image."""

    def choices(self) -> list[LayerChoice]:
        """Say what runs each node, and why."""

    def close(self) -> None:
        """Let go of plans, the memory of calls and threads."""


class ReferenceEngine:
    """Runs a model in plain NumPy, one thread.

    Parameters
    ----------
    model : Model
        A checked model.
    reason : str
        Why this engine and not the compiled one.
    """

    def __init__(self, model: Model, reason: str) -> None:
        self.model = model
        self.reason = reason

    def __str__(self) -> str:
        return f"reference engine: NumPy, {self.reason}"

    def run(self, x: npt.NDArray[np.float32], threads: int) -> npt.NDArray[np.float32]:
        """Run a batch; `threads` makes no difference here."""
        return reference.run(self.model, x)

    def choices(self) -> list[LayerChoice]:
        """Say what runs each node, and why."""
        rows = []
        for node in self.model.graph.nodes:
            weight = self.model.weights.get(node.name)
            density = None if weight is None else weight.density
            rows.append(
                LayerChoice(
                    node.name, node.op, node.shape, density, f"numpy_{node.op}", self.reason
                )
            )
        return rows

    def close(self) -> None:
        """Nothing is held."""


class Network:
    """A model that can be called, from several Python threads at once; made by :func:`load`.

    It can be pickled, with the whole model, for other processes.

    Parameters
    ----------
    model : Model
        One that was checked.
    engine : Engine
        What runs it.
    threads : int
        Threads a call may use.
    """

    def __init__(self, model: Model, engine: Engine, threads: int) -> None:
        self.model = model
        self.engine = engine
        self.threads = threads
        self._input_shape = model.input_shape  # looked up once, not in every call

    @property
    def threads(self) -> int:
        """Threads a call may use; may be set."""
        return self._threads

    @threads.setter
    def threads(self, count: int) -> None:
        most = max(MOST_THREADS, usable_cores())
        if type(count) is not int or not 1 <= count <= most:
            raise ValueError(f"threads must be an integer of 1 to {most}, is {count!r}")
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
        if x.shape[1:] != self._input_shape:
            wanted = ", ".join(map(str, self.input_shape))
            raise ValueError(f"input must have shape (N, {wanted}), has {x.shape}")
        if x.dtype != _FLOAT32:
            raise ValueError(f"input must be float32, is {x.dtype}; use x.astype(np.float32)")
        if len(x) == 0:
            return np.empty((0, *self.output_shape), np.float32)
        return self.engine.run(x, self._threads)

    def warmup(self, batch: int = 1) -> None:
        """Do now what the first call with `batch` images would do once.

        Raises
        ------
        ValueError
            If it is none.
        """
        if type(batch) is not int or batch < 1:
            raise ValueError(f"batch must be an integer of at least 1, is {batch!r}")
        self(np.zeros((batch, *self.input_shape), np.float32))

    def explain(self) -> Explanation:
        """Say what runs each node, and why."""
        return Explanation(str(self.engine), self.engine.choices())

    def close(self) -> None:
        """Let go of plans, the memory of calls and helper threads; the next call makes them again.

        Prepared weights stay as long as the network.
        """
        self.engine.close()


def load(
    source: str | os.PathLike[str] | Model,
    threads: int | None = None,
    engine: EngineName = "auto",
    winograd: bool = True,
) -> Network:
    """Make a model callable.

    Parameters
    ----------
    source : path-like or Model
        A model file, or a model in memory.
    threads : int, optional
        Threads a call may use; by default one per core it may use: those of its affinity
        mask, or fewer where a container has a quota of processor time.
    engine : {"auto", "compiled", "reference"}
        ``"compiled"`` is the fast one; ``"reference"`` is NumPy alone; ``"auto"`` is the first of
        the two that can run here, and says so in the log where that is the second. What is tried
        are the loops; a layer's kernel that cannot be compiled is an error of the first call.
    winograd : bool
        Whether convolutions of 3, 5 or 7 taps may go through Winograd's transforms where that was
        measured to be faster. False keeps to direct sums: slower, with smaller rounding errors.

    Returns
    -------
    Network

    Raises
    ------
    FormatError
        Where the file or model breaks a rule of the format.
    FileNotFoundError
        Where there is no such file.
    ValueError
        Where an argument is none of those above.
    """
    if engine not in ("auto", "compiled", "reference"):
        raise ValueError(f"engine must be 'auto', 'compiled' or 'reference', is {engine!r}")
    if type(winograd) is not bool:
        raise ValueError(f"winograd must be True or False, is {winograd!r}")
    if isinstance(source, Model):
        check_model(source)
        model = source
    else:
        model = read(source)
    return Network(
        model, _engine(model, engine, winograd), usable_cores() if threads is None else threads
    )


def _engine(model: Model, name: EngineName, winograd: bool) -> Engine:
    if name == "reference":
        return ReferenceEngine(model, "as asked")
    try:
        if os.environ.get("NUMBA_DISABLE_JIT", "0") not in ("", "0"):
            raise RuntimeError("NUMBA_DISABLE_JIT is set")
        from blocksparse.runtime.compiled import CompiledEngine

        return CompiledEngine(model, winograd)
    except (ImportError, OSError, RuntimeError) as error:
        if name == "compiled":
            raise RuntimeError(
                f"the compiled engine cannot run here: {error}; use engine='reference', which is "
                "slow but needs only NumPy"
            ) from error
        _log.warning("running in NumPy, slowly: %s", error)
        return ReferenceEngine(model, f"because the compiled engine cannot run here: {error}")
