"""What a file says beside its tensors: version, graph JSON, classes, preprocessing, provenance."""

from __future__ import annotations

import copy
import json
from dataclasses import replace

import pytest
from craft import join, saved, small_model, split

from blocksparse.format import FormatError, Preprocessing, read, write

RGB = Preprocessing((6, 5), None, (0.5, 0.4, 0.3), (0.2, 0.2, 0.1), "rgb")


@pytest.fixture
def parts(tmp_path):
    """Header tree and buffer of the small model's file."""
    write(tmp_path / "good", small_model())
    return split((tmp_path / "good").read_bytes())


def refuse(path, header, buffer, tensor, rule):
    with pytest.raises(FormatError, match=rule) as error:
        read(saved(path, join(header, buffer)))
    assert error.value.tensor == tensor
    assert str(path) in str(error.value)


def test_graph_survives_json():
    graph = small_model().graph
    assert type(graph).from_json(json.loads(json.dumps(graph.to_json()))) == graph


@pytest.mark.parametrize(
    "preprocessing",
    [
        None,
        RGB,
        replace(RGB, resize=None),
        replace(RGB, resize=256, crop=(6, 5)),
        replace(RGB, resize=(300, 200), crop=(6, 5)),
        replace(RGB, resize=256),
        replace(RGB, resize=9459),
        replace(RGB, resize=(1, 2**24), crop=(6, 5)),
        replace(RGB, mean=(0, 0, 0), std=(1, 1, 1)),
    ],
)
def test_everything_comes_back(tmp_path, preprocessing):
    model = small_model(preprocessing=preprocessing, provenance={"a": [1, 2.5, None, {"ü": "é"}]})
    write(tmp_path / "file", model)
    assert read(tmp_path / "file") == model


def test_nothing_optional_comes_back(tmp_path):
    model = small_model(classes=None, provenance={})
    write(tmp_path / "file", model)
    assert read(tmp_path / "file") == model


@pytest.mark.parametrize(
    ("changed", "tensor", "rule"),
    [
        ({"classes": ("a", "b")}, "classes", r"2 names do not fit an output of \(4,\)"),
        ({"classes": ["a", "b", "c", "d"]}, "classes", "tuple of strings"),
        ({"classes": ("a", "b", "c", 4)}, "classes", "tuple of strings"),
        ({"classes": ("a", "b", "c", "\ud800")}, "classes", "cannot be said in JSON"),
        ({"provenance": {"loss": float("nan")}}, "provenance", "cannot be said in JSON"),
        ({"provenance": {"path": object()}}, "provenance", "cannot be said in JSON"),
        ({"provenance": {1: 2, "1": 3}}, "provenance", "same key twice"),
        ({"provenance": [1]}, "provenance", "must be a JSON object, is list"),
        ({"preprocessing": replace(RGB, resize=0)}, "preprocessing", "resize must be"),
        ({"preprocessing": replace(RGB, resize=(6, 5, 3))}, "preprocessing", "resize must be"),
        ({"preprocessing": replace(RGB, resize=True)}, "preprocessing", "resize must be"),
        (
            {"preprocessing": replace(RGB, resize=9460)},
            "preprocessing",
            "resize to 9460 takes more",
        ),
        (
            {"preprocessing": replace(RGB, resize=(2**14, 2**14), crop=(6, 5))},
            "preprocessing",
            r"resize to \(16384, 16384\)",
        ),
        ({"preprocessing": replace(RGB, crop=6)}, "preprocessing", "crop must be"),
        ({"preprocessing": replace(RGB, channels="bgr")}, "preprocessing", "channels must be"),
        ({"preprocessing": replace(RGB, channels="gray")}, "preprocessing", "channels must be"),
        ({"preprocessing": replace(RGB, mean=(0.5,))}, "preprocessing", "3 finite numbers"),
        ({"preprocessing": replace(RGB, std=(1, 0, 1))}, "preprocessing", "std positive"),
        ({"preprocessing": replace(RGB, mean=(0, 1e31, 0))}, "preprocessing", "finite"),
        (
            {"preprocessing": replace(RGB, resize=(5, 6))},
            "preprocessing",
            r"gives images of \(5, 6\), the network takes \(6, 5\)",
        ),
        ({"preprocessing": replace(RGB, crop=(5, 5))}, "preprocessing", "gives images of"),
    ],
)
def test_the_writer_refuses(tmp_path, changed, tensor, rule):
    path = tmp_path / "file"
    with pytest.raises(FormatError, match=rule) as error:
        write(path, small_model(**changed))
    assert error.value.tensor == tensor
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("version", "rule"),
    [
        ("2", "file is of version 2, this library reads up to version 1.*newer blocksparse"),
        ("999", "file is of version 999"),
        ("0", "whole number from 1, is '0'"),
        ("01", "whole number from 1"),
        ("-1", "whole number from 1"),
        ("1.0", "whole number from 1"),
        ("²", "whole number from 1"),
        ("", "whole number from 1"),
        ("1" * 5000, "whole number from 1"),
        (None, "whole number from 1, is None"),
    ],
)
def test_version(tmp_path, parts, version, rule):
    header, buffer = parts
    del header["__metadata__"]["version"]
    if version is not None:
        header["__metadata__"]["version"] = version
    refuse(tmp_path / "bad", header, buffer, "__metadata__", rule)


def test_a_newer_version_is_told_before_anything_else_is_judged(tmp_path, parts):
    header, buffer = parts
    header["__metadata__"] |= {"version": "2", "graph": "[]", "more": "x"}
    header["stem.weight"] = {"dtype": "BF16", "shape": [], "data_offsets": [0, 2], "crc": 1}
    refuse(tmp_path / "bad", header, buffer, "__metadata__", "file is of version 2")


@pytest.mark.parametrize("name", [None, "pt", "Blocksparse"])
def test_other_safetensors_files(tmp_path, parts, name):
    header, buffer = parts
    del header["__metadata__"]["format"]
    if name is not None:
        header["__metadata__"]["format"] = name
    rule = "'format' must be 'blocksparse' .*no model file; export it first"
    refuse(tmp_path / "bad", header, buffer, "__metadata__", rule)


@pytest.mark.parametrize(
    ("key", "value", "tensor", "rule"),
    [
        ("graph", None, "__metadata__", "must have a graph"),
        ("more", "{}", "__metadata__", "no keys but"),
        ("graph", "{", "graph", "not strict JSON"),
        ("graph", "[]", "graph", "must be a JSON object, is list"),
        ("graph", "{}", None, "graph must have exactly the keys"),
        ("classes", "{}", "classes", "must be a JSON array, is dict"),
        ("classes", "[1,2,3,4]", "classes", "tuple of strings"),
        ("classes", '["a"]', "classes", "1 names do not fit"),
        ("classes", '["a","b","c","\\ud800"]', "classes", "not strict JSON"),
        ("provenance", "[]", "provenance", "must be a JSON object"),
        ("provenance", '{"a":Infinity}', "provenance", "not strict JSON"),
        ("preprocessing", "{}", None, "preprocessing must have exactly the keys"),
    ],
)
def test_keys(tmp_path, parts, key, value, tensor, rule):
    header, buffer = parts
    header["__metadata__"].pop(key, None)
    if value is not None:
        header["__metadata__"][key] = value
    refuse(tmp_path / "bad", header, buffer, tensor, rule)


def test_preprocessing_of_the_file_is_judged_too(tmp_path):
    write(tmp_path / "good", small_model(preprocessing=RGB))
    header, buffer = split((tmp_path / "good").read_bytes())
    tree = json.loads(header["__metadata__"]["preprocessing"])
    for change, rule in [
        ({"resize": [6, "5"]}, "resize must be"),
        ({"resize": {"a": 1}}, "resize must be"),
        ({"resize": 2**24}, "resize to 16777216"),
        ({"mean": 0.5}, "finite numbers"),
        ({"std": [1, 1, [1]]}, "finite numbers"),
        ({"channels": ["rgb"]}, "channels must be"),
    ]:
        header["__metadata__"]["preprocessing"] = json.dumps(tree | change)
        refuse(tmp_path / "bad", header, buffer, "preprocessing", rule)


# What is changed in the graph's tree: a path of keys, and the new value (DELETE removes the key).
DELETE = object()


@pytest.mark.parametrize(
    ("where", "value", "tensor", "rule"),
    [
        (["inputs"], {}, None, "graph inputs must be a JSON array"),
        (["inputs"], [], None, "one input and one output"),
        (["inputs", 0], [], None, "graph input must be a JSON object"),
        (["inputs", 0, "name"], 1, None, "name of a graph input must be a string"),
        (["inputs", 0, "shape"], [3, 6.0, 5], "x", "shape must be a JSON array of integers"),
        (["inputs", 0, "shape"], [3, True, 5], "x", "shape must be a JSON array of integers"),
        (["inputs", 0, "shape"], [3, 10**40, 5], "x", "sizes must be integers"),
        (["outputs"], ["body"], "classes", "do not fit"),
        (["outputs"], "head", None, "graph outputs must be a JSON array"),
        (["outputs", 0], 0, None, "graph output must be a string"),
        (["nodes"], {}, None, "graph nodes must be a JSON array"),
        (["nodes"], [], "head", "output must be a node"),
        (["nodes", 1], 1, None, "graph node must be a JSON object"),
        (["nodes", 1, "more"], 1, None, "graph node must have exactly the keys"),
        (["nodes", 1, "name"], None, None, "name of a graph node must be a string"),
        (["nodes", 1, "op"], None, None, "op of norm must be a string"),
        (["nodes", 1, "op"], "gelu", "norm", "op 'gelu' is unknown; version 1 has conv2d"),
        (["nodes", 1, "inputs"], "stem", None, "inputs must be a JSON array"),
        (["nodes", 1, "inputs", 0], ["stem"], None, "input of norm must be a string"),
        (["nodes", 1, "attrs"], [], "norm", "attrs must be a JSON object"),
        (["nodes", 1, "attrs", "more"], 1, "norm", "attrs must have exactly the keys"),
        (["nodes", 1, "attrs", "activation"], {"a": 1}, "norm", "activation must be one of"),
        (["nodes", 0, "attrs", "stride"], [[1], [1]], "stem", "stride must be 2 integers"),
        (["nodes", 1, "shape"], None, "norm", "shape must be a JSON array of integers"),
        (["nodes", 1, "bias"], False, None, "graph node must have exactly the keys"),
        (["nodes", 0, "bias"], DELETE, "stem", "conv2d must have a weight, and a bias"),
        (["nodes", 0, "bias"], 1, "stem", "conv2d must have a weight, and a bias"),
        (["nodes", 0, "bias"], False, "stem.bias", "tensor belongs to no node"),
        (["nodes", 2, "bias"], True, "body.bias", "tensor is missing"),
        (["nodes", 0, "weight"], DELETE, "stem", "conv2d must have a weight"),
        (["nodes", 0, "weight"], [], "stem", "weight layout must be one of dense, bsr, nm"),
        (["nodes", 0, "weight", "layout"], "csr", "stem", "weight layout must be one of"),
        (["nodes", 0, "weight", "layout"], ["bsr"], "stem", "weight layout must be one of"),
        (["nodes", 0, "weight", "block"], [1, 1], "stem", "weight must have exactly the keys"),
        (["nodes", 0, "weight", "shape"], [8, 3, 3], "stem", "2 or 4 sizes"),
        (["nodes", 0, "weight", "shape"], [8, 3, 3, -3], "stem", "2 or 4 sizes"),
        (["nodes", 0, "weight", "shape"], [8, 3, 1, 1], "stem", r"shape must be \(8, 8, 7\)"),
        (["nodes", 2, "weight", "n"], None, "body", "array of integers"),
        (["nodes", 2, "weight", "n"], 5, "body", "1 <= n <= m"),
        (["nodes", 2, "weight", "m"], 10**30, "body", "1 <= n <= m"),
        (["nodes", 2, "weight", "n"], 1, "body.weight.", "shape must be"),
        (["nodes", 4, "weight", "block"], 8, "head", "array of integers"),
        (["nodes", 4, "weight", "block"], [3], "head", "two positive sizes"),
        (["nodes", 4, "weight", "block"], [3, 9], "head.weight.data", "shape must be"),
        (["nodes", 4, "weight", "block"], [2**24, 2**24], "head", "are allowed"),
    ],
)
def test_graph_tree(tmp_path, parts, where, value, tensor, rule):
    header, buffer = copy.deepcopy(parts)
    tree = header["__metadata__"]["graph"]
    for key in where[:-1]:
        tree = tree[key]
    if value is DELETE:
        del tree[where[-1]]
    else:
        tree[where[-1]] = value
    with pytest.raises(FormatError, match=rule) as error:
        read(saved(tmp_path / "bad", join(header, buffer)))
    if tensor is None or not tensor.endswith("."):
        assert error.value.tensor == tensor
    else:
        assert error.value.tensor.startswith(tensor)
