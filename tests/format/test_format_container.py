"""The safetensors container: what is sound, and what is refused before it is used."""

from __future__ import annotations

import io
import json

import pytest
import safetensors.numpy
from craft import with_header

from blocksparse.format import FormatError
from blocksparse.format.container import (
    ALIGNMENT,
    MAX_DEPTH,
    MAX_HEADER,
    Header,
    TensorSpec,
    header_bytes,
    parse_json,
    place_tensors,
    read_header,
    render_header,
    render_json,
)


def entry(dtype, shape, begin, end):
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def parse(raw: bytes) -> Header:
    return place_tensors(*read_header(io.BytesIO(raw), len(raw)), len(raw))


def test_rendered_header_reads_back_and_is_aligned():
    tensors = {
        "b": TensorSpec("U8", (3,)),
        "a": TensorSpec("U8", (5,)),
        "z": TensorSpec("F32", (2, 2)),
        "none": TensorSpec("I32", (0, 4)),
    }
    header = render_header({"format": "ü"}, tensors)
    assert list(header.tensors) == ["none", "z", "a", "b"]
    head = header_bytes(header)
    assert len(head) % ALIGNMENT == 0
    assert parse(head + bytes(24)) == header
    start = len(head)
    assert header.offsets == {"none": start, "z": start, "a": start + 16, "b": start + 21}
    assert safetensors.numpy.load(head + bytes(24))["z"].shape == (2, 2)


def test_no_tensors():
    head = header_bytes(render_header({"format": "x"}, {}))
    assert parse(head).tensors == {}


GOOD = {"w": entry("F32", [2], 0, 8), "v": entry("U8", [3], 8, 11)}


def test_a_sound_header():
    header = parse(with_header(json.dumps(GOOD).encode(), bytes(11)))
    assert header.tensors == {"w": TensorSpec("F32", (2,)), "v": TensorSpec("U8", (3,))}
    assert header.metadata == {}


@pytest.mark.parametrize(
    ("change", "tensor", "rule"),
    [
        ({"w": entry("F64", [1], 0, 8)}, "w", "dtype must be one of F32, I32, U8"),
        ({"w": entry(["F32"], [2], 0, 8)}, "w", "dtype must be one of"),
        ({"w": entry("F32", [-2], 0, 8)}, "w", "axes of 0 to"),
        ({"w": entry("F32", [2**31, 0], 0, 0)}, "w", "axes of 0 to"),
        ({"w": entry("F32", [1, 1, 1, 1, 2], 0, 8)}, "w", "at most 4 axes"),
        ({"w": entry("F32", [2.0], 0, 8)}, "w", "array of integers"),
        ({"w": entry("F32", 2, 0, 8)}, "w", "array of integers"),
        ({"w": entry("F32", [3], 0, 8)}, "w", "must span the 12 bytes"),
        ({"w": entry("F32", [2**31 - 1] * 4, 0, 8)}, "w", "must span the"),
        ({"w": entry("F32", [2], 8, 0)}, "w", "must span the 8 bytes"),
        ({"w": entry("F32", [2], -8, 0)}, "w", "must span the 8 bytes"),
        ({"w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8, 8]}}, "w", "must span"),
        ({"w": {"dtype": "F32", "shape": [2]}}, "w", "exactly the keys"),
        ({"w": entry("F32", [2], 0, 8) | {"more": 1}}, "w", "exactly the keys"),
        ({"w": 3}, "w", "must be a JSON object"),
        ({"v": entry("U8", [3], 7, 10)}, "v", "tile the buffer"),
        ({"v": entry("U8", [2], 9, 11)}, "v", "tile the buffer"),
        ({"v": entry("U8", [2], 8, 10)}, None, "tensors end at byte"),
        ({"v": entry("U8", [4], 8, 12)}, None, "tensors end at byte"),
        ({"w": entry("U8", [5], 0, 5), "v": entry("F32", [1], 5, 9)}, "v", "not aligned"),
        ({"__metadata__": {"format": 1}}, "__metadata__", "strings to strings"),
        ({"__metadata__": []}, "__metadata__", "strings to strings"),
    ],
)
def test_unsound_tensors(change, tensor, rule):
    raw = with_header(json.dumps(GOOD | change).encode(), bytes(11))
    with pytest.raises(FormatError, match=rule) as error:
        parse(raw)
    assert error.value.tensor == tensor


@pytest.mark.parametrize(
    ("raw", "rule"),
    [
        (b"", "file has 0 bytes"),
        (b"\0" * 7, "file has 7 bytes"),
        (b"\0" * 8, "does not start with '{'"),
        (b"\xff" * 100, "header length 18446744073709551615 exceeds"),
        ((MAX_HEADER + 8).to_bytes(8, "little") + b"{}" * 99, "exceeds"),
        ((3).to_bytes(8, "little") + b"{}", "header length 3 exceeds"),
        (with_header(b" {}", b""), "does not start with '{'"),
        (with_header(b"[]", b""), "does not start with '{'"),
        (with_header(b"{\xff}", b""), "not UTF-8"),
        (with_header(b"{", b""), "not strict JSON"),
        (with_header(b"{}\0", b""), "not strict JSON"),
        (with_header(b'{"__metadata__": {}, "__metadata__": {}}', b""), "same key twice"),
        (with_header(b'{"a": NaN}', b""), "not strict JSON"),
        (with_header(b'{"a": 1e999}', b""), "not strict JSON"),
        (with_header(b'{"a": ' + b"9" * 9999 + b"}", b""), "not strict JSON"),
        (with_header(b'{"\\ud800": 1}', b""), "not strict JSON"),
        (with_header(b'{"a":' + b"[" * 9999 + b"]" * 9999 + b"}", b""), "not strict JSON"),
        (with_header(b'{"a":' + b'{"a":' * 90 + b"1" + b"}" * 91, b""), "nested more than"),
    ],
)
def test_no_header(raw, rule):
    with pytest.raises(FormatError, match=rule):
        parse(raw)


def test_a_header_over_the_cap_is_refused_though_the_file_is_large(tmp_path):
    path = tmp_path / "huge"
    with path.open("wb") as file:
        file.write((MAX_HEADER + 1).to_bytes(8, "little") + b"{")
        file.truncate(2 * MAX_HEADER)  # sparse: takes no disk
    with path.open("rb") as file, pytest.raises(FormatError, match="exceeds"):
        read_header(file, 2 * MAX_HEADER)


def test_a_header_over_the_cap_is_not_written():
    with pytest.raises(FormatError, match="shorten the provenance"):
        render_header({"provenance": "x" * MAX_HEADER}, {})


def test_json_depth_and_kind():
    deepest = "[" * MAX_DEPTH + "]" * MAX_DEPTH
    assert parse_json(deepest, "it", list)
    with pytest.raises(FormatError, match="nested"):
        parse_json(f"[{deepest}]", "it", list)
    with pytest.raises(FormatError, match="must be a JSON array, is dict"):
        parse_json("{}", "it", list)
    with pytest.raises(FormatError, match="must be a JSON object, is int"):
        parse_json("1", "it", dict)
    assert render_json({"ü": [1, None]}) == '{"ü":[1,null]}'
