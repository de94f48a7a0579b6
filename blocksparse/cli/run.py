"""`blocksparse run`: predict on images."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from blocksparse.cli import console as ui
from blocksparse.cli import images

if TYPE_CHECKING:
    from blocksparse.runtime.network import Network

EPILOG = """\
examples:
  blocksparse run model.bsr.safetensors cat.jpg dog.png
  blocksparse run model.bsr.safetensors photos/ --top 1        every image below a folder
  blocksparse run model.bsr.safetensors inputs.npy --json      float array (N, C, H, W), as it is

Images are resized, cropped and normalised as the model file says (Pillow reads them:
`pip install pillow`), what is transparent as if it were not. A .npy array of floats,
(C, H, W) or (N, C, H, W), is taken as the network's input as it is; one of uint8,
(H, W) or (H, W, C), is an image."""


def add_parser(commands: Any) -> None:
    """Add the command to the parser's commands."""
    parser = commands.add_parser(
        "run",
        help="predict the class of images",
        description="Predict on images, image folders or .npy arrays.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    ui.add_file_argument(parser)
    parser.add_argument("images", nargs="+", metavar="IMAGE", help="image, .npy array or folder")
    parser.add_argument(
        "--top", type=ui.positive, default=3, metavar="K", help="classes shown per image (3)"
    )
    parser.add_argument(
        "--batch", type=ui.positive, default=8, metavar="N", help="images run at once (8)"
    )
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    ui.add_engine_arguments(parser)
    parser.set_defaults(run=command)


def command(arguments: argparse.Namespace) -> int:
    """Run the command and return the exit status."""
    path = ui.existing_file(arguments.file)
    files = images.expand(arguments.images)
    from blocksparse.runtime import load

    network = load(path, threads=arguments.threads, engine=arguments.engine)
    if len(network.output_shape) != 1:
        raise ui.CommandError(
            f"{path} is no classifier: its output has shape {network.output_shape} per image"
        )
    results: list[dict[str, Any]] = []
    with ui.progress("predicting", steps=len(files)) as bar:
        for names, batch, done in _batches(network, files, arguments.batch):
            logits = network(batch)
            _check(names, logits)
            results += [
                {"image": name, "predictions": _top(network, row, arguments.top)}
                for name, row in zip(names, logits, strict=True)
            ]
            ui.advance_to(bar, done / len(files))
    network.close()
    if arguments.json:
        ui.console().out(ui.json_text(results), end="")
        return 0
    grid = ui.table("image", "class", "probability", "logit", right=("probability", "logit"))
    for result in results:
        for rank, guess in enumerate(result["predictions"]):
            grid.add_row(
                ui.one_line(result["image"]) if rank == 0 else "",
                ui.one_line(guess["class"]),
                ui.percent(guess["probability"]),
                f"{guess['logit']:.3f}",
            )
    ui.console().print(grid)
    return 0


def _batches(
    network: Network, files: list[Path], size: int
) -> Iterator[tuple[list[str], images.Input, int]]:
    """Yield names, inputs (N, C, H, W) with N up to `size`, and how many files are through."""
    names: list[str] = []
    arrays: list[images.Input] = []
    for number, file in enumerate(files, start=1):
        for name, array in images.inputs(file, network.model.preprocessing, network.input_shape):
            names.append(name)
            arrays.append(array)
            if len(arrays) == size:
                yield names, np.stack(arrays), number
                names, arrays = [], []
    if arrays:
        yield names, np.stack(arrays), len(files)


def _check(names: list[str], logits: images.Input) -> None:
    """Refuse what no class follows from."""
    for name, row in zip(names, logits, strict=True):
        if not np.isfinite(row).all():
            raise ui.CommandError(
                f"{name}: the network's output is not finite, so there is nothing to predict; are "
                "the numbers of the image as large as those it was trained on?"
            )


def _top(network: Network, logits: images.Input, count: int) -> list[dict[str, Any]]:
    shifted = np.exp((logits - logits.max()).astype(np.float64))
    probabilities = shifted / shifted.sum()
    classes = network.model.classes
    order = np.argsort(-logits, kind="stable")[:count]
    return [
        {
            "class": classes[index] if classes is not None else f"class {index}",
            "index": int(index),
            "probability": float(probabilities[index]),
            "logit": float(logits[index]),
        }
        for index in order
    ]
