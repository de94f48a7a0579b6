"""The rules of the format, shared by writer and reader.

What depends on the header alone (:func:`check_graph`, :func:`check_tensors`) is checked before any
tensor is touched; what depends on the numbers (:func:`check_contents`) after.

Legend: K out-channels, C in-channels, r c block rows and columns, B stored blocks, G groups of m
channels.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from math import prod
from typing import Any

import numpy as np
import numpy.typing as npt

from blocksparse.format.container import DTYPES, TensorSpec
from blocksparse.format.errors import FormatError
from blocksparse.format.graph import Graph, Node
from blocksparse.format.layout import Layout, weight_arrays
from blocksparse.format.model import Model
from blocksparse.format.ops import MAX_DIM, MAX_VALUE, OPS
from blocksparse.format.weights import BsrWeight, NMWeight

MAX_NAME = 256
"""Longest name of an input or node, in characters."""


def check_model(model: Model) -> None:
    """Raise FormatError unless `model` is one that a file can hold.

    The graph, the presence, dtype and shape of every tensor, and every number in them. The metadata
    (classes, preprocessing, provenance) is checked where it is turned into text.
    """
    layouts = {name: Layout.of(weight) for name, weight in model.weights.items()}
    check_graph(model.graph, layouts)
    biases = {
        node.name
        for node in model.graph.nodes
        if OPS[node.op].weighted and f"{node.name}.bias" in model.vectors
    }
    for name in model.vectors.keys() - vector_shapes(model.graph, biases).keys():
        raise FormatError("vector belongs to no node of the graph", tensor=name)
    arrays = model_arrays(model)
    check_tensors(expected_tensors(model.graph, layouts, biases), _specs(arrays))
    check_contents(model)


def model_arrays(model: Model) -> dict[str, npt.NDArray[Any]]:
    """Return every array of `model` by the name its tensor has in the file."""
    arrays: dict[str, npt.NDArray[Any]] = dict(model.vectors)
    for name, weight in model.weights.items():
        arrays |= weight_arrays(name, weight)
    return arrays


def _specs(arrays: Mapping[str, npt.NDArray[Any]]) -> dict[str, TensorSpec]:
    names = {dtype: name for name, dtype in DTYPES.items()}
    specs = {}
    for name, array in arrays.items():
        if array.dtype not in names:
            raise FormatError(
                f"dtype must be float32, int32 or uint8, is {array.dtype}", tensor=name
            )
        if not array.flags.c_contiguous:
            raise FormatError("array must be C-contiguous", tensor=name)
        specs[name] = TensorSpec(names[array.dtype], array.shape)
    return specs


def check_graph(graph: Graph, layouts: Mapping[str, Layout]) -> None:
    """Raise FormatError unless the graph can run.

    Names unique, inputs defined before use, attributes exact, shapes inferred equal to shapes
    declared, sizes sane, weights where they belong and of fitting shape, one input, one output.

    Parameters
    ----------
    graph : Graph
    layouts : mapping of str to Layout
        Layout of each node's weight, by node name.
    """
    if len(graph.inputs) != 1 or len(graph.outputs) != 1:
        raise FormatError(
            f"graph must have one input and one output, has {len(graph.inputs)} and "
            f"{len(graph.outputs)}"
        )
    image = graph.inputs[0]
    _check_name(image.name)
    if len(image.shape) != 3:
        raise FormatError(f"input shape must be (C, H, W), is {image.shape}", tensor=image.name)
    _check_shape(image.shape, image.name)
    shapes: dict[str, tuple[int, ...]] = {image.name: image.shape}
    for node in graph.nodes:
        _check_name(node.name)
        if node.name in shapes:
            raise FormatError("name is used twice", tensor=node.name)
        try:
            inferred = _infer(node, shapes, layouts.get(node.name))
        except FormatError:
            raise
        except ValueError as error:
            raise FormatError(f"{node.op}: {error}", tensor=node.name) from None
        if node.shape != inferred:
            raise FormatError(f"shape must be {inferred}, is {node.shape}", tensor=node.name)
        _check_shape(node.shape, node.name)
        shapes[node.name] = node.shape
    if graph.outputs[0] not in {node.name for node in graph.nodes}:
        raise FormatError("output must be a node", tensor=graph.outputs[0])
    for name in layouts.keys() - {node.name for node in graph.nodes}:
        raise FormatError("weight belongs to no node of the graph", tensor=name)


def _check_name(name: str) -> None:
    if not isinstance(name, str) or not 0 < len(name) <= MAX_NAME or not name.isprintable():
        raise FormatError(f"name must be 1 to {MAX_NAME} printable characters, is {name!r}")


def _check_shape(shape: tuple[int, ...], name: str) -> None:
    if not all(type(size) is int and 1 <= size <= MAX_DIM for size in shape):
        raise FormatError(f"sizes must be integers of 1 to {MAX_DIM}, are {shape}", tensor=name)
    if prod(shape) > MAX_VALUE:
        raise FormatError(f"{shape} has more than {MAX_VALUE} entries", tensor=name)


def _infer(
    node: Node, shapes: Mapping[str, tuple[int, ...]], layout: Layout | None
) -> tuple[int, ...]:
    """Check all of `node` but its declared shape, and return the shape it has."""
    if node.op not in OPS:
        raise ValueError(f"op is unknown; version 1 has {', '.join(OPS)}")
    op = OPS[node.op]
    least, most = op.inputs
    if len(node.inputs) < least or (most is not None and len(node.inputs) > most):
        raise ValueError(f"must have {least} to {most or 'any number of'} inputs")
    for name in node.inputs:
        if name not in shapes:
            raise ValueError(f"input {name!r} is not defined before it is used")
    if set(node.attrs) != set(op.attrs):
        raise ValueError(f"attributes must be {sorted(op.attrs)}, are {sorted(node.attrs)}")
    for key, attr in op.attrs.items():
        try:
            attr.check(node.attrs[key])
        except ValueError as error:
            raise ValueError(f"{key} {error}") from None
    if op.weighted != (layout is not None):
        raise ValueError("must have a weight" if op.weighted else "must not have a weight")
    if layout is not None:
        layout.check(node.name)
        if layout.kind != "dense" and node.attrs.get("groups", 1) != 1:
            raise ValueError(f"a weight in {layout.kind} layout needs groups 1; store it dense")
    return op.infer_shape(
        node.attrs, [shapes[name] for name in node.inputs], layout.shape if layout else None
    )


def expected_tensors(
    graph: Graph, layouts: Mapping[str, Layout], biases: Collection[str]
) -> dict[str, tuple[str, tuple[int | None, ...]]]:
    """Return dtype and shape of every tensor that a file with this graph holds.

    Parameters
    ----------
    graph : Graph
        One that passes :func:`check_graph`.
    layouts : mapping of str to Layout
    biases : collection of str
        Names of the weighted nodes that have a bias.
    """
    expected: dict[str, tuple[str, tuple[int | None, ...]]] = {
        name: ("F32", shape) for name, shape in vector_shapes(graph, biases).items()
    }
    for name, layout in layouts.items():
        expected |= layout.tensors(name)
    return expected


def vector_shapes(graph: Graph, biases: Collection[str]) -> dict[str, tuple[int]]:
    """Return the shape of every bias, scale and shift by tensor name."""
    return {
        f"{node.name}.{suffix}": (node.shape[0],)
        for node in graph.nodes
        for suffix in (*OPS[node.op].vectors, *(["bias"] if node.name in biases else []))
    }


def check_tensors(
    expected: Mapping[str, tuple[str, tuple[int | None, ...]]], found: Mapping[str, TensorSpec]
) -> None:
    """Raise FormatError unless exactly the expected tensors are there, as they should be."""
    for name in expected.keys() - found.keys():
        raise FormatError("tensor is missing", tensor=name)
    for name, spec in found.items():
        if name not in expected:
            raise FormatError("tensor belongs to no node of the graph", tensor=name)
        dtype, shape = expected[name]
        if spec.dtype != dtype:
            raise FormatError(f"dtype must be {dtype}, is {spec.dtype}", tensor=name)
        if len(spec.shape) != len(shape) or any(
            size is not None and size != given
            for size, given in zip(shape, spec.shape, strict=True)
        ):
            wanted = ", ".join("any" if size is None else str(size) for size in shape)
            raise FormatError(f"shape must be [{wanted}], is {list(spec.shape)}", tensor=name)


def check_contents(model: Model) -> None:
    """Raise FormatError unless every number of `model` is allowed where it stands."""
    for name, array in model_arrays(model).items():
        if array.dtype.kind == "f" and not np.isfinite(array).all():
            at = tuple(int(i) for i in np.argwhere(~np.isfinite(array))[0])
            raise FormatError(f"values must be finite, {at} is {array[at]}", tensor=name)
    for name, weight in model.weights.items():
        if isinstance(weight, BsrWeight):
            _check_bsr(f"{name}.weight", weight)
        elif isinstance(weight, NMWeight):
            _check_nm(f"{name}.weight", weight)


def _check_bsr(name: str, weight: BsrWeight) -> None:
    data, indices, indptr = weight.data, weight.indices, weight.indptr
    (r, c), count = weight.block, len(data)
    if len(indices) != count:
        raise FormatError(
            f"must have one entry per block: {count} blocks, {len(indices)} indices",
            tensor=f"{name}.indices",
        )
    if indptr[0] != 0 or indptr[-1] != count or (indptr[1:] < indptr[:-1]).any():
        raise FormatError(
            f"must rise from 0 to the number of blocks {count}", tensor=f"{name}.indptr"
        )
    per_position = -(-weight.shape[1] // c)
    columns = prod(weight.shape[2:]) * per_position
    if count and not (indices.min() >= 0 and indices.max() < columns):
        raise FormatError(f"must lie in 0 to {columns - 1}", tensor=f"{name}.indices")
    rising = indices[1:] > indices[:-1]
    starts = indptr[(indptr > 0) & (indptr < count)]
    rising[starts - 1] = True
    if not rising.all():
        row = int(np.searchsorted(indptr, np.argmin(rising), side="right")) - 1
        raise FormatError(
            f"must rise strictly within each block row, do not in row {row}",
            tensor=f"{name}.indices",
        )
    stored = (data != 0).any(axis=(1, 2))
    if not stored.all():
        raise FormatError(
            f"block {int(np.argmin(stored))} is all zero; leave it out", tensor=f"{name}.data"
        )
    rows_used = weight.shape[0] - (len(indptr) - 2) * r
    columns_used = weight.shape[1] - (per_position - 1) * c
    right_edge = indices % per_position == per_position - 1
    if data[indptr[-2] :, rows_used:].any() or data[right_edge, :, columns_used:].any():
        raise FormatError(
            f"entries outside the weight {weight.shape} must be 0.0", tensor=f"{name}.data"
        )


def _check_nm(name: str, weight: NMWeight) -> None:
    channels, m = weight.shape[1], weight.m
    count = prod(weight.values.shape[1:])
    spare = weight.indices.shape[1] * 8 - count * weight.bits
    if spare and (weight.indices[:, -1] >> (8 - spare)).any():
        raise FormatError("spare bits must be 0", tensor=f"{name}.indices")
    index = weight.unpack_indices()
    last = channels - (weight.values.shape[2] - 1) * m
    if index.max() >= m or index[:, :, -1].max() >= last:
        raise FormatError(
            f"must be below the channels of the group: {m}, and {last} in the last group",
            tensor=f"{name}.indices",
        )
    if (index[..., 1:] < index[..., :-1]).any():
        raise FormatError("must not decrease within a group", tensor=f"{name}.indices")
    repeated = index[..., 1:] == index[..., :-1]
    if (weight.values[..., 1:][repeated] != 0).any():
        raise FormatError(
            "where an index repeats, only the first value may be nonzero", tensor=f"{name}.values"
        )
