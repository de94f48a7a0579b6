"""Models and damaged files for the tests of the format."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from blocksparse.format import BsrWeight, DenseWeight, Graph, Model, NMWeight, Node, ValueSpec

CONV = {"stride": (1, 1), "padding": (1, 1), "dilation": (1, 1), "groups": 1, "activation": "relu"}


def small_model(**changed) -> Model:
    """Return a network with one layer of each layout and an affine node, 3x6x5 to 4."""
    rng = np.random.default_rng(7)
    half = rng.standard_normal((6, 8, 3, 3)).astype(np.float32)
    half[:, ::4] = half[:, 1::4] = 0
    blocks = rng.standard_normal((4, 180)).astype(np.float32)
    blocks[:2, 30:90] = blocks[2:, :60] = 0
    nodes = (
        Node("stem", "conv2d", ("x",), dict(CONV), (8, 6, 5)),
        Node("norm", "affine", ("stem",), {"activation": "none"}, (8, 6, 5)),
        Node("body", "conv2d", ("norm",), dict(CONV), (6, 6, 5)),
        Node("flat", "flatten", ("body",), {}, (180,)),
        Node("head", "linear", ("flat",), {"activation": "none"}, (4,)),
    )
    fields = {
        "graph": Graph((ValueSpec("x", (3, 6, 5)),), ("head",), nodes),
        "weights": {
            "stem": DenseWeight(rng.standard_normal((8, 3, 3, 3)).astype(np.float32)),
            "body": NMWeight.from_dense(half, 2, 4),
            "head": BsrWeight.from_dense(blocks, (3, 8)),
        },
        "vectors": {
            "stem.bias": np.arange(8, dtype=np.float32),
            "norm.scale": np.ones(8, np.float32),
            "norm.shift": np.zeros(8, np.float32),
            "head.bias": np.zeros(4, np.float32),
        },
        "classes": ("a", "b", "c", "ü"),
        "provenance": {"config": {"seed": 1}},
    }
    return Model(**(fields | changed))


def split(raw: bytes) -> tuple[dict, bytes]:
    """Return the header of a file as a tree, with the graph parsed too, and its buffer."""
    length = int.from_bytes(raw[:8], "little")
    header = json.loads(raw[8 : 8 + length])
    header["__metadata__"]["graph"] = json.loads(header["__metadata__"]["graph"])
    return header, raw[8 + length :]


def join(header: dict, buffer: bytes) -> bytes:
    """Undo :func:`split`."""
    metadata = dict(header["__metadata__"])
    if not isinstance(metadata.get("graph", ""), str):
        metadata["graph"] = json.dumps(metadata["graph"])
    return with_header(json.dumps(header | {"__metadata__": metadata}).encode(), buffer)


def with_header(text: bytes, buffer: bytes) -> bytes:
    """Return a file with this header, padded so that the buffer is aligned."""
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + buffer


def poke(raw: bytes, tensor: str, at: int, value, dtype) -> bytes:
    """Return the file with entry `at` of `tensor` set to `value`."""
    length = int.from_bytes(raw[:8], "little")
    begin = json.loads(raw[8 : 8 + length])[tensor]["data_offsets"][0] + 8 + length
    entry = np.asarray(value, dtype).tobytes()
    begin += at * len(entry)
    return raw[:begin] + entry + raw[begin + len(entry) :]


def saved(path: Path, raw: bytes) -> Path:
    """Write `raw` to `path` and return it."""
    path.write_bytes(raw)
    return path
