"""Writing: the same bytes each time, whole or not at all, and back again."""

from __future__ import annotations

import os
from dataclasses import replace

import numpy as np
import pytest
from craft import CONV, small_model
from hypothesis import given
from hypothesis import strategies as st

from blocksparse.format import (
    BsrWeight,
    DenseWeight,
    FormatError,
    Graph,
    Model,
    NMWeight,
    Node,
    ValueSpec,
    read,
    write,
)
from blocksparse.format.writer import file_size


def test_the_same_model_gives_the_same_bytes(tmp_path):
    model = small_model()
    turned = replace(
        model,
        weights=dict(reversed(model.weights.items())),
        vectors=dict(reversed(model.vectors.items())),
    )
    for name, each in [("a", model), ("b", small_model()), ("c", turned)]:
        write(tmp_path / name, each)
    raw = (tmp_path / "a").read_bytes()
    assert raw == (tmp_path / "b").read_bytes() == (tmp_path / "c").read_bytes()
    write(tmp_path / "d", read(tmp_path / "a"))
    assert raw == (tmp_path / "d").read_bytes()


def test_the_size_is_known_without_writing(tmp_path):
    for model in (small_model(), replace(small_model(), provenance={"note": "x" * 1000})):
        write(tmp_path / "model", model)
        assert file_size(model) == (tmp_path / "model").stat().st_size


def test_a_broken_model_leaves_the_old_file_alone(tmp_path):
    path = tmp_path / "model.bsr.safetensors"
    write(path, small_model())
    before = path.read_bytes()
    broken = small_model()
    broken.vectors["norm.scale"][3] = np.nan
    with pytest.raises(FormatError, match="finite") as error:
        write(path, broken)
    assert str(path) in str(error.value)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("failing", ["fsync", "replace"])
def test_a_failure_on_the_way_leaves_the_old_file_alone(tmp_path, monkeypatch, failing):
    path = tmp_path / "model.bsr.safetensors"
    write(path, small_model())
    before = path.read_bytes()

    def fail(*_):
        assert len(list(tmp_path.iterdir())) == 2
        raise OSError("disk full")

    monkeypatch.setattr(os, failing, fail)
    with pytest.raises(OSError, match="disk full"):
        write(path, small_model(classes=None))
    monkeypatch.undo()
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_in_the_way(tmp_path):
    (tmp_path / "model").mkdir()
    with pytest.raises(OSError, match="model"):
        write(tmp_path / "model", small_model())
    assert list(tmp_path.iterdir()) == [tmp_path / "model"]


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere: no such folder to write m in; create it"):
        write(tmp_path / "nowhere" / "m", small_model())


def test_permissions_are_those_of_any_new_file(tmp_path):
    write(tmp_path / "model", small_model())
    (tmp_path / "other").write_bytes(b"")
    assert (tmp_path / "model").stat().st_mode == (tmp_path / "other").stat().st_mode


def test_any_name_that_is_a_module_path_or_not(tmp_path):
    # Tensor names are made of node names: these would meet if suffixes were told apart badly.
    names = ["a", "a.weight", "a.bias", "a.weight.data", "ü \U0001f600"]
    nodes, last = [], "x"
    for name in names:
        nodes.append(Node(name, "affine", (last,), {"activation": "none"}, (2, 1, 1)))
        last = name
    nodes.append(Node("conv", "conv2d", (last,), CONV, (3, 1, 1)))
    nodes.append(Node("conv.weight", "affine", ("conv",), {"activation": "none"}, (3, 1, 1)))
    vectors = {
        f"{node.name}.{suffix}": np.full(node.shape[0], at, np.float32)
        for at, node in enumerate(nodes)
        if node.op == "affine"
        for suffix in ("scale", "shift")
    }
    weights = {"conv": NMWeight.from_dense(np.zeros((3, 2, 3, 3), np.float32), 1, 2)}
    graph = Graph((ValueSpec("x", (2, 1, 1)),), ("conv.weight",), tuple(nodes))
    model = Model(graph, weights, vectors)
    write(tmp_path / "file", model)
    assert read(tmp_path / "file") == model


@st.composite
def models(draw):
    """Return a convolution and a linear layer, each in any layout, of any ragged shape."""
    size = st.integers(1, 7)
    c, k, h, w, out = (draw(size) for _ in range(5))
    taps = draw(st.sampled_from([(1, 1), (3, 3), (1, 2)]))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    attrs = {"stride": (1, 1), "padding": (1, 1), "dilation": (1, 1), "groups": 1}
    image = (k, h + 3 - taps[0], w + 3 - taps[1])
    features = int(np.prod(image))

    def weight(*shape):
        array = rng.standard_normal(shape).astype(np.float32)
        array *= rng.random(shape) < draw(st.sampled_from([0.0, 0.1, 0.6, 1.0]))
        layout = draw(st.sampled_from(["dense", "bsr", "nm"]))
        if layout == "bsr":
            return BsrWeight.from_dense(array, (draw(st.integers(1, 9)), draw(st.integers(1, 9))))
        if layout == "nm":
            m = draw(st.integers(1, 18))
            n = draw(st.integers(1, m))
            kept = rng.permuted(np.arange(m) < n).nonzero()[0]
            array[:, ~np.isin(np.arange(shape[1]) % m, kept)] = 0
            return NMWeight.from_dense(array, n, m)
        return DenseWeight(array)

    nodes = (
        Node("conv", "conv2d", ("x",), attrs | {"activation": "silu"}, image),
        Node("flat", "flatten", ("conv",), {}, (features,)),
        Node("head", "linear", ("flat",), {"activation": "none"}, (out,)),
    )
    biases = {
        f"{node.name}.bias": rng.standard_normal(node.shape[0]).astype(np.float32)
        for node in nodes
        if node.op != "flatten" and draw(st.booleans())
    }
    graph = Graph((ValueSpec("x", (c, h, w)),), ("head",), nodes)
    weights = {"conv": weight(k, c, *taps), "head": weight(out, features)}
    return Model(graph, weights, biases)


@given(models())
def test_file_round_trip(tmp_path_factory, model):
    path = tmp_path_factory.mktemp("files") / "model.bsr.safetensors"
    write(path, model)
    back = read(path)
    assert back == model
    for name, weight in model.weights.items():
        np.testing.assert_array_equal(back.weights[name].to_dense(), weight.to_dense())
