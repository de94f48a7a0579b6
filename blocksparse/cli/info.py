"""`blocksparse info`: what is in a model file."""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from blocksparse.cli import console as ui

if TYPE_CHECKING:
    from blocksparse.format import Model, Preprocessing, Weight

SHOWN_CLASSES = 8
SHOWN_CHARACTERS = 120  # of one line of the provenance

EPILOG = """\
examples:
  blocksparse info model.bsr.safetensors             layers, sizes, work, where it came from
  blocksparse info model.bsr.safetensors --explain   which kernel runs each layer here, and why
  blocksparse info model.bsr.safetensors --json      all of it, to be read by a program

density is the share of a layer's weights that are not zero. Values, indices and metadata add up to
the file. Kept parameters and FLOPs are those of the stored weights; FLOPs are two per multiply-add,
for one image."""


def add_parser(commands: Any) -> None:
    """Add the command to the parser's commands."""
    parser = commands.add_parser(
        "info",
        help="what is in the file: layers, sizes, work, classes, where it came from",
        description="Show what is in a model file.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    ui.add_file_argument(parser)
    parser.add_argument("--explain", action="store_true", help="show the kernel of each layer")
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    parser.set_defaults(run=command)


def command(arguments: argparse.Namespace) -> int:
    """Run the command and return the exit status."""
    path = ui.existing_file(arguments.file)
    from blocksparse.format.reader import read

    model = read(path)
    facts = describe(model, path)
    if arguments.explain:
        facts["explain"] = _choices(model)
    if arguments.json:
        ui.console().out(ui.json_text(facts), end="")
        return 0
    _show(facts)
    return 0


def describe(model: Model, path: Path) -> dict[str, Any]:
    """Gather everything `info` says, ready for JSON.

    Parameters
    ----------
    model : Model
        What the file holds.
    path : Path
        The file, for its size.

    Returns
    -------
    dict
        Sizes under names that carry their unit; densities in 0..1.
    """
    from blocksparse.perf.cost import cost, total

    costs = cost(model)
    sums = total(costs)
    weights = model.weights.values()
    values = sum(w.nbytes_values for w in weights) + sum(v.nbytes for v in model.vectors.values())
    indices = sum(w.nbytes_indices for w in weights)
    size = path.stat().st_size
    source = model.graph.inputs[0]
    return {
        "file": path.name,
        "input": {"name": source.name, "shape": list(source.shape)},
        "output": {"name": model.graph.outputs[0], "shape": list(model.output_shape)},
        "ops": dict(Counter(node.op for node in model.graph.nodes).most_common()),
        "layers": [
            {
                "name": node.name,
                "op": node.op,
                **_weight_facts(model.weights[node.name]),
                "output_shape": list(node.shape),
                "flops_dense": row.flops_dense,
                "flops_kept": row.flops_kept,
            }
            for node, row in zip(model.graph.nodes, costs, strict=True)
            if node.name in model.weights
        ],
        "bytes": {
            "file": size,
            "values": values,
            "indices": indices,
            "metadata": size - values - indices,
            "dense_float32": 4 * sums.parameters_dense,
        },
        "parameters": {"dense": sums.parameters_dense, "kept": sums.parameters_kept},
        "flops_per_image": {"dense": sums.flops_dense, "kept": sums.flops_kept},
        "classes": None if model.classes is None else list(model.classes),
        "preprocessing": _preprocessing_facts(model.preprocessing),
        "provenance": model.provenance,
    }


def layout(weight: Weight) -> str:
    """Return how a weight is stored, in a word: ``dense``, ``bsr 8x8``, ``2:4``."""
    from blocksparse.format import BsrWeight, NMWeight

    if isinstance(weight, BsrWeight):
        return f"bsr {weight.block[0]}x{weight.block[1]}"
    if isinstance(weight, NMWeight):
        return f"{weight.n}:{weight.m}"
    return "dense"


def _weight_facts(weight: Weight) -> dict[str, Any]:
    return {
        "shape": list(weight.shape),
        "layout": layout(weight),
        "density": weight.density,
        "value_bytes": weight.nbytes_values,
        "index_bytes": weight.nbytes_indices,
    }


def _preprocessing_facts(preprocessing: Preprocessing | None) -> dict[str, Any] | None:
    if preprocessing is None:
        return None
    from dataclasses import asdict

    return asdict(preprocessing)


def _choices(model: Model) -> list[dict[str, Any]]:
    from blocksparse.runtime import load

    with ui.progress("preparing the kernels (the first time on a machine takes seconds)"):
        network = load(model)
        rows = network.explain().rows
    network.close()
    return [{"name": r.name, "op": r.op, "kernel": r.kernel, "reason": r.reason} for r in rows]


def _show(facts: Mapping[str, Any]) -> None:
    out = ui.console()
    out.print(ui.one_line(facts["file"]))
    grid = ui.table(
        "layer", "op", "weight", "layout", "density", "bytes", right=("density", "bytes")
    )
    for row in facts["layers"]:
        grid.add_row(
            ui.one_line(row["name"]),
            row["op"],
            "x".join(map(str, row["shape"])),
            row["layout"],
            ui.percent(row["density"]),
            f"{row['value_bytes'] + row['index_bytes']:,}",
        )
    out.print(grid)
    summary = ui.table()
    summary.show_header = False
    summary.add_column(no_wrap=True)
    summary.add_column(overflow="fold")
    for name, text in _summary(facts):
        summary.add_row(name, text)
    out.print(summary)
    if "explain" in facts:
        kernels = ui.table("layer", "op", "kernel", "why")
        for row in facts["explain"]:
            kernels.add_row(ui.one_line(row["name"]), row["op"], row["kernel"], row["reason"])
        out.print(kernels)


def _summary(facts: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    for name in ("input", "output"):
        shape = " x ".join(map(str, facts[name]["shape"]))
        yield name, f"{ui.one_line(facts[name]['name'])}: {shape}, float32, per image"
    yield "graph", ", ".join(f"{count} {op}" for op, count in facts["ops"].items())
    size = {name: ui.bytes_text(count) for name, count in facts["bytes"].items()}
    parts = f"{size['values']} values + {size['indices']} indices + {size['metadata']} metadata"
    yield "file", f"{size['file']} = {parts}; dense float32: {size['dense_float32']}"
    yield "parameters", _kept_text(facts["parameters"], "")
    yield "work", _kept_text(facts["flops_per_image"], " FLOPs per image")
    yield "classes", _classes_text(facts["classes"])
    yield "preprocessing", _preprocessing_text(facts["preprocessing"])
    provenance = dict(_flatten(facts["provenance"])) or {"": "not recorded"}
    for index, (key, value) in enumerate(provenance.items()):
        text = ui.one_line(f"{key}: {value}" if key else str(value))
        if len(text) > SHOWN_CHARACTERS:
            text = f"{text[:SHOWN_CHARACTERS]}... (--json shows all)"
        yield "provenance" if index == 0 else "", text


def _kept_text(counts: Mapping[str, int], unit: str) -> str:
    kept, dense = ui.count_text(counts["kept"]), ui.count_text(counts["dense"])
    share = counts["kept"] / counts["dense"] if counts["dense"] else 1.0
    return f"{kept} of {dense}{unit} kept ({ui.percent(share)})"


def _classes_text(classes: list[str] | None) -> str:
    if classes is None:
        return "not recorded; `run` numbers them"
    names = ", ".join(ui.one_line(name) for name in classes[:SHOWN_CLASSES])
    return f"{len(classes)}: {names}{', ...' if len(classes) > SHOWN_CLASSES else ''}"


def _preprocessing_text(facts: Mapping[str, Any] | None) -> str:
    if facts is None:
        return "not recorded; `run` takes arrays only"
    steps = [facts["channels"]]
    if isinstance(facts["resize"], int):
        steps.append(f"shorter side to {facts['resize']}")
    elif facts["resize"] is not None:
        steps.append("resize to {} x {}".format(*facts["resize"]))
    if facts["crop"] is not None:
        steps.append("centre crop {} x {}".format(*facts["crop"]))
    mean, std = (", ".join(f"{v:.4g}" for v in facts[name]) for name in ("mean", "std"))
    return f"{', '.join(steps)}, pixels to 0..1, minus ({mean}), over ({std})"


def _flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, Mapping):
            yield from _flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
