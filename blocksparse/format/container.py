"""The safetensors container: eight bytes of header length, a JSON header, one buffer of tensors.

Written here rather than by the safetensors library so that the same model always gives the same
bytes, and read here so that every number is checked before it is used. The result is plain
safetensors: any library for it reads the file.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any, BinaryIO

import numpy as np

from blocksparse.format.errors import FormatError
from blocksparse.format.graph import integers, record

DTYPES: Mapping[str, np.dtype[Any]] = {
    "F32": np.dtype("<f4"),
    "I32": np.dtype("<i4"),
    "U8": np.dtype("u1"),
}
"""The safetensors dtypes that occur in a model file, all little-endian."""

MAX_HEADER = 2**22
"""Largest header, in bytes."""

MAX_AXIS = 2**31 - 1
"""Largest size of one axis of a stored tensor."""

MAX_DEPTH = 64
"""Deepest nesting of JSON."""

ALIGNMENT = 64
"""The writer starts the buffer at a multiple of this many bytes."""


@dataclass(frozen=True)
class TensorSpec:
    """Dtype (a key of :data:`DTYPES`) and shape of a stored tensor."""

    dtype: str
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        """Bytes the tensor takes, as a Python integer that cannot overflow."""
        return prod(self.shape) * DTYPES[self.dtype].itemsize


@dataclass(frozen=True)
class Header:
    """What the header of a file says, checked against the file's size.

    Parameters
    ----------
    metadata : dict of str to str
    tensors : dict of str to TensorSpec
    offsets : dict of str to int
        Byte in the file at which each tensor starts.
    """

    metadata: dict[str, str]
    tensors: dict[str, TensorSpec]
    offsets: dict[str, int]


def render_header(metadata: Mapping[str, str], tensors: Mapping[str, TensorSpec]) -> Header:
    """Lay `tensors` out: largest dtype first, then by name, without gaps.

    Returns
    -------
    Header
        ``tensors`` and ``offsets`` in file order.
    """
    order = sorted(tensors, key=lambda name: (-DTYPES[tensors[name].dtype].itemsize, name))
    begins, end = {}, 0
    for name in order:
        begins[name] = end
        end += tensors[name].nbytes
    specs = {name: tensors[name] for name in order}
    start = len(header_bytes(Header(dict(metadata), specs, begins)))
    return Header(dict(metadata), specs, {name: start + at for name, at in begins.items()})


def header_bytes(header: Header) -> bytes:
    """Return the bytes of the file up to its buffer, padded with spaces to :data:`ALIGNMENT`."""
    start = min(header.offsets.values(), default=0)
    tree: dict[str, Any] = {"__metadata__": header.metadata}
    for name, spec in header.tensors.items():
        begin = header.offsets[name] - start
        tree[name] = {
            "dtype": spec.dtype,
            "shape": list(spec.shape),
            "data_offsets": [begin, begin + spec.nbytes],
        }
    text = render_json(tree).encode()
    text += b" " * (-(8 + len(text)) % ALIGNMENT)
    if len(text) > MAX_HEADER:
        raise FormatError(
            f"header would take {len(text)} bytes, at most {MAX_HEADER} are allowed",
            mend="shorten the provenance",
        )
    return len(text).to_bytes(8, "little") + text


def read_header(file: BinaryIO, size: int) -> tuple[dict[str, str], dict[str, Any], int]:
    """Read the header of a file of `size` bytes, and nothing behind it.

    Returns
    -------
    metadata : dict of str to str
    entries : dict
        What is said of each tensor, for :func:`place_tensors` to judge.
    start : int
        Byte in the file at which the buffer starts.

    Raises
    ------
    FormatError
        Unless the header lies within the file and the cap and is strict JSON.
    """
    if size < 8:
        raise FormatError(
            f"file has {size} bytes, the header's length alone takes 8",
            mend="it is empty or cut short; export or copy it again",
        )
    length = int.from_bytes(file.read(8), "little")
    if length > min(size - 8, MAX_HEADER):
        raise FormatError(
            f"header length {length} exceeds the file's {size} bytes or the cap of {MAX_HEADER}",
            mend="it is no safetensors file, or cut short",
        )
    raw = file.read(length)
    if not raw.startswith(b"{"):
        raise FormatError("header does not start with '{'", mend="it is no safetensors file")
    try:
        tree = parse_json(raw.decode(), "header", dict)
    except UnicodeDecodeError as error:
        raise FormatError(f"header is not UTF-8: {error.reason} at byte {error.start}") from None
    metadata = tree.pop("__metadata__", {})
    if not isinstance(metadata, dict) or any(type(v) is not str for v in metadata.values()):
        raise FormatError("__metadata__ must map strings to strings", tensor="__metadata__")
    return metadata, tree, 8 + length


def place_tensors(
    metadata: dict[str, str], entries: dict[str, Any], start: int, size: int
) -> Header:
    """Turn what :func:`read_header` gave into a header that can be relied on.

    Raises
    ------
    FormatError
        Unless dtypes are known, sizes fit their offsets, and the tensors tile the buffer, which is
        the file of `size` bytes from `start` on.
    """
    specs, spans = {}, {}
    for name, entry in entries.items():
        fields = record(entry, ("dtype", "shape", "data_offsets"), "tensor entry", tensor=name)
        dtype = fields["dtype"]
        if not isinstance(dtype, str) or dtype not in DTYPES:
            raise FormatError(
                f"dtype must be one of {', '.join(DTYPES)}, is {dtype!r}", tensor=name
            )
        shape = integers(fields["shape"], name, "shape")
        if len(shape) > 4 or not all(0 <= axis <= MAX_AXIS for axis in shape):
            raise FormatError(
                f"shape must have at most 4 axes of 0 to {MAX_AXIS}, is {shape}", tensor=name
            )
        span = integers(fields["data_offsets"], name, "data_offsets")
        spec = TensorSpec(dtype, shape)
        if len(span) != 2 or span[0] < 0 or span[1] - span[0] != spec.nbytes:
            raise FormatError(
                f"data_offsets {span} must span the {spec.nbytes} bytes of {dtype} {shape}",
                tensor=name,
            )
        if spec.nbytes and (start + span[0]) % DTYPES[dtype].itemsize:
            raise FormatError(f"data is not aligned to its dtype {dtype}", tensor=name)
        specs[name], spans[name] = spec, span
    end = 0
    for name in sorted(spans, key=lambda name: spans[name]):
        if spans[name][0] != end:
            raise FormatError(
                f"data_offsets start at {spans[name][0]}, the tensor before ends at {end}: tensors "
                "must tile the buffer without gaps or overlap",
                tensor=name,
            )
        end = spans[name][1]
    if end != size - start:
        raise FormatError(
            f"tensors end at byte {start + end}, the file at byte {size}",
            mend="it is cut short or has bytes too many; export or copy it again",
        )
    return Header(metadata, specs, {name: start + span[0] for name, span in spans.items()})


def render_json(tree: object) -> str:
    """Return `tree` as the JSON the format uses: no spaces, UTF-8 unescaped, no NaN.

    Raises
    ------
    ValueError, TypeError
        Where JSON, or UTF-8, has no way to say it.
    """
    text = json.dumps(tree, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    text.encode()
    return text


def parse_json(text: str, what: str, kind: type[dict] | type[list]) -> Any:
    """Parse JSON strictly: no duplicate keys, NaN, infinity, lone surrogates or deep nesting.

    Parameters
    ----------
    text : str
    what : str
        What to call it in an error.
    kind : {dict, list}
        What must be outermost.

    Raises
    ------
    FormatError
    """
    try:
        tree = json.loads(text, object_pairs_hook=_unique)
        _check_depth(tree)
        render_json(tree)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{what} is not strict JSON: {error}", tensor=what) from None
    if not isinstance(tree, kind):
        name = "object" if kind is dict else "array"
        raise FormatError(f"must be a JSON {name}, is {type(tree).__name__}", tensor=what)
    return tree


def _check_depth(tree: object) -> None:
    level, depth = [tree], 0
    while level:
        depth += 1
        if depth > MAX_DEPTH:
            raise ValueError(f"nested more than {MAX_DEPTH} deep")
        level = [
            child
            for parent in level
            if isinstance(parent, dict | list)
            for child in (parent.values() if isinstance(parent, dict) else parent)
        ]


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    tree = dict(pairs)
    if len(tree) != len(pairs):
        raise ValueError("an object has the same key twice")
    return tree
