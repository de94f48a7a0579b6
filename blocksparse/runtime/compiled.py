"""The compiled engine: plans by batch size, memory by call, helper threads."""

from __future__ import annotations

import ctypes
import logging
import time
from collections import OrderedDict

import numpy as np
import numpy.typing as npt

from blocksparse.format import Model

from .algorithms import Algorithms
from .calls import CallMemory
from .choices import choice_of
from .explain import LayerChoice
from .halves import halve
from .helpers import Helpers
from .kernels import loops, records
from .kernels.target import describe, host
from .locks import Lock
from .plan import Plan, bind
from .step import Step, Steps
from .steps import Packs, lower
from .trace import CLOCK, Trace, blank_times, trace

PLANS = 4
"""Plans kept ready, by batch size; the one used longest ago is dropped."""

ROUNDS, SECONDS = 5, 1.0
"""Timed runs of the network for every way to compute a layer, at least, and how long to go on.

Small networks have more rounds so: beside another program that held a core, the least of five was
that of slow runs, and a ResNet-50 at 75 % kept ways that cost it 4 %.
"""

MOST_IMAGES = 8
"""Images of such a run: more cost time and change little."""

_log = logging.getLogger(__name__)


class _Ready:
    """A plan with the memories that are not in use."""

    def __init__(self, key: tuple[int, bool], plan: Plan) -> None:
        self.key = key
        self.plan = plan
        self.free: list[CallMemory] = []


class CompiledEngine:
    """Runs a model through the compiled kernels.

    Parameters
    ----------
    model : Model
        A checked model.
    winograd : bool
        Whether convolutions may go through Winograd's transforms.
    """

    def __init__(self, model: Model, winograd: bool = True) -> None:
        self.model = model
        self.target = host()
        self.algorithms = Algorithms(model, self.target, winograd)
        # layers that have to be measured first are lowered by the first call, when it is known
        # how many images it has
        self._steps: Steps | None = None if self.algorithms.open else self._lowered({})
        self._ready: OrderedDict[tuple[int, bool], _Ready] = OrderedDict()
        self._recent: _Ready | None = None  # the one used last
        self._lock = Lock()
        self._binding = Lock()
        self._helpers = Helpers()
        # Python's lock is not held while they run
        integers = [ctypes.c_int64] * 3
        self._loops = ctypes.CFUNCTYPE(ctypes.c_int, *integers)(loops.address(loops.PROGRAM))

    def __str__(self) -> str:
        return f"compiled engine: {describe(self.target)}"

    @property
    def steps(self) -> Steps:
        """The network as steps; before the first call some may still become others."""
        return self._lowered({}) if self._steps is None else self._steps

    def _lowered(self, packs: Packs, trial: int | None = None) -> Steps:
        """Lower the model; in a trial, every open layer takes the way of that number."""
        ways = {name: choice.algorithm for name, choice in self.algorithms.choices.items()}
        if trial is not None:
            ways |= {n: w[min(trial, len(w) - 1)] for n, w in self.algorithms.open.items()}
        return lower(self.model, self.target, ways, self.algorithms.allow_winograd, packs)

    def choices(self) -> list[LayerChoice]:
        """Say what runs each node, and why."""
        steps: dict[str, list[Step]] = {}
        for step in self.steps.steps:
            if step.op not in (records.LOAD, records.STORE):
                steps.setdefault(step.node.name, []).append(step)
        rows = []
        for node in self.model.graph.nodes:
            weight = self.model.weights.get(node.name)
            chosen = self.algorithms.choices.get(node.name)
            measured = "" if chosen is None else chosen.reason
            kernel, reason = choice_of(node, steps.get(node.name, []), weight, measured)
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
        return self._run(x, threads, None)

    def timed_run(
        self, x: npt.NDArray[np.float32], threads: int
    ) -> tuple[npt.NDArray[np.float32], Trace]:
        """Run a batch and say where the time went; the parameters are those of `run`.

        Raises
        ------
        RuntimeError
            On systems without a POSIX clock, where compiled code cannot tell the time.
        """
        if not CLOCK:
            raise RuntimeError("steps cannot be timed here: the system has no POSIX clock")
        plan = self._plan(len(x), threads).plan
        times = blank_times(len(plan.records), threads)
        output = self._run(x, threads, times)
        return output, trace(self.steps.steps, plan.origins, times)

    def _run(
        self,
        x: npt.NDArray[np.float32],
        threads: int,
        times: list[npt.NDArray[np.int64]] | None,
    ) -> npt.NDArray[np.float32]:
        # What Python does here and below takes some 15 times as long between two runs of a large
        # network, which leave nothing of it in the caches, as again and again
        ready = self._plan(len(x), threads)
        try:
            memory = ready.free.pop()
        except IndexError:  # other calls have them
            memory = CallMemory(ready.plan, self._helpers.pending)
        output = self._execute(memory, x, threads, times)
        ready.free.append(memory)
        return output

    def _execute(
        self,
        memory: CallMemory,
        x: npt.NDArray[np.float32],
        threads: int,
        times: list[npt.NDArray[np.int64]] | None,
    ) -> npt.NDArray[np.float32]:
        """Run the plan of a memory; threads note their times, where there is a place for them."""
        images = np.ascontiguousarray(x)
        output = np.empty(memory.plan.outputs, np.float32)
        record, number = memory.call(images, output, threads, times)
        at, _ = record.buffer_info()
        if threads > 1:
            missing = memory.missing(threads)
            if missing:
                self._helpers.start(self._help, missing, at, number, (memory, record))
        if self._loops(at, 0, number) != 0:
            raise RuntimeError("the compiled loops stopped at an error: this is a defect of them")
        memory.given = ()
        return output

    def _help(self, thread: int, at: int, number: int, kept: tuple[object, ...]) -> None:
        """Run the program as a helper; `kept` is what it reads, if the caller was interrupted."""
        self._loops(at, thread, number)

    def close(self) -> None:
        """Drop plans and the memory of calls, end the helper threads; packed weights stay."""
        with self._lock:
            self._ready.clear()
            self._recent = None
        self._helpers.close()

    def _plan(self, batch: int, threads: int) -> _Ready:
        key = (batch, in_halves(batch, threads))
        ready = self._recent
        if ready is not None and ready.key == key:
            return ready
        ready = self._look_up(key)
        if ready is None:
            with self._binding:  # one plan at a time; calls whose plan is ready go on meanwhile
                ready = self._look_up(key)
                if ready is None:
                    if self._steps is None:
                        self._steps = self._measured(batch, threads)
                    ready = _Ready(key, self._bound(self._steps, batch, threads))
                    with self._lock:
                        self._ready[key] = ready
                        while len(self._ready) > PLANS:
                            self._ready.popitem(last=False)
        self._recent = ready
        return ready

    def _measured(self, batch: int, threads: int) -> Steps:
        """Run the network some times for every way its open layers have; choose, lower again."""
        batch = min(batch, MOST_IMAGES)
        packs: Packs = {}
        layers = self.algorithms.open
        if CLOCK:
            _log.info("measuring %d layers, once on this machine", len(layers))
            trials = []
            for number in range(max(map(len, layers.values()))):
                steps = self._lowered(packs, number)
                plan = self._bound(steps, batch, threads)
                trials.append((steps, CallMemory(plan, self._helpers.pending)))
            shape = (batch, *self.model.input_shape)
            x = np.random.default_rng(0).standard_normal(shape, np.float32)
            taken: list[list[dict[str, float]]] = [[] for _ in trials]
            end = time.monotonic() + SECONDS
            while len(taken[-1]) <= ROUNDS or time.monotonic() < end:
                for (steps, memory), rounds in zip(trials, taken, strict=True):
                    times = blank_times(len(memory.plan.records), threads)
                    self._execute(memory, x, threads, times)
                    rounds.append(trace(steps.steps, memory.plan.origins, times).by_node())
            self.algorithms.settle(
                {
                    name: {
                        way: min(round_[name] for round_ in taken[number][1:])
                        for number, way in enumerate(ways)
                    }
                    for name, ways in layers.items()
                }
            )
        return self._lowered(packs)

    def _bound(self, steps: Steps, batch: int, threads: int) -> Plan:
        """Prepare steps for a batch size; a single image goes in halves if threads share it."""
        if in_halves(batch, threads):
            steps = halve(self.model, steps)
        return bind(self.model, steps, self.target, batch)

    def _look_up(self, key: tuple[int, bool]) -> _Ready | None:
        with self._lock:
            if key in self._ready:
                self._ready.move_to_end(key)
            return self._ready.get(key)


def in_halves(batch: int, threads: int) -> bool:
    """Whether threads share one image, which then goes in halves.

    One thread alone would be slower so: ResNet-50 at 75 % takes 1.06 times as long.
    """
    return batch == 1 and threads > 1
