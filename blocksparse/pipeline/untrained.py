"""A network with random weights as a model file: ``python -m blocksparse.pipeline.untrained``.

`blocksparse what-if resnet50` runs this in a process of its own. So the command line imports no
training library, and no thread or memory of PyTorch is left where times are taken.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

CIFAR_SIZE = 32
"""Height and width of the images the CIFAR ResNets are made for."""


def make(name: str, path: Path, size: int | None = None) -> None:
    """Write a network with random weights as a model file.

    Parameters
    ----------
    name : str
        One of `blocksparse.training.model_names()`.
    path : Path
        The file to write.
    size : int, optional
        Height and width of an image, in pixels; by default those the network was made for.

    Raises
    ------
    ImportError
        PyTorch, or another library of training, is not installed.
    ValueError
        There is no such network, or the file cannot express it.
    """
    from blocksparse.export import export_model
    from blocksparse.format import write
    from blocksparse.training import build_model
    from blocksparse.training.models import CIFAR_RESNETS

    classes = 10 if name in CIFAR_RESNETS else 1000
    network = build_model(name, num_classes=classes)
    side = size or (CIFAR_SIZE if name in CIFAR_RESNETS else _usual_size(name))
    provenance = {"network": name, "weights": "random"}
    write(path, export_model(network, (3, side, side), provenance=provenance))


def _usual_size(name: str) -> int:
    """Height and width of the images that torchvision evaluates a network on, in pixels."""
    from torchvision.models import get_model_weights

    return int(next(iter(get_model_weights(name))).transforms().crop_size[0])


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; return 0, or 1 with one line on standard error."""
    parser = argparse.ArgumentParser(
        prog="python -m blocksparse.pipeline.untrained",
        description="Write a network with random weights as a model file.",
    )
    parser.add_argument("name", help="a classifier of torchvision, or a CIFAR ResNet")
    parser.add_argument("path", type=Path, help="the model file to write")
    parser.add_argument("--size", type=int, help="height and width of an image, in pixels")
    arguments = parser.parse_args(argv)
    try:
        make(arguments.name, arguments.path, arguments.size)
    except ImportError as error:
        sys.stderr.write(
            "to build a network by its name takes PyTorch and torchvision: "
            f'pip install "blocksparse[train]" ({error}); a model file needs neither\n'
        )
        return 1
    except (ValueError, RuntimeError, OSError) as error:
        sys.stderr.write(f"{' '.join(str(error).split())}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
