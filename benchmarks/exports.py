"""What is made once per network and used by every setting: files, and PyTorch's outputs."""

# N images

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

import blocksparse
from benchmarks.engines import Array, Engine, Source, ours
from benchmarks.networks import default_image, dense_network, pruned_network, random_images
from blocksparse.export import export_model
from blocksparse.format import write
from blocksparse.perf import cost, total, usable_cores
from blocksparse.runtime import Network
from blocksparse.runtime.tolerance import tolerance
from blocksparse.sparsity import Block, Pattern


class MismatchError(RuntimeError):
    """An engine whose outputs are not those of PyTorch: there is no use in timing it."""


@dataclass(frozen=True)
class Agreement:
    """How far an engine's logits are from PyTorch's.

    Attributes
    ----------
    max_error, allowed : float
        Largest absolute difference, and what float32 rounding explains.
    """

    max_error: float
    allowed: float


@dataclass(frozen=True)
class File:
    """One network at one sparsity.

    Attributes
    ----------
    sparsity : float
        Of the prunable weights, 0..1.
    network : Network
        The exported file, loaded.
    logits : ndarray of float32 [N, classes]
        PyTorch's, of all images.
    bytes : int
        Of the file.
    parameters, parameters_kept, flops, flops_kept : int
        Of the whole network, batch norms folded; FLOPs are per image.
    """

    sparsity: float
    network: Network
    logits: Array
    bytes: int
    parameters: int
    parameters_kept: int
    flops: int
    flops_kept: int


@dataclass(frozen=True)
class Exports:
    """A network at several sparsities, in every form that an engine takes.

    Attributes
    ----------
    images : ndarray of float32 [N, C, H, W]
        As many as the largest batch has.
    dense : Source
        The dense network.
    zeros : Source, optional
        The sparsest network, its zeros kept.
    files : tuple of File
        In the order in which sparsities were asked for.
    """

    images: Array
    dense: Source
    zeros: Source | None
    files: tuple[File, ...]

    def file(self, sparsity: float) -> File:
        """Return the file of a sparsity."""
        return next(file for file in self.files if file.sparsity == sparsity)

    def check(self, engine: Engine, batch: int) -> Agreement:
        """Compare an engine with PyTorch on a batch.

        Raises
        ------
        MismatchError
            If they differ by more than float32 rounding explains.
        """
        file = self.file(engine.sparsity)
        expected = file.logits[:batch]
        got = engine.run(self.images[:batch])
        allowed = tolerance(file.network.model, float(np.abs(expected).max()))
        if got.shape != expected.shape:
            raise MismatchError(
                f"{engine.name}: gives {got.shape}, PyTorch {expected.shape}; nothing was timed"
            )
        error = float(np.abs(got - expected).max())
        if not error <= allowed:  # `not <=` so that NaN fails, too
            raise MismatchError(
                f"{engine.name}: logits differ from PyTorch's by up to {error:.3g}, and float32 "
                f"rounding explains {allowed:.3g}. It computes another network, or not in float32; "
                "nothing was timed"
            )
        return Agreement(error, allowed)

    def close(self) -> None:
        """Let go of the loaded files."""
        for file in self.files:
            file.network.close()


def make(
    model: str,
    image: int,
    sparsities: Sequence[float],
    pattern: Block,
    count: int,
    seed: int,
    folder: Path,
    zeros: bool = False,
    on_step: Callable[[float], None] | None = None,
) -> Exports:
    """Make a network, its sparse versions, and everything that engines read.

    Parameters
    ----------
    model : str
        Name of the network.
    image : int
        Height and width of images, in pixels.
    sparsities : sequence of float
        Each in 0..1; the dense file is always made, for it holds what the peers run.
    pattern : Block
        What is zero together.
    count : int
        Images.
    seed : int
        Of weights and images.
    folder : Path
        An empty one, to be kept as long as the exports are used.
    zeros : bool
        Whether to make `Exports.zeros`.
    on_step : callable, optional
        Told the share of the work that is done, 0..1.
    """
    images = random_images(count, image, seed)
    dense = dense_network(model, image, seed)
    wanted = list(dict.fromkeys([0.0, *sparsities]))
    files, keeping = [], None
    for done, sparsity in enumerate(wanted, 1):
        network, patterns = dense, dict[str, Pattern]()
        if sparsity:
            network, patterns = pruned_network(dense, sparsity, pattern, image, seed)
        files.append(_file(network, patterns, sparsity, images, _path(folder, sparsity)))
        if zeros and sparsity == max(wanted) > 0:
            keeping = Source(network, images[:1], folder / "zeros.onnx")
        if on_step is not None:
            on_step(done / len(wanted))
    source = Source(dense, images[:1], folder / "dense.onnx")
    return Exports(np.ascontiguousarray(images.numpy()), source, keeping, tuple(files))


def sparse_file(
    model: str, image: int | None, sparsity: float, folder: Path
) -> tuple[Path, Source]:
    """Export one sparse network, and return the dense one beside it; seed 0, blocks shared.

    Parameters
    ----------
    model : str
        Name of the network.
    image : int, optional
        Height and width of images, in pixels; what the network was designed for by default.
    sparsity : float
        Of the prunable weights, 0..1.
    folder : Path
        Where the file goes, and the dense network if it is asked for as ONNX.

    Returns
    -------
    file : Path
        The sparse network.
    dense : Source
        The dense one.
    """
    size = image or default_image(model)
    with closing(make(model, size, [sparsity], Block(8, 8), 1, 0, folder)) as made:
        made.check(ours(made.file(sparsity).network, sparsity, usable_cores()), 1)
        return _path(folder, sparsity), made.dense


def _path(folder: Path, sparsity: float) -> Path:
    return folder / f"{sparsity:g}.bsr.safetensors"


def _file(
    network: nn.Module,
    patterns: Mapping[str, Pattern],
    sparsity: float,
    images: torch.Tensor,
    path: Path,
) -> File:
    # not verified here: whoever runs the file compares it with PyTorch before, see `Exports.check`
    write(path, export_model(network, tuple(images.shape[1:]), patterns=patterns))
    with torch.no_grad():
        logits = network(images).numpy()
    runtime = blocksparse.load(path)
    work = total(cost(runtime.model))
    return File(
        sparsity=sparsity,
        network=runtime,
        logits=logits,
        bytes=path.stat().st_size,
        parameters=work.parameters_dense,
        parameters_kept=work.parameters_kept,
        flops=work.flops_dense,
        flops_kept=work.flops_kept,
    )
