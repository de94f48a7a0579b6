"""The engines that are compared: how each is built, limited in threads, and run.

Every engine takes and gives NumPy arrays, computes in float32, and is told to use the same number
of threads.
"""

# N images, C H W image

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from textwrap import shorten
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from benchmarks.figures import OURS
from blocksparse.runtime import Network

Array = npt.NDArray[np.float32]
Run = Callable[[Array], Array]

HOW_TO_ADD = 'add it with: pip install -e ".[bench]"'
OPSET = 17
LONGEST = 300  # characters of an engine's own message, which may go on for pages


class UnavailableError(Exception):
    """An engine that cannot run here; the message is one line on why and how to mend it."""


@dataclass(frozen=True)
class Source:
    """A network as the peers take it.

    Attributes
    ----------
    network : nn.Module
        Float32, in evaluation mode.
    image : Tensor [1, C, H, W]
        One that it takes.
    path : Path
        Where `onnx` writes the network.
    """

    network: nn.Module
    image: torch.Tensor
    path: Path

    def onnx(self) -> Path:
        """Return the network as ONNX, its batch dimension named ``batch``.

        The first engine that asks has it written: the others can do without, and without the
        package ``onnx``.

        Raises
        ------
        UnavailableError
            If the package ``onnx`` is not installed, or PyTorch cannot write this network.
        """
        if self.path.exists():
            return self.path
        try:
            import_module("onnx")  # PyTorch says that it is missing after all its work only
        except (ImportError, OSError) as error:
            raise UnavailableError(
                f"no network can be written as ONNX: {error}; {HOW_TO_ADD}"
            ) from error
        try:
            _write_onnx(self.network, self.image, self.path)
        except Exception as error:  # every operation has an exporter, which raises as it likes
            raise UnavailableError(
                f"PyTorch cannot write the network as ONNX: {_short(error)}; another version of "
                "PyTorch may do"
            ) from error
        return self.path


def _write_onnx(network: nn.Module, image: torch.Tensor, path: Path) -> None:
    with warnings.catch_warnings():
        # The exporter that is asked for writes one file and needs onnx alone; PyTorch says at
        # every call that there is a newer one.
        warnings.simplefilter("ignore")
        torch.onnx.export(
            network,
            (image,),
            str(path),
            dynamo=False,
            opset_version=OPSET,
            input_names=["images"],
            output_names=["logits"],
            dynamic_axes={"images": {0: "batch"}, "logits": {0: "batch"}},
        )


@dataclass(frozen=True)
class Engine:
    """One network in one engine, ready to be called.

    Attributes
    ----------
    kind : str
        The engine: `OURS` or one of `PEERS`.
    run : callable
        Float32 [N, C, H, W] to logits [N, classes].
    sparsity : float
        Share of the prunable weights that are zero, 0..1.
    """

    kind: str
    run: Run
    sparsity: float = 0.0

    @property
    def name(self) -> str:
        """What it is called in tables."""
        what = "dense" if self.sparsity == 0 else f"{100 * self.sparsity:g} % sparse"
        kept = ", zeros kept" if self.sparsity and self.kind != OURS else ""
        return f"{self.kind}, {what}{kept}"


def ours(network: Network, sparsity: float, threads: int) -> Engine:
    """Return a loaded file as an engine."""
    network.threads = threads
    return Engine(OURS, network, sparsity)


def build(kind: str, source: Source, shape: tuple[int, ...], threads: int) -> Run:
    """Build a peer.

    Parameters
    ----------
    kind : str
        One of `PEERS`.
    source : Source
        What it is to run.
    shape : tuple of int
        Of its inputs, (N, C, H, W); engines that can are compiled for it alone.
    threads : int
        What it may use.

    Returns
    -------
    callable
        Float32 [N, C, H, W] to logits [N, classes].

    Raises
    ------
    UnavailableError
        It is not installed, or fails to build.
    """
    module = load(kind)
    try:
        return PEERS[kind].build(module, source, shape, threads)
    except UnavailableError:
        raise
    except Exception as error:  # engines raise of all kinds, many derived from Exception alone
        raise UnavailableError(
            f"it failed to build: {_short(error)}; another version of it may do, and "
            f"--without {kind} spares the attempt"
        ) from error


def load(kind: str) -> Any:
    """Import a peer.

    Raises
    ------
    UnavailableError
        If it is not installed.
    """
    peer = PEERS[kind]
    try:
        return import_module(peer.module)
    except (ImportError, OSError) as error:  # OSError: a shared library of it is missing
        raise UnavailableError(f"{error}; {peer.how_to_add}") from error


def _short(error: Exception) -> str:
    return shorten(str(error), LONGEST) or type(error).__name__


def version(kind: str) -> str:
    """Return the version of an installed peer."""
    full = str(import_module(PEERS[kind].module).__version__)
    return full.partition("-")[0]  # OpenVINO's goes on with its commit and branch


def _onnxruntime(ort: Any, source: Source, shape: tuple[int, ...], threads: int) -> Run:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.add_free_dimension_override_by_name("batch", shape[0])
    # Its threads spin inside a call, as by default, and not between calls, where they would
    # take the processor from the next engine.
    options.add_session_config_entry("session.force_spinning_stop", "1")
    options.log_severity_level = 3
    session = ort.InferenceSession(str(source.onnx()), options, providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda images: session.run(None, {name: images})[0]


def _openvino(ov: Any, source: Source, shape: tuple[int, ...], threads: int) -> Run:
    core = ov.Core()
    model = core.read_model(str(source.onnx()))
    model.reshape(list(shape))
    hints = {
        "INFERENCE_PRECISION_HINT": "f32",  # else it takes bfloat16 where the processor has it
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_NUM_THREADS": threads,
    }
    request = core.compile_model(model, "CPU", hints).create_infer_request()
    return lambda images: request.infer({0: images}, share_inputs=True)[0]


def _torch_eager(_: Any, source: Source, shape: tuple[int, ...], threads: int) -> Run:
    torch.set_num_threads(threads)
    return _without_gradients(source.network)


def _torch_compile(_: Any, source: Source, shape: tuple[int, ...], threads: int) -> Run:
    torch.set_num_threads(threads)
    torch.compiler.reset()  # nothing is left of another setting, and no limit on recompiling is met
    run = _without_gradients(torch.compile(source.network, dynamic=False))
    try:
        run(np.zeros(shape, np.float32))  # compiled at the first call
    except Exception as error:  # the compiler, its back end and the C++ compiler raise of all kinds
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise UnavailableError(
            f"it failed: {first}; it needs a C++ compiler, such as g++"
        ) from error
    return run


def _without_gradients(network: Callable[[torch.Tensor], torch.Tensor]) -> Run:
    @torch.no_grad()
    def run(images: Array) -> Array:
        return network(torch.from_numpy(images)).numpy()

    return run


def _deepsparse(deepsparse: Any, source: Source, shape: tuple[int, ...], threads: int) -> Run:
    engine = deepsparse.compile_model(str(source.onnx()), batch_size=shape[0], num_cores=threads)
    return lambda images: engine.run([images])[0]


@dataclass(frozen=True)
class Peer:
    """How an engine is imported and built, and what to do where it is not installed."""

    module: str
    build: Callable[[Any, Source, tuple[int, ...], int], Run]
    how_to_add: str = HOW_TO_ADD
    reads_onnx: bool = True


# In the order of `figures.PEERS`, which names them without importing PyTorch.
PEERS = {
    "onnxruntime": Peer("onnxruntime", _onnxruntime),
    "openvino": Peer("openvino", _openvino),
    "torch-eager": Peer("torch", _torch_eager, reads_onnx=False),
    "torch-compile": Peer("torch", _torch_compile, reads_onnx=False),
    "deepsparse": Peer(
        "deepsparse",
        _deepsparse,
        "it is retired; where Python and NumPy are old enough: pip install deepsparse",
    ),
}
BY_ONNX = [kind for kind, peer in PEERS.items() if peer.reads_onnx]
