"""From graph to steps: what is computed in which order, before any batch size is known.

Most nodes become one step. A strided convolution becomes two: its input is first copied into phase
planes, on which it is a convolution of stride 1. Concatenation becomes nothing: its parts are
written in place, unless a part already lies elsewhere; then that part is copied. Where one begins
with the parts of another, as in a DenseNet, the other lies in it. Channels that are taken of a
value lie there, unless they are a part of a concatenation.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from blocksparse.format import DenseWeight, Model, Node, Weight, release

from . import layout, winograd
from .algorithms import Algorithm
from .kernels import records
from .kernels.target import Target
from .prepack import Packed, pack
from .step import Place, Step, Steps

Packs = dict[tuple[str, Algorithm], Packed]
"""Weights prepared so far, by layer and way."""


def lower(
    model: Model,
    target: Target,
    ways: Mapping[str, Algorithm],
    allow_winograd: bool = True,
    packs: Packs | None = None,
) -> Steps:
    """Turn a model into steps.

    Parameters
    ----------
    model : Model
        As read from the file.
    target : Target
        What weights are prepared for.
    ways : mapping of str to Algorithm
        How to compute convolutions; one that is not named follows `winograd.pays`.
    allow_winograd : bool
        Whether that rule may choose Winograd.
    packs : dict, optional
        Is read and filled, for callers that lower a model more than once.
    """
    return _Lowering(model, target, ways, allow_winograd, {} if packs is None else packs).run()


def kernel_size(model: Model, node: Node) -> tuple[int, int]:
    """Kernel height and width of a convolution."""
    height, width = model.weights[node.name].shape[2:]
    return height, width


class _Lowering:
    def __init__(
        self,
        model: Model,
        target: Target,
        ways: Mapping[str, Algorithm],
        allow_winograd: bool,
        packs: Packs,
    ) -> None:
        self.model = model
        self.target = target
        self.ways = ways
        self.allow_winograd = allow_winograd
        self.packs = packs
        graph = model.graph
        self.shapes = dict(graph.shapes)
        for node in graph.nodes:
            if node.op == "conv2d" and layout.is_strided(node):
                self.shapes[layout.phases_name(node)] = layout.phases_shape(
                    node, kernel_size(model, node), self.shapes[node.inputs[0]]
                )
        lines = {
            node.name
            for node in graph.nodes
            if node.op == "conv2d" and winograd.fits_rows(node, kernel_size(model, node))
        }
        self.frames = layout.frames(graph, self.shapes, lines)
        self.places = {name: Place(name) for name in self.shapes}
        self.written: set[str] = set()  # values that the node before writes itself
        self.copied: dict[str, list[tuple[str, int]]] = {}  # concatenation -> parts to copy
        self.joined: dict[tuple[str, ...], str] = {}  # parts -> concatenation
        self.steps: list[Step] = []
        for node in graph.nodes:
            if node.op == "concat":
                self._place_parts(node)
        for node in graph.nodes:
            if layout.is_part(node, self.shapes):
                self._place_part(node)

    def run(self) -> Steps:
        graph = self.model.graph
        source = graph.inputs[0].name
        if graph.nodes:
            self._emit(
                records.LOAD, graph.nodes[0], source, source, scale=(1, 1, 1), shift=(0, 0, 0)
            )
        for node in graph.nodes:
            _HANDLERS[node.op](self, node)
        output = graph.outputs[0]
        last = next(node for node in graph.nodes if node.name == output)
        self._emit(records.STORE, last, output, output, scale=(1, 1, 1), shift=(0, 0, 0))
        return Steps(self.steps, self.shapes, self.frames, self.places, source, output)

    def _emit(
        self,
        op: int,
        node: Node,
        source: str,
        target: str,
        other: str | None = None,
        packed: Packed | None = None,
        **details: Any,
    ) -> None:
        self.steps.append(Step(op, node, source, target, other, packed, details))

    def _place_parts(self, node: Node) -> None:
        names, channel = tuple(node.inputs), 0
        while names:
            name, count = self._next_part(names)
            own = self.places[name] == Place(name)
            if own and name != self.model.graph.inputs[0].name:
                self._move(name, node.name, channel)
            else:
                self.copied.setdefault(node.name, []).append((name, channel))
            names = names[count:]
            channel += self.shapes[name][0]
        self.joined[tuple(node.inputs)] = node.name

    def _next_part(self, names: tuple[str, ...]) -> tuple[str, int]:
        """Return the first part, or what the first parts were joined to, and how many they are."""
        for count in range(len(names), 1, -1):
            if names[:count] in self.joined:
                return self.joined[names[:count]], count
        return names[0], 1

    def _move(self, name: str, owner: str, channel: int) -> None:
        """Let a value, and the parts already placed in it, live in a concatenation."""
        for other, place in self.places.items():
            if place.owner == name:
                self.places[other] = Place(owner, channel + place.channel)

    def _product(self, op: int, node: Node, source: str, other: str | None, groups: int) -> None:
        weight = self.model.weights[node.name]
        way = Algorithm.DIRECT
        if op == records.CONV:
            way, packed = self._prepared(node, weight, source)
            op = _WINOGRAD[way.transforms][0] if way.transforms else op
        else:
            packed = self._packed(node, weight, way, groups)
        if packed.group:
            op = {records.CONV: records.CONV_NM, records.LINEAR: records.LINEAR_NM}[op]
        activation = node.attrs["activation"]
        linear = op in (records.LINEAR, records.LINEAR_NM)
        fused = "none" if linear and activation not in winograd.CLAMPS else activation
        pool = self._pool(node) if op == records.TILES_CONV else None
        if pool is not None:
            self.written.add(pool.name)
        self._emit(
            op, node, source, node.name if pool is None else pool.name, other, packed,
            activation=fused, way=way, pools=pool is not None,
        )  # fmt: skip
        if fused != activation:
            self._elementwise(node, "same", node.name, None, activation)

    def _pool(self, node: Node) -> Node | None:
        """Return the pool that tiles of a convolution can take in."""
        if not winograd.fits_tiles(node, kernel_size(self.model, node)):
            return None
        return winograd.pool_after(self.model.graph, node, self.target.lanes)

    def _packed(self, node: Node, weight: Weight, stored: Algorithm, groups: int) -> Packed:
        """Pack a weight as it is stored or as if dense, once for all lowerings of a model."""
        if (node.name, stored) not in self.packs:
            as_taken = DenseWeight(weight.to_dense()) if stored.dense else weight
            self.packs[node.name, stored] = pack(as_taken, groups, self.target)
            release(weight)
        return self.packs[node.name, stored]

    def _prepared(self, node: Node, weight: Weight, source: str) -> tuple[Algorithm, Packed]:
        """Prepare the weight of a convolution, and say how it is computed."""
        way = self.ways.get(node.name)
        stored = Algorithm.DENSE if way is not None and way.dense else Algorithm.DIRECT
        packed = self._packed(node, weight, stored, node.attrs["groups"])
        if way is None:
            way = Algorithm.COLUMNS if self._rule(node, packed, source) else Algorithm.DIRECT
        if way.transforms and (node.name, way) not in self.packs:
            _, transform = _WINOGRAD[way.transforms]
            kernel = kernel_size(self.model, node)
            self.packs[node.name, way] = transform(*winograd.on_phases(packed, node, kernel))
        return way, self.packs[node.name, way] if way.transforms else packed

    def _rule(self, node: Node, packed: Packed, source: str) -> bool:
        """Whether a layer that nobody measured goes through Winograd."""
        kernel = kernel_size(self.model, node)
        if packed.group or not self.allow_winograd:
            return False
        fits = winograd.fits_columns(node, kernel) and winograd.holds_padding(node, self.target)
        if not fits:
            return False
        packed, size = winograd.on_phases(packed, node, kernel)
        geometry = winograd.Geometry(size, node.shape[1], self.frames[node.name].row)
        return winograd.pays(packed, self.shapes[source][0], geometry, self.target.lanes)

    def _conv2d(self, node: Node) -> None:
        source = node.inputs[0]
        if layout.is_strided(node):
            planes = layout.phases(node, kernel_size(self.model, node))
            self._emit(
                records.COPY, node, source, layout.phases_name(node),
                scale=(1, *node.attrs["stride"]), shift=(0, *(-p for p in node.attrs["padding"])),
                planes=planes,
            )  # fmt: skip
            source = layout.phases_name(node)
        other = node.inputs[1] if len(node.inputs) > 1 else None
        self._product(records.CONV, node, source, other, node.attrs["groups"])

    def _linear(self, node: Node) -> None:
        self._product(records.LINEAR, node, node.inputs[0], None, 1)

    def _elementwise(
        self, node: Node, function: str, source: str, other: str | None, activation: str,
        target: str | None = None,
    ) -> None:  # fmt: skip
        self._emit(
            records.ELEMENTWISE, node, source, target or node.name, other, function=function,
            activation=activation,
        )  # fmt: skip

    def _add(self, node: Node) -> None:
        a, b = node.inputs
        self._elementwise(node, "add", a, b, node.attrs["activation"])

    def _mul(self, node: Node) -> None:
        a, b = node.inputs
        same = self.shapes[a] == self.shapes[b]
        self._elementwise(node, "mul" if same else "gate", a, b, "none")

    def _activation(self, node: Node) -> None:
        self._elementwise(node, "same", node.inputs[0], None, node.attrs["activation"])

    def _affine(self, node: Node) -> None:
        self._elementwise(node, "affine", node.inputs[0], None, node.attrs["activation"])

    def _concat(self, node: Node) -> None:
        for name, channel in self.copied.get(node.name, []):
            part = self._part(node.name, channel, self.shapes[name])
            self._elementwise(node, "same", name, None, "none", part)

    def _place_part(self, node: Node) -> None:
        """Let channels of a value lie there, unless they are a part of another one, too."""
        source, (start, _, _) = self.places[node.inputs[0]], node.attrs["start"]
        if self.places[node.name] == Place(node.name):
            self.places[node.name] = Place(source.owner, source.channel + start)
            self.written.add(node.name)

    def _slice(self, node: Node) -> None:
        if node.name in self.written:
            return
        (source,), attrs = node.inputs, node.attrs
        if layout.is_part(node, self.shapes):
            part = self._part(source, attrs["start"][0], node.shape)
            self._elementwise(node, "same", part, None, "none")
        else:
            self._emit(
                records.COPY, node, source, node.name, scale=attrs["step"], shift=attrs["start"]
            )

    def _part(self, name: str, channel: int, shape: tuple[int, ...]) -> str:
        """Name some channels of a value, from one on."""
        part, place = f"{name}[{channel}:{channel + shape[0]}]", self.places[name]
        self.shapes[part] = shape
        if name in self.frames:  # vectors have none
            self.frames[part] = self.frames[name]
        self.places[part] = Place(place.owner, place.channel + channel)
        return part

    def _pad(self, node: Node) -> None:
        shift = tuple(-before for before in node.attrs["before"])
        self._emit(records.COPY, node, node.inputs[0], node.name, scale=(1, 1, 1), shift=shift)

    def _flatten(self, node: Node) -> None:
        if node.name in self.written:
            return
        self._emit(
            records.COPY,
            node,
            node.inputs[0],
            node.name,
            scale=(1, 1, 1),
            shift=(0, 0, 0),
            flat=True,
        )

    def _max_pool2d(self, node: Node) -> None:
        if node.name in self.written:
            return
        (source,) = node.inputs
        before = next((other for other in self.model.graph.nodes if other.name == source), None)
        of = node
        if before is not None and before.op == "conv2d" and self._pool(before) is node:
            of = before
        self._emit(records.POOL, node, source, node.name, kind=records.MAX_POOL, pool_of=of.name)

    def _avg_pool2d(self, node: Node) -> None:
        self._emit(records.POOL, node, node.inputs[0], node.name, kind=records.AVG_POOL)

    def _adaptive_avg_pool2d(self, node: Node) -> None:
        readers = [other for other in self.model.graph.nodes if node.name in other.inputs]
        target = node.name
        flat = [reader.op for reader in readers] == ["flatten"] and node.shape[1:] == (1, 1)
        if flat and node.name not in self.model.graph.outputs:
            target = readers[0].name
            self.written.add(target)
        self._emit(records.ADAPTIVE_POOL, node, node.inputs[0], target, flat=target != node.name)


_WINOGRAD: dict[str, tuple[int, Callable[[Packed, tuple[int, int]], Packed]]] = {
    "columns": (records.WINOGRAD, winograd.columns),
    "rows": (records.LINES_CONV, winograd.rows),
    "tiles": (records.TILES_CONV, winograd.tiles),
}
"""By `Algorithm.transforms`: what runs a convolution, and what prepares its weight."""

_HANDLERS: dict[str, Callable[[_Lowering, Node], None]] = {
    "conv2d": _Lowering._conv2d,
    "linear": _Lowering._linear,
    "max_pool2d": _Lowering._max_pool2d,
    "avg_pool2d": _Lowering._avg_pool2d,
    "adaptive_avg_pool2d": _Lowering._adaptive_avg_pool2d,
    "add": _Lowering._add,
    "mul": _Lowering._mul,
    "concat": _Lowering._concat,
    "activation": _Lowering._activation,
    "affine": _Lowering._affine,
    "flatten": _Lowering._flatten,
    "slice": _Lowering._slice,
    "pad": _Lowering._pad,
}
