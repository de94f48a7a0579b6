"""One image in halves: the upper rows of a feature map for one thread, the lower for another.

Each half has memory of its own, in which one thread writes and the other reads next to nothing. Two
threads that share planes, or places in memory that were another value's before, take lines of cache
from each other all the time: a processor writes into a line only when no other core has it.

Every step becomes two that run at the same time, each an ordinary step on a smaller image. What a
window reads beyond its half, a few rows that the other thread has computed, is copied before, into
the place where padding would be. A value that has too few rows, or that a step wants in one piece,
stays whole, and so does all that it must agree with.

Two threads on cores that lie far apart (see docs/kernels.md) took 13.4 ms in place of 16.1 for
ResNet-50 at 90 % sparsity, 18.7 in place of 20.2 at 75 %; near each other within 2 % of as long.
"""

# H rows of a value, S rows of its upper half

from __future__ import annotations

from dataclasses import replace
from typing import Any

from blocksparse.format import Model

from . import layout
from .kernels import records
from .step import Place, Rows, Step, Steps
from .windows import FAST_WINDOW, window_of

LEAST_ROWS = 20
"""A value of fewer rows stays whole. Halves of 7 rows leave lanes empty: on cores that lie near
each other ResNet-50 at 75 % took 1.03 times as long with them as without.
"""

_NAMES = ("upper", "lower")


def halve(model: Model, steps: Steps) -> Steps:
    """Cut the steps of a network in halves, for one image.

    Parameters
    ----------
    model : Model
        Gives kernel sizes.
    steps : Steps
        The network, as `steps.lower` returns it.

    Returns
    -------
    Steps
        The halves of a step lie one behind the other. Values in halves have names of their own.
    """
    return _Halving(model, steps).run()


class _Halving:
    def __init__(self, model: Model, steps: Steps) -> None:
        self.model, self.whole = model, steps
        self.windows = {step: window_of(model, step) for step in steps.steps}
        self.rows = {
            name: _cut(shape[1]) for name, shape in steps.shapes.items() if len(shape) == 3
        }
        for step in steps.steps:
            if step.packed is not None and layout.is_phases(step.source, step.node):
                self.rows[step.source] = self._read_by_both(step)
        self.halved = self._halved()
        for name in self.rows.keys() - self.halved:
            self.rows[name] = _cut(steps.shapes[name][1])
        self.halos = self._halos()
        self.steps: list[Step] = []
        self.origins: list[int] = []

    def run(self) -> Steps:
        whole = self.whole
        shapes, frames, places = dict(whole.shapes), dict(whole.frames), dict(whole.places)
        halves: dict[str, int] = {}
        smaller = self._frames()
        for name in self.halved:
            channels, _, width = whole.shapes[name]
            for half, rows in enumerate(self.rows[name]):
                own, place = _half(name, half), whole.places[name]
                shapes[own] = (channels, len(rows), width)
                frames[own] = smaller[name]
                places[own] = Place(_half(place.owner, half), place.channel)
                halves[own] = half
        for step in filter(self._is_mean, whole.steps):
            for half in (0, 1):
                own = _half(step.target, half)
                shapes[own], frames[own] = shapes[step.target], frames[step.target]
                places[own], halves[own] = Place(own), half
        waiting = {name: halo for name, halo in self.halos.items() if any(halo)}
        for number, step in enumerate(whole.steps):
            if any(self._beyond(step)) and step.source in waiting:
                self._exchange(step, waiting.pop(step.source))
            if step.target in self.halved:
                self.steps += [self._half_step(step, half) for half in (0, 1)]
            elif self._is_mean(step):
                self.steps += self._mean(step)
            else:
                self.steps.append(self._joining(step))
            self.origins += [number] * (len(self.steps) - len(self.origins))
        origins = (
            [whole.origins[number] for number in self.origins] if whole.origins else self.origins
        )
        return replace(
            whole, steps=self.steps, shapes=shapes, frames=frames, places=places, halves=halves,
            origins=origins,
        )  # fmt: skip

    def _computed(self, step: Step, half: int) -> range:
        """Rows that half a step computes: its target's, or what the pool it takes in reads."""
        rows = self.rows[step.target][half]
        if step.details.get("pools"):
            height = step.node.shape[1]
            return range(2 * rows.start, height if half else 2 * rows.stop)
        return rows

    def _read_by_both(self, step: Step) -> tuple[range, range]:
        """Rows of phase planes, which nobody else reads: both halves hold what both need."""
        window = self.windows[step]
        return window.read(self._computed(step, 0)), window.read(self._computed(step, 1))

    def _reads_around(self, step: Step) -> bool:
        """Whether a step may read rows around the half it computes; an adaptive pool takes both."""
        return (
            step.source in self.rows
            and step.target in self.rows
            and step.op != records.ADAPTIVE_POOL
        )

    def _beyond(self, step: Step) -> tuple[int, int]:
        """Rows a step reads below its upper half and above its lower one."""
        if not self._reads_around(step):
            return 0, 0
        own = self.rows[step.source]
        upper, lower = (self.windows[step].read(self._computed(step, half)) for half in (0, 1))
        height = self.whole.shapes[step.source][1]
        return (
            max(0, min(upper.stop, height) - own[0].stop),
            max(0, own[1].start - max(lower.start, 0)),
        )

    def _halved(self) -> set[str]:
        """Names of the values that are cut."""
        shapes, steps = self.whole.shapes, self.whole.steps
        alike = [[name, self.whole.places[name].owner] for name in self.rows]
        whole: set[str] = {name for name in self.rows if shapes[name][1] < LEAST_ROWS}
        joins = []
        for step in steps:
            values = (step.source, step.target, step.other)
            names = {name for name in values if name in self.rows}
            if step.op == records.ADAPTIVE_POOL:
                whole |= names - {step.source}
                continue
            if self._may_join(step) and not self._wants_whole(step):
                joins.append(step)
                continue
            if step.details.get("function") == "gate":
                whole |= names - {step.source, step.target}
                names &= {step.source, step.target}
            if self._wants_whole(step):
                whole |= names
            alike.append(list(names))
        while True:
            more = {name for names in alike if whole & set(names) for name in names}
            more |= {step.target for step in joins if step.source in whole}
            more -= whole
            if not more:
                return self.rows.keys() - whole
            whole |= more

    def _may_join(self, step: Step) -> bool:
        """Whether a step may read two halves and write one piece."""
        return step.op == records.POOL or layout.is_phases(step.target, step.node)

    def _wants_whole(self, step: Step) -> bool:
        """Whether no half of a step can be computed apart."""
        if step.op == records.COPY and not layout.is_phases(step.target, step.node):
            shape, rows = self.whole.shapes[step.target], self.rows.get(step.source)
            plain = (step.details["scale"][1], step.details["shift"][1]) == (1, 0)
            return rows is None or len(shape) < 3 or not plain or rows != self.rows[step.target]
        if step.op == records.POOL and step.details["kind"] == records.AVG_POOL:
            attrs = step.node.attrs  # without a micro-kernel it divides by what it sees of an image
            return max(attrs["kernel"]) > FAST_WINDOW or attrs["stride"][1] > 2
        return False

    def _halos(self) -> dict[str, tuple[int, int]]:
        """Rows that the halves of a value keep of one another: below the upper, above the lower."""
        halos: dict[str, tuple[int, int]] = {}
        for step in self.whole.steps:
            if step.source in self.halved and self._reads_around(step):
                below, above = halos.get(step.source, (0, 0))
                more = self._beyond(step)
                halos[step.source] = (max(below, more[0]), max(above, more[1]))
        return halos

    def _frames(self) -> dict[str, layout.Frame]:
        """Return the frame of both halves of every value that is cut."""
        around = dict.fromkeys(self.halved, 0)  # rows read above or below a half, padding included
        for step in self.whole.steps:
            if step.source in self.halved and self._reads_around(step):
                for half, own in enumerate(self.rows[step.source]):
                    read = self.windows[step].read(self._computed(step, half))
                    most = max(own.start - read.start, read.stop - own.stop)
                    around[step.source] = max(around[step.source], most)
        members: dict[int, list[str]] = {}
        for name in sorted(self.halved):
            members.setdefault(id(self.whole.frames[name]), []).append(name)
        result = {}
        for names in members.values():
            frame = self.whole.frames[names[0]]
            above = max(around[name] for name in names)
            height = max(len(rows) for name in names for rows in self.rows[name])
            result.update(dict.fromkeys(names, replace(frame, rows=height + above, above=above)))
        return result

    def _is_mean(self, step: Step) -> bool:
        """Whether a step averages all pixels of a value in halves."""
        if step.op != records.ADAPTIVE_POOL or step.source not in self.halved:
            return False
        return step.node.shape[1:] == (1, 1) and not step.details["flat"]

    def _mean(self, step: Step) -> list[Step]:
        """Average each half where it is, then add: each divides by the pixels of both.

        What the other core has read is slow to write again: on cores that lie apart a product with
        gates that came after took 79 microseconds in place of 10. On near ones three networks with
        gates take 0.97 to 1.00 of the time.
        """
        parts = [_half(step.target, half) for half in (0, 1)]
        means = [
            replace(step, source=_half(step.source, half), target=part, rows=Rows(half, 0, 1))
            for half, part in enumerate(parts)
        ]
        add = {"function": "add", "activation": "none"}
        both = Step(records.ELEMENTWISE, step.node, parts[0], step.target, parts[1], details=add)
        return [*means, both]

    def _joining(self, step: Step) -> Step:
        """Return a step whose target is whole, and its input perhaps in halves."""
        if step.source not in self.halved:
            return step
        upper, lower = _half(step.source, 0), _half(step.source, 1)
        if step.op == records.ADAPTIVE_POOL:
            return replace(step, source=upper, other=lower)
        rows = self._reads(step, 0)
        return replace(
            step, source=upper, other=lower, details=_shifted(step, rows), rows=rows,
            joins=self._reads(step, 1),
        )  # fmt: skip

    def _reads(self, step: Step, half: int) -> Rows:
        """Rows that half a step computes, and how it reads them."""
        computed = self._computed(step, half)
        below, above = self._beyond(step)
        below, above = (0, above) if half else (below, 0)
        top = 0
        if step.op not in (records.LOAD, records.STORE):
            first = self.rows[step.source][half].start - above
            top = first - self.windows[step].read(computed).start
        return Rows(half, computed.start, len(computed), top, above, below)

    def _half_step(self, step: Step, half: int) -> Step:
        rows, other = self._reads(step, half), step.other
        return replace(
            step,
            source=_half(step.source, half),
            target=_half(step.target, half),
            other=_half(other, half) if other in self.halved else other,
            details=_shifted(step, rows),
            rows=rows,
        )

    def _exchange(self, step: Step, halo: tuple[int, int]) -> None:
        """Copy the rows that the halves of a step's source keep of one another."""
        for half, count in enumerate(halo):
            self.steps.append(
                Step(
                    records.ELEMENTWISE, step.node, _half(step.source, 1 - half),
                    _half(step.source, half),
                    details={"function": "same", "activation": "none", "halo": True},
                    rows=Rows(half, 0, count),
                )
            )  # fmt: skip


def _cut(height: int) -> tuple[range, range]:
    """Rows of the upper and of the lower half."""
    middle = -(-height // 2)
    return range(middle), range(middle, height)


def _shifted(step: Step, rows: Rows) -> dict[str, Any]:
    """Return the details of a step that reads some rows: a copy finds its padding there."""
    if step.op != records.COPY:
        return step.details
    channel, _, column = step.details["shift"]
    return step.details | {"shift": (channel, -rows.top, column)}


def _half(name: str, half: int) -> str:
    return f"{name}.{_NAMES[half]}"
