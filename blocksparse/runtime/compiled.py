"""The compiled engine: plans by batch size, memory by call, helper threads."""

from __future__ import annotations

import threading
from collections import OrderedDict

import numpy as np
import numpy.typing as npt

from blocksparse.format import BsrWeight, Model, NMWeight, Node, Weight

from .explain import LayerChoice
from .helpers import Helpers
from .kernels import program, records
from .kernels.target import describe, host
from .plan import Plan, bind
from .steps import Step, Steps, lower

PLANS = 4
"""Batch sizes kept ready; the one used longest ago is dropped."""

_CACHE_LINE = 64


class _Memory:
    """What one call writes to: values and counters. Calls at the same time have one each."""

    def __init__(self, plan: Plan) -> None:
        # zeroed once: lanes beyond an image are computed on, and must not hold signalling garbage
        raw = np.zeros(plan.floats + _CACHE_LINE // 4, np.float32)
        skip = -raw.ctypes.data % _CACHE_LINE // 4
        self.values = raw[skip : skip + plan.floats]
        counters = np.zeros(plan.counters + _CACHE_LINE // 8, np.int64)
        skip = -counters.ctypes.data % _CACHE_LINE // 8
        self.counters = counters[skip : skip + plan.counters]


class _Ready:
    """A plan with the memories that are not in use."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.free: list[_Memory] = []


class CompiledEngine:
    """Runs a model through the compiled kernels.

    Parameters
    ----------
    model : Model
        A checked model.
    """

    def __init__(self, model: Model) -> None:
        self.model = model
        self.target = host()
        self.steps: Steps = lower(model, self.target)
        self._ready: OrderedDict[int, _Ready] = OrderedDict()
        self._lock = threading.Lock()
        self._binding = threading.Lock()
        self._helpers = Helpers()

    def __str__(self) -> str:
        return f"compiled engine: {describe(self.target)}"

    def choices(self) -> list[LayerChoice]:
        """Say what runs each node, and why."""
        steps: dict[str, list[Step]] = {}
        for step in self.steps.steps:
            if step.op not in (records.LOAD, records.STORE):
                steps.setdefault(step.node.name, []).append(step)
        rows = []
        for node in self.model.graph.nodes:
            weight = self.model.weights.get(node.name)
            kernel, reason = _choice(node, steps.get(node.name, []), weight)
            density = None if weight is None else weight.density
            rows.append(LayerChoice(node.name, node.op, node.shape, density, kernel, reason))
        return rows

    def run(self, x: npt.NDArray[np.float32], threads: int) -> npt.NDArray[np.float32]:
        """Run a batch.

        Parameters
        ----------
        x : ndarray of float32, shape (N, C, H, W)
            N at least 1.
        threads : int
            Threads to use, this one included.

        Returns
        -------
        ndarray of float32, shape (N, classes)
        """
        batch = len(x)
        ready = self._plan(batch)
        with self._lock:
            memory = ready.free.pop() if ready.free else None
        memory = memory or _Memory(ready.plan)
        output = np.empty((batch, *self.model.output_shape), np.float32)
        plan = ready.plan
        memory.counters[:] = 0
        # read-only arrays are another type to Numba, which would compile everything once more
        images = np.require(x, np.float32, ["C", "W"])
        arguments = (
            plan.records, plan.integers, plan.vectors, memory.values, memory.values.ctypes.data,
            memory.counters.ctypes.data, images.reshape(-1), output.reshape(-1), batch,
        )  # fmt: skip
        helpers = self._helpers.start(threads - 1, program.run, *arguments)
        try:
            program.run(*arguments)
        finally:
            # A helper that has not started is not needed any more; one that has is about to end,
            # and must have left memory and counters before they are used again or given back.
            for helper in helpers:
                if not helper.cancel():
                    helper.result()
        with self._lock:
            ready.free.append(memory)
        return output

    def close(self) -> None:
        """Drop plans and memory, end the helper threads."""
        with self._lock:
            self._ready.clear()
        self._helpers.close()

    def _plan(self, batch: int) -> _Ready:
        ready = self._look_up(batch)
        if ready is None:
            with self._binding:  # one plan at a time; calls whose plan is ready go on meanwhile
                ready = self._look_up(batch)
                if ready is None:
                    ready = _Ready(bind(self.model, self.steps, self.target, batch))
                    with self._lock:
                        self._ready[batch] = ready
                        while len(self._ready) > PLANS:
                            self._ready.popitem(last=False)
        return ready

    def _look_up(self, batch: int) -> _Ready | None:
        with self._lock:
            if batch in self._ready:
                self._ready.move_to_end(batch)
            return self._ready.get(batch)


def _choice(node: Node, steps: list[Step], weight: Weight | None) -> tuple[str, str]:
    """Name the kernel of a node and say why it was chosen."""
    if not steps:
        return "none", "its parts are written in place"
    copies = sum(step.op == records.COPY for step in steps)
    product = next((step for step in steps if step.packed is not None), None)
    if product is None or product.packed is None:
        kind = "copy" if copies == len(steps) else node.op
        return (
            f"f32_{kind}",
            f"{copies} of its parts copied" if node.op == "concat" else "no weight",
        )
    tile = f"in tiles of {product.packed.rows} outputs by {product.packed.columns} inputs"
    if isinstance(weight, NMWeight):
        pattern, reason = (
            f"nm{weight.n}of{weight.m}",
            f"packed {weight.n}:{weight.m}, read as it is",
        )
    elif isinstance(weight, BsrWeight):
        r, c = weight.block
        pattern, reason = f"bsr{r}x{c}", f"{len(weight.indices)} blocks stored, {tile}"
    else:
        pattern, reason = "dense", f"stored dense, {tile}"
    if copies:
        reason += "; input split into phase planes for its stride"
    if product is not steps[-1]:
        reason += f"; then {node.attrs['activation']} in place"
    op = node.op.removesuffix("2d")
    return f"f32_{pattern}_{op}_{node.attrs['activation']}", reason
