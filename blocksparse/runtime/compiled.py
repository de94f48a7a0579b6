"""The compiled engine: plans by batch size, memory by call, helper threads."""

from __future__ import annotations

import ctypes
import logging
import time
from collections import OrderedDict
from functools import reduce

import numpy as np
import numpy.typing as npt

from blocksparse.format import Model

from .algorithms import Algorithms
from .batches import divide, images_in_cache
from .calls import CallMemory
from .choices import choice_of
from .explain import LayerChoice
from .halves import halve
from .helpers import Helpers
from .kernels import loops, records
from .kernels.target import describe, host
from .locks import Lock
from .pieces import Piece, Pieces, cut
from .plan import Plan, bind
from .step import Step, Steps
from .steps import Packs, lower
from .streams import Streams
from .trace import CLOCK, Trace, blank_times, side_by_side, trace

PLANS = 12
"""Plans kept ready, by batch size and piece; the one used longest ago is dropped. A call with
several images needs up to four."""

ROUNDS, SECONDS = 5, 1.0
"""Timed runs of the network for every way to compute a layer, at least, and how long to go on.

Small networks have more rounds so: beside another program that held a core, the least of five was
that of slow runs, and a ResNet-50 at 75 % kept ways that cost it 4 %.
"""

MOST_IMAGES = 8
"""Images of such a run: more cost time and change little."""

_Key = tuple[int, bool, Piece]
"""What a plan is for: how many images, whether they are in halves, what of the network."""

_log = logging.getLogger(__name__)


class _Ready:
    """A plan with the memories that are not in use."""

    def __init__(self, key: _Key, plan: Plan) -> None:
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
        self._in_cache = images_in_cache(model.graph)
        self.algorithms = Algorithms(model, self.target, winograd)
        # layers that have to be measured first are lowered by the first call, when it is known
        # how many images it has
        self._pieces: Pieces | None = None if self.algorithms.open else cut(self._lowered({}))
        self._ready: OrderedDict[_Key, _Ready] = OrderedDict()
        self._recent: _Ready | None = None  # the one used last
        self._lock = Lock()
        self._binding = Lock()
        self._helpers = Helpers()
        self._streams = Streams()
        # Python's lock is not held while they run
        integers = [ctypes.c_int64] * 3
        self._loops = ctypes.CFUNCTYPE(ctypes.c_int, *integers)(loops.address(loops.PROGRAM))

    def __str__(self) -> str:
        return f"compiled engine: {describe(self.target)}"

    def __reduce__(self) -> tuple[type[CompiledEngine], tuple[Model, bool]]:
        """Pickle and copy what it was made from; plans, locks and threads belong to a process."""
        return type(self), (self.model, self.algorithms.allow_winograd)

    @property
    def steps(self) -> Steps:
        """The network as steps; before the first call some may still become others."""
        return self._lowered({}) if self._pieces is None else self._pieces.steps[Piece.ALL]

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
        if len(x) == 1:  # nothing around a single image that need not be
            return self._run(x, threads, None)
        return self._divided(x, threads, None)

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
        traces: list[list[Trace]] = [[] for _ in range(threads + 1)]
        output = self._divided(x, threads, traces)
        shared, *own = traces
        return output, reduce(Trace.__add__, [*shared, *side_by_side(own)])

    def _divided(
        self, x: npt.NDArray[np.float32], threads: int, traces: list[list[Trace]] | None
    ) -> npt.NDArray[np.float32]:
        """Run a batch in parts; traces are of those for all threads, and of those for each."""
        own, shared = divide(len(x), self._in_cache, threads)
        together = None if traces is None else traces[0]
        if len(own) + len(shared) == 1:
            return self._part(x, threads, together, Piece.ALL)
        first, threads_of_first = (own[0], 1) if own else (shared[0], threads)
        pieces = self._settled(first.stop - first.start, threads_of_first)
        piece = Piece.BACKBONE if pieces.has_head else Piece.ALL
        steps = pieces.steps[piece]
        values = np.empty((len(x), *steps.shapes[steps.output]), np.float32)
        if own:

            def take(part: slice, thread: int) -> None:
                alone = None if traces is None else traces[thread + 1]
                values[part] = self._part(x[part], 1, alone, piece)

            self._streams.run(take, own, threads)
        for part in shared:
            values[part] = self._part(x[part], threads, together, piece)
        return self._part(values, threads, together, Piece.HEAD) if pieces.has_head else values

    def _part(
        self,
        x: npt.NDArray[np.float32],
        threads: int,
        traces: list[Trace] | None,
        piece: Piece,
    ) -> npt.NDArray[np.float32]:
        if traces is None:
            return self._run(x, threads, None, piece)
        plan = self._plan(len(x), threads, piece).plan
        times = blank_times(len(plan.records), threads)
        output = self._run(x, threads, times, piece)
        traces.append(trace(self.steps.steps, plan.origins, times))
        return output

    def _run(
        self,
        x: npt.NDArray[np.float32],
        threads: int,
        times: list[npt.NDArray[np.int64]] | None,
        piece: Piece = Piece.ALL,
    ) -> npt.NDArray[np.float32]:
        # What Python does here and below takes some 15 times as long between two runs of a large
        # network, which leave nothing of it in the caches, as again and again
        ready = self._plan(len(x), threads, piece)
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
        self._streams.close()

    def _plan(self, batch: int, threads: int, piece: Piece = Piece.ALL) -> _Ready:
        key = (batch, in_halves(batch, threads), piece)
        ready = self._recent
        if ready is not None and ready.key == key:
            return ready
        ready = self._look_up(key)
        if ready is None:
            steps = self._settled(batch, threads).steps[piece]
            with self._binding:  # one plan at a time; calls whose plan is ready go on meanwhile
                ready = self._look_up(key)
                if ready is None:
                    ready = _Ready(key, self._bound(steps, batch, threads))
                    with self._lock:
                        self._ready[key] = ready
                        while len(self._ready) > PLANS:
                            self._ready.popitem(last=False)
        self._recent = ready
        return ready

    def _settled(self, batch: int, threads: int) -> Pieces:
        """Return the steps; the first call measures open layers with so many images."""
        if self._pieces is None:
            with self._binding:
                if self._pieces is None:
                    self._pieces = cut(self._measured(batch, threads))
        return self._pieces

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

    def _look_up(self, key: _Key) -> _Ready | None:
        with self._lock:
            if key in self._ready:
                self._ready.move_to_end(key)
            return self._ready.get(key)


def in_halves(batch: int, threads: int) -> bool:
    """Whether threads share one image, which then goes in halves.

    One thread alone would be slower so: ResNet-50 at 75 % takes 1.06 times as long.
    """
    return batch == 1 and threads > 1
