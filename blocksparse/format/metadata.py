"""The ``__metadata__`` of a file: format and version, and what is said in JSON."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

from blocksparse.format.container import parse_json, render_json
from blocksparse.format.errors import FormatError
from blocksparse.format.graph import Graph, record
from blocksparse.format.layout import Layout
from blocksparse.format.model import Model, Preprocessing
from blocksparse.format.ops import MAX_DIM, MAX_VALUE, OPS

FORMAT = "blocksparse"
VERSION = 1

_CHANNELS = {"rgb": 3, "gray": 1}


@dataclass(frozen=True)
class Description:
    """What the metadata says.

    Parameters
    ----------
    graph : Graph
    layouts : dict of str to Layout
        Layout of each weight, by node name.
    biases : frozenset of str
        Names of the nodes that have a bias.
    classes, preprocessing, provenance
        As in :class:`~blocksparse.format.model.Model`.
    """

    graph: Graph
    layouts: dict[str, Layout]
    biases: frozenset[str]
    classes: tuple[str, ...] | None
    preprocessing: Preprocessing | None
    provenance: dict[str, Any]


def encode(model: Model) -> dict[str, str]:
    """Return the metadata of `model`, of which the graph and tensors were checked before.

    Raises
    ------
    FormatError
        Where classes, preprocessing or provenance break a rule or cannot be said in JSON.
    """
    graph = model.graph.to_json()
    for node in graph["nodes"]:
        if node["name"] in model.weights:
            node["weight"] = Layout.of(model.weights[node["name"]]).to_json()
            node["bias"] = f"{node['name']}.bias" in model.vectors
    check_classes(model.classes, model.output_shape)
    check_preprocessing(model.preprocessing, model.input_shape)
    metadata = {"format": FORMAT, "version": str(VERSION), "graph": render_json(graph)}
    if model.classes is not None:
        metadata["classes"] = _render("classes", list(model.classes), list)
    if model.preprocessing is not None:
        p = model.preprocessing
        fields = {
            "resize": list(p.resize) if isinstance(p.resize, tuple) else p.resize,
            "crop": None if p.crop is None else list(p.crop),
            "mean": [float(value) for value in p.mean],
            "std": [float(value) for value in p.std],
            "channels": p.channels,
        }
        metadata["preprocessing"] = _render("preprocessing", fields, dict)
    if model.provenance:
        metadata["provenance"] = _render("provenance", model.provenance, dict)
    return metadata


def as_stored(provenance: Mapping[str, Any]) -> dict[str, Any]:
    """Return `provenance` as a file gives it back: lists for tuples, texts for other keys.

    Raises
    ------
    FormatError
        Where it cannot be said in JSON.
    """
    text = _render("provenance", dict(provenance), dict)
    stored: dict[str, Any] = parse_json(text, "provenance", dict)
    return stored


def _render(key: str, tree: object, kind: type[dict] | type[list]) -> str:
    try:
        text = render_json(tree)
        parse_json(text, key, kind)  # what is written must be readable
        return text
    except FormatError:
        raise
    except (ValueError, TypeError, RecursionError) as error:
        raise FormatError(
            f"cannot be said in JSON: {error}",
            tensor=key,
            mend="give texts, finite numbers, true, false, null, and lists and objects of them",
        ) from None


def decode(metadata: Mapping[str, str]) -> Description:
    """Read the metadata of a file that passed :func:`check_version`.

    Whether the graph makes sense is for :func:`blocksparse.format.validate.check_graph` to say.

    Raises
    ------
    FormatError
        Where a key is missing, unknown, or breaks a rule.
    """
    known = {"format", "version", "graph", "classes", "preprocessing", "provenance"}
    if not {"graph"} <= set(metadata) <= known:
        raise FormatError(
            f"metadata must have a graph and no keys but {sorted(known)}, has {sorted(metadata)}",
            tensor="__metadata__",
        )
    graph, layouts, biases = _decode_graph(parse_json(metadata["graph"], "graph", dict))
    classes = preprocessing = None
    if "classes" in metadata:
        classes = tuple(parse_json(metadata["classes"], "classes", list))
    if "preprocessing" in metadata:
        preprocessing = _decode_preprocessing(metadata["preprocessing"])
    provenance: dict[str, Any] = {}
    if "provenance" in metadata:
        provenance = parse_json(metadata["provenance"], "provenance", dict)
    return Description(graph, layouts, biases, classes, preprocessing, provenance)


def check_version(metadata: Mapping[str, str]) -> None:
    """Raise FormatError unless the file is a model file of a version that can be read.

    To be called before anything else in the file is judged: a newer version may differ anywhere.
    """
    if metadata.get("format") != FORMAT:
        raise FormatError(
            f"metadata 'format' must be {FORMAT!r}",
            tensor="__metadata__",
            mend="a plain safetensors file of weights is no model file; export it first",
        )
    text = metadata.get("version")
    version = int(text) if text and text.isascii() and text.isdigit() and len(text) < 10 else 0
    if version > VERSION:
        raise FormatError(
            f"file is of version {version}, this library reads up to version {VERSION}",
            tensor="__metadata__",
            mend="install a newer blocksparse",
        )
    if text != str(VERSION):
        raise FormatError(
            f"metadata 'version' must be a whole number from 1, is {text!r}", tensor="__metadata__"
        )


def _decode_graph(tree: dict[str, Any]) -> tuple[Graph, dict[str, Layout], frozenset[str]]:
    """Split what is said of weights off the nodes, and read both."""
    layouts, biases = {}, set()
    nodes = tree.get("nodes")
    for node in nodes if isinstance(nodes, list) else []:
        if not isinstance(node, dict):
            continue  # Graph.from_json says so
        name, op = node.get("name"), node.get("op")
        if not isinstance(name, str) or not isinstance(op, str):
            continue
        if op in OPS and OPS[op].weighted:
            if not {"weight", "bias"} <= set(node) or type(node["bias"]) is not bool:
                raise FormatError(f"{op} must have a weight, and a bias true or false", tensor=name)
            layouts[name] = Layout.from_json(node.pop("weight"), name)
            if node.pop("bias"):
                biases.add(name)
    return Graph.from_json(tree), layouts, frozenset(biases)


def _decode_preprocessing(text: str) -> Preprocessing:
    keys = ("resize", "crop", "mean", "std", "channels")
    tree = record(parse_json(text, "preprocessing", dict), keys, "preprocessing")
    fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in tree.items()}
    return Preprocessing(**fields)


def check_classes(classes: tuple[str, ...] | None, output_shape: tuple[int, ...]) -> None:
    """Raise FormatError unless there is one class name per logit."""
    if classes is None:
        return
    if not isinstance(classes, tuple) or any(type(name) is not str for name in classes):
        raise FormatError("must be a tuple of strings", tensor="classes")
    if output_shape != (len(classes),):
        raise FormatError(
            f"{len(classes)} names do not fit an output of {output_shape}", tensor="classes"
        )


def check_preprocessing(p: Preprocessing | None, input_shape: tuple[int, ...]) -> None:
    """Raise FormatError unless `p` turns an image into an input of `input_shape`, (C, H, W)."""
    if p is None:
        return
    channels, *image = input_shape
    problem = None
    if not (p.resize is None or _size(p.resize) or _sizes(p.resize)):
        problem = f"resize must be null, a size or [height, width], is {p.resize!r}"
    elif channels * _least_pixels(p.resize) > MAX_VALUE:
        problem = f"a resize to {p.resize!r} takes more than {MAX_VALUE} values, before any crop"
    elif not (p.crop is None or _sizes(p.crop)):
        problem = f"crop must be null or [height, width], is {p.crop!r}"
    elif not isinstance(p.channels, str) or _CHANNELS.get(p.channels) != channels:
        problem = f"channels must be rgb for 3 channels, gray for 1; is {p.channels!r}"
    elif not (_numbers(p.mean, channels) and _numbers(p.std, channels) and min(p.std) > 0):
        problem = f"mean and std must be {channels} finite numbers each, std positive"
    else:
        final = p.crop if p.crop is not None else p.resize
        if isinstance(final, tuple) and final != tuple(image):
            problem = f"gives images of {final}, the network takes {tuple(image)}"
    if problem is not None:
        raise FormatError(problem, tensor="preprocessing")


def _least_pixels(resize: tuple[int, int] | int | None) -> int:
    """Return the pixels of an image that was resized; of a square one, if its aspect is kept."""
    if resize is None:
        return 0
    return resize**2 if isinstance(resize, int) else prod(resize)


def _size(value: object) -> bool:
    return type(value) is int and 1 <= value <= MAX_DIM


def _sizes(value: object) -> bool:
    return isinstance(value, tuple) and len(value) == 2 and all(map(_size, value))


def _numbers(value: object, count: int) -> bool:
    return (
        isinstance(value, tuple)
        and len(value) == count
        and all(type(v) in (int, float) and abs(v) < 1e30 for v in value)
    )
