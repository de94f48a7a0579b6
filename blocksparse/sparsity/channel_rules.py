"""What each operation does with channels: it keeps, ties, moves or mixes them.

A traced value is followed as an array of ids with one axis for each of its own: of its full length
where channels run along the axis, 1 where all indices belong to the same channel. None stands for a
value without channels that could move, such as the image.
"""

# N images, C K input and output channels, H W height and width

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor
from torch.export import ExportedProgram
from torch.fx import Node

from blocksparse.sparsity.ledger import Ledger

Ids = np.ndarray | None
Value = Any  # Ids, a sequence of them (for operations with several results), or _Stored


@dataclass(frozen=True)
class _Stored:
    """A parameter or buffer of the network."""

    name: str
    shape: tuple[int, ...]


# One channel's result depends on that channel alone, whatever the other arguments are.
_POINTWISE = frozenset(
    "relu relu6 hardtanh silu hardswish hardsigmoid sigmoid gelu tanh elu selu celu leaky_relu "
    "softplus mish clamp clamp_min clamp_max dropout alpha_dropout feature_dropout clone "
    "contiguous alias detach detach_ to _to_copy neg exp log abs sqrt rsqrt square "
    "lift_fresh_copy".split()
)
_TOGETHER = frozenset("add sub mul div maximum minimum".split())
_SHAPES = frozenset("view reshape flatten unflatten squeeze unsqueeze _unsafe_view".split())
_REDUCTIONS = frozenset("mean sum amax amin".split())
_CONVOLUTIONS = frozenset("conv1d conv2d conv3d".split())
_POOLS = frozenset("max_pool avg_pool adaptive_avg_pool adaptive_max_pool".split())
# More ids than this in one value: a product of axes that nobody permutes.
_MOST_IDS = 4_000_000


class Trace:
    """Follows the channels through one traced program.

    Parameters
    ----------
    ledger : Ledger
        Where ids are dealt and tied.
    program : ExportedProgram
        Not decomposed.
    """

    def __init__(self, ledger: Ledger, program: ExportedProgram) -> None:
        self.ledger = ledger
        self.program = program
        self.values: dict[Node, Value] = {}
        self.node: Node

    def run(self) -> None:
        """Go through the program, and fix what reaches its output."""
        signature = self.program.graph_signature
        stored = {**signature.inputs_to_parameters, **signature.inputs_to_buffers}
        for node in self.program.graph.nodes:
            self.node = node
            if node.op == "placeholder":
                name = stored.get(node.name)
                self.values[node] = _Stored(name, _shape(node)) if name is not None else None
            elif node.op == "call_function":
                self.values[node] = self._call(node)
            elif node.op == "output":
                self._fix(node.all_input_nodes, "")

    def _call(self, node: Node) -> Value:
        if node.target is operator.getitem:
            source, index = self.values[node.args[0]], node.args[1]  # type: ignore[index]
            return source[index] if isinstance(source, list | tuple) else source
        inputs = node.all_input_nodes
        schema = getattr(node.target, "_schema", None)
        if schema is None:
            return self._stop(inputs)
        if not any(self._moves(self.values[source]) for source in inputs):
            return None
        name = schema.name.removeprefix("aten::").removesuffix("_")
        bound = {
            argument.name: node.args[i]
            if i < len(node.args)
            else node.kwargs.get(argument.name, argument.default_value)
            for i, argument in enumerate(schema.arguments)
        }
        rule = _RULES.get(name)
        if rule is None and name.removesuffix("_with_indices").rstrip("123d") in _POOLS:
            rule = Trace._pool
        return self._stop(inputs) if rule is None else rule(self, bound)

    # -- reading arguments -----------------------------------------------------------------------

    @staticmethod
    def _moves(value: Value) -> bool:
        """Say whether there is anything to follow in a value."""
        if isinstance(value, list | tuple):
            return any(Trace._moves(one) for one in value)
        return value is not None

    def _ids(self, node: Any) -> Ids:
        """Return the ids of an argument; those of a parameter if only one axis is longer than 1."""
        value = self.values.get(node) if isinstance(node, Node) else None
        if isinstance(value, list | tuple):
            self._fix([node])
            return None
        if not isinstance(value, _Stored):
            return value
        long = [axis for axis, length in enumerate(value.shape) if length > 1]
        if len(long) != 1:
            self._fix([node])
            return None
        shape = [1] * len(value.shape)
        shape[long[0]] = -1
        return self.ledger.param(value.name, long[0], value.shape[long[0]]).reshape(shape)

    def _along(self, ids: np.ndarray, node: Node, axis: int) -> np.ndarray | None:
        """Return the ids along ``axis``, None if they differ along another one as well."""
        axis %= ids.ndim
        others = ids.shape[:axis] + ids.shape[axis + 1 :]
        if math.prod(others) != 1:
            return None
        return np.broadcast_to(ids.reshape(-1), (_shape(node)[axis],))

    def _stored(self, node: Any) -> _Stored | None:
        value = self.values.get(node) if isinstance(node, Node) else None
        return value if isinstance(value, _Stored) else None

    def _axis(self, stored: _Stored, axis: int) -> np.ndarray:
        return self.ledger.param(stored.name, axis, stored.shape[axis])

    # -- giving up -------------------------------------------------------------------------------

    def _stop(self, nodes: Sequence[Node]) -> None:
        """Leave everything in ``nodes`` where it is; the result then has nothing to follow."""
        self._fix(nodes)

    def _fix(self, nodes: Sequence[Any], reason: str | None = None) -> None:
        """Fix the ids of ``nodes``, those of all axes where a parameter has several."""
        if reason is None:
            target = self.node.target
            reason = f"{getattr(target, '__name__', target)} reads them, which is not followed"
        for node in nodes:
            value = self.values.get(node) if isinstance(node, Node) else None
            for one in value if isinstance(value, list | tuple) else [value]:
                if isinstance(one, _Stored):
                    for axis, length in enumerate(one.shape):
                        if length > 1:
                            self.ledger.fix(self._axis(one, axis))
                elif one is not None:
                    self.ledger.fix(one, reason)

    # -- layers ----------------------------------------------------------------------------------

    def _convolution(self, bound: Mapping[str, Any]) -> Ids:
        weight = self._stored(bound["weight"])
        if weight is None or len(_shape(bound["input"])) != len(weight.shape):
            return self._stop(self.node.all_input_nodes)
        outs, cols = weight.shape[:2]
        groups = bound["groups"]
        ids = self._ids(bound["input"])
        inner = None if ids is None else self._along(ids, bound["input"], 1)
        if ids is not None and inner is None:
            return self._stop(self.node.all_input_nodes)
        if groups > 1 and cols == 1 and inner is not None:  # depthwise
            each = outs // groups
            source = inner.repeat(each)
            number = np.arange(outs) % each
            made = self.ledger.joint(self.node, self.ledger.origins(source), number)
            out = self.ledger.new(made)
            self.ledger.tie(out, source)
        else:
            columns = self._axis(weight, 1)
            if inner is None:
                self.ledger.fix(columns)
            elif groups > 1:
                self.ledger.fix(inner, f"a convolution of {groups} groups reads them")
                self.ledger.fix(columns)
            else:
                self._read(columns, inner, "columns")
            made = self.ledger.joint(self.node, np.arange(outs) // (outs // groups))
            out = self.ledger.new(made)
        return self._rows(out, weight, bound["bias"], len(_shape(self.node)), 1)

    def _linear(self, bound: Mapping[str, Any]) -> Ids:
        weight = self._stored(bound["weight"])
        ids = self._ids(bound["input"])
        inner = None if ids is None else self._along(ids, bound["input"], -1)
        if weight is None or len(weight.shape) != 2 or (ids is not None and inner is None):
            return self._stop(self.node.all_input_nodes)
        columns = self._axis(weight, 1)
        if inner is None:
            self.ledger.fix(columns)
        else:
            self._read(columns, inner, "columns")
        out = self.ledger.new(np.full(weight.shape[0], self.ledger.label(self.node)))
        return self._rows(out, weight, bound["bias"], len(_shape(self.node)), -1)

    def _read(self, columns: np.ndarray, source: np.ndarray, role: str) -> None:
        """Tie places of a parameter to the channels that they meet."""
        self.ledger.tie(columns, source)
        self.ledger.use(columns, (self.node, role), self.ledger.origins(source))

    def _rows(self, out: np.ndarray, weight: _Stored, bias: Any, dims: int, axis: int) -> Ids:
        """Tie the rows of a weight and its bias to the channels they make."""
        self._read(self._axis(weight, 0), out, "rows")
        if bias is not None:
            self._affine(out, [bias])
        shape = [1] * dims
        shape[axis] = -1
        return out.reshape(shape)

    def _affine(self, channels: np.ndarray, params: Sequence[Any]) -> None:
        """Tie parameters of one entry for each channel to the channels."""
        for number, param in enumerate(params):
            stored = self._stored(param)
            if stored is not None and stored.shape == channels.shape:
                self._read(self._axis(stored, 0), channels, f"entries {number}")
            elif param is not None:  # computed from others
                self._fix([param])
                self.ledger.fix(channels, "a layer computes their parameters from others")

    def _batch_norm(self, bound: Mapping[str, Any]) -> Ids:
        params = [bound[name] for name in ("weight", "bias", "running_mean", "running_var")]
        ids = self._ids(bound["input"])
        channels = None if ids is None else self._along(ids, bound["input"], 1)
        if ids is None or channels is None:
            return self._stop(self.node.all_input_nodes)
        self._affine(channels, params)
        return ids

    def _layer_norm(self, bound: Mapping[str, Any]) -> Ids:
        ids = self._ids(bound["input"])
        channels = None if ids is None else self._along(ids, bound["input"], -1)
        if ids is None or channels is None or len(bound["normalized_shape"]) != 1:
            return self._stop(self.node.all_input_nodes)
        # Normalised together: only channels that are all in it can change places.
        made = self.ledger.new(self.ledger.joint(self.node, self.ledger.origins(channels)))
        self.ledger.tie(made, channels)
        self._affine(made, [bound["weight"], bound["bias"]])
        return made.reshape((1,) * (ids.ndim - 1) + (-1,))

    # -- entry by entry --------------------------------------------------------------------------

    def _pointwise(self, bound: Mapping[str, Any]) -> Ids:
        first = next(iter(bound.values()))
        if self.node.all_input_nodes != [first]:
            return self._stop(self.node.all_input_nodes)
        return self._ids(first)

    def _together(self, bound: Mapping[str, Any]) -> Ids:
        nodes = self.node.all_input_nodes
        dims = len(_shape(self.node))
        found = [(node, self._ids(node)) for node in nodes]
        ids = [one.reshape((1,) * (dims - one.ndim) + one.shape) for _, one in found if one is not None]
        if not ids:
            return None
        shape = np.broadcast_shapes(*(one.shape for one in ids))
        for node, one in found:
            own = (1,) * (dims - len(_shape(node))) + _shape(node)
            if one is None and any(a > 1 and b > 1 for a, b in zip(own, shape, strict=True)):
                return self._stop(nodes)
        if math.prod(shape) > _MOST_IDS:
            return self._stop(nodes)
        if len(ids) == 1:
            return ids[0]
        full = [np.broadcast_to(one, shape) for one in ids]
        made = self.ledger.joint(self.node, *(self.ledger.origins(one) for one in full))
        out = self.ledger.new(made)
        for number, (one, node) in enumerate(
            zip(full, (node for node, ids in found if ids is not None), strict=True)
        ):
            self.ledger.tie(out, one)
            if self._stored(node) is not None:
                flat = one.reshape(-1)
                self.ledger.use(flat, (self.node, number), made.reshape(-1))
        return out

    # -- spatial ---------------------------------------------------------------------------------

    def _pool(self, bound: Mapping[str, Any]) -> Value:
        node = next(iter(bound.values()))
        ids = self._ids(node)
        if ids is None or self._along(ids, node, 1 if ids.ndim > 3 else -3) is None:
            return self._stop(self.node.all_input_nodes)
        several = isinstance(self.node.meta["val"], list | tuple)
        return (ids, None) if several else ids

    def _reduction(self, bound: Mapping[str, Any]) -> Ids:
        first = next(iter(bound.values()))
        ids = self._ids(first)
        if ids is None:
            return None
        dims = bound.get("dim")
        dims = [dims] if isinstance(dims, int) else list(dims or range(ids.ndim))
        dims = [dim % ids.ndim for dim in dims]
        if any(ids.shape[dim] > 1 for dim in dims):
            return self._stop(self.node.all_input_nodes)
        return ids if bound.get("keepdim") else ids.squeeze(tuple(dims))

    # -- moving channels -------------------------------------------------------------------------

    def _shape_change(self, bound: Mapping[str, Any]) -> Ids:
        first = next(iter(bound.values()))
        ids = self._ids(first)
        if ids is None:
            return None
        out = self._regroup(ids, _shape(first), _shape(self.node))
        return self._stop([first]) if out is None else out

    def _regroup(self, ids: np.ndarray, old: tuple[int, ...], new: tuple[int, ...]) -> Ids:
        """Return the ids after a change of shape from ``old`` to ``new``."""
        if 0 in old:
            return None
        before: list[int] = []  # the shape to spread the ids to
        after: list[int] = []
        offsets = np.zeros((1,) * len(old), dtype=np.int64)
        for i0, i1, j0, j1 in _pieces(old, new):
            if math.prod(ids.shape[i0:i1]) == 1:
                before += [1] * (i1 - i0)
                after += [1] * (j1 - j0)
                continue
            before += old[i0:i1]
            after += new[j0:j1]
            for axis in range(i0, i1):
                if ids.shape[axis] == 1 and old[axis] > 1:
                    along = [1] * len(old)
                    along[axis] = old[axis]
                    offsets = offsets * old[axis] + np.arange(old[axis]).reshape(along)
        if math.prod(before) > _MOST_IDS:
            return None
        full = np.broadcast_to(ids, before)
        if offsets.size > 1:  # e.g. a flatten: each channel becomes H * W features
            spread = np.broadcast_to(offsets, before)
            out = self.ledger.new(self.ledger.joint(self.node, self.ledger.origins(full), spread))
            self.ledger.tie(out, full)
            full = out
        return full.reshape(after)

    def _permute(self, bound: Mapping[str, Any]) -> Ids:
        ids = self._ids(bound["self"])
        return None if ids is None else ids.transpose([dim % ids.ndim for dim in bound["dims"]])

    def _transpose(self, bound: Mapping[str, Any]) -> Ids:
        ids = self._ids(bound["self"])
        return None if ids is None else ids.swapaxes(bound["dim0"], bound["dim1"])

    def _expand(self, bound: Mapping[str, Any]) -> Ids:
        ids = self._ids(bound["self"])
        return None if ids is None else ids.reshape((1,) * (len(_shape(self.node)) - ids.ndim) + ids.shape)

    def _slice(self, bound: Mapping[str, Any]) -> Ids:
        ids = self._ids(bound["self"])
        if ids is None:
            return None
        dim = bound["dim"] % ids.ndim
        if ids.shape[dim] == 1:
            return ids
        where = slice(bound["start"], bound["end"], bound["step"])
        return ids[(slice(None),) * dim + (where,)]

    def _select(self, bound: Mapping[str, Any]) -> Ids:
        ids = self._ids(bound["self"])
        if ids is None:
            return None
        dim = bound["dim"] % ids.ndim
        return ids.take(0 if ids.shape[dim] == 1 else bound["index"], axis=dim)

    def _split(self, bound: Mapping[str, Any]) -> Value:
        ids = self._ids(bound["self"])
        if ids is None:
            return None
        dim = bound["dim"] % ids.ndim
        sizes = [one.shape[dim] for one in self.node.meta["val"]]
        if ids.shape[dim] == 1:
            return [ids] * len(sizes)
        return np.split(ids, np.cumsum(sizes)[:-1], axis=dim)

    def _cat(self, bound: Mapping[str, Any]) -> Ids:
        nodes = bound["tensors"]
        dims = len(_shape(self.node))
        dim = bound["dim"] % dims
        pieces = []
        for node in nodes:
            ids, shape = self._ids(node), [1] * dims
            shape[dim] = _shape(node)[dim]
            if ids is None:  # not followed, but it has its place among the others
                ids = self.ledger.new(np.full(shape, self.ledger.label(self.node)))
                self.ledger.fix(ids)
            pieces.append(np.broadcast_to(ids, np.broadcast_shapes(ids.shape, shape)))
        common = np.broadcast_shapes(*(one.shape[:dim] + (1,) + one.shape[dim + 1 :] for one in pieces))
        full = [
            np.broadcast_to(one, common[:dim] + (one.shape[dim],) + common[dim + 1 :])
            for one in pieces
        ]
        if sum(one.size for one in full) > _MOST_IDS:
            return self._stop(self.node.all_input_nodes)
        return np.concatenate(full, axis=dim)

    def _pad(self, bound: Mapping[str, Any]) -> Ids:
        ids = self._ids(bound["self"])
        if ids is None:
            return None
        pad = bound["pad"]
        for number in range(len(pad) // 2):
            dim, around = ids.ndim - 1 - number, pad[2 * number : 2 * number + 2]
            if ids.shape[dim] == 1 or not any(around):
                continue
            if bound.get("mode", "constant") != "constant" or min(around) < 0:
                return self._stop([bound["self"]])
            ends = []
            for length in around:  # channels that are all zero, or another constant
                shape = ids.shape[:dim] + (length,) + ids.shape[dim + 1 :]
                ends.append(self.ledger.new(np.full(shape, self.ledger.label(self.node))))
            ids = np.concatenate([ends[0], ids, ends[1]], axis=dim)
        return ids


def _shape(node: Node) -> tuple[int, ...]:
    value = node.meta.get("val")
    return tuple(int(length) for length in value.shape) if isinstance(value, Tensor) else ()


def _pieces(old: tuple[int, ...], new: tuple[int, ...]) -> list[tuple[int, int, int, int]]:
    """Cut two shapes of one size into the smallest runs of axes of the same size."""
    pieces = []
    i = j = 0
    while i < len(old) or j < len(new):
        i0, j0 = i, j
        one = other = 1
        while True:
            if i < len(old) and (one <= other or j >= len(new)):
                one, i = one * old[i], i + 1
            elif j < len(new):
                other, j = other * new[j], j + 1
            if one == other and (i > i0 or j > j0):
                break
        pieces.append((i0, i, j0, j))
    return pieces


_RULES: dict[str, Callable[[Trace, Mapping[str, Any]], Value]] = {
    **dict.fromkeys(_CONVOLUTIONS, Trace._convolution),
    **dict.fromkeys(_POINTWISE, Trace._pointwise),
    **dict.fromkeys(_TOGETHER, Trace._together),
    **dict.fromkeys(_SHAPES, Trace._shape_change),
    **dict.fromkeys(_REDUCTIONS, Trace._reduction),
    **dict.fromkeys(("split", "split_with_sizes", "chunk"), Trace._split),
    **dict.fromkeys(("pad", "constant_pad_nd"), Trace._pad),
    "linear": Trace._linear,
    "batch_norm": Trace._batch_norm,
    "layer_norm": Trace._layer_norm,
    "permute": Trace._permute,
    "transpose": Trace._transpose,
    "expand": Trace._expand,
    "slice": Trace._slice,
    "select": Trace._select,
    "cat": Trace._cat,
}
