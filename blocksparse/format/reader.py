"""Reading a model file: everything is checked, nothing is copied."""

from __future__ import annotations

import mmap
import os
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from blocksparse.format.container import DTYPES, Header, place_tensors, read_header
from blocksparse.format.errors import FormatError
from blocksparse.format.metadata import check_classes, check_preprocessing, check_version, decode
from blocksparse.format.model import Model
from blocksparse.format.validate import (
    check_contents,
    check_graph,
    check_tensors,
    expected_tensors,
    vector_shapes,
)
from blocksparse.format.weights import Weight


def read(path: str | os.PathLike[str]) -> Model:
    """Read a model file.

    Parameters
    ----------
    path : path-like

    Returns
    -------
    Model
        Its arrays are read-only views of the memory-mapped file, which stays mapped while one of
        them lives. Replace a file that is in use by renaming another over it, as
        :func:`~blocksparse.format.writer.write` does; do not write into it.

    Raises
    ------
    FormatError
        Where the file breaks a rule of the format, naming the tensor or node and the rule.
    FileNotFoundError
        Where there is no such file.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file; export.py writes model files")
    try:
        return _read(path)
    except FormatError as error:
        raise error.at(path) from None


def _read(path: Path) -> Model:
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        metadata, entries, start = read_header(file, size)
        check_version(metadata)
        header = place_tensors(metadata, entries, start, size)
        said = decode(header.metadata)
        check_graph(said.graph, said.layouts)
        check_tensors(expected_tensors(said.graph, said.layouts, said.biases), header.tensors)
        arrays = _map(file.fileno(), header)
    weights = {name: layout.build(name, arrays) for name, layout in said.layouts.items()}
    vectors = {name: arrays[name] for name in vector_shapes(said.graph, said.biases)}
    model = Model(
        graph=said.graph,
        weights=weights,
        vectors=vectors,
        classes=said.classes,
        preprocessing=said.preprocessing,
        provenance=said.provenance,
    )
    check_classes(model.classes, model.output_shape)
    check_preprocessing(model.preprocessing, model.input_shape)
    check_contents(model)
    for weight in model.weights.values():
        release(weight)
    return model


def release(weight: Weight) -> None:
    """Let the operating system take back the memory behind a weight of a mapped file.

    Its values stay what they are, and are read from the file again where they are asked for. A
    weight that lies elsewhere, or in a mapping that can be written to, is left alone.

    Parameters
    ----------
    weight : Weight
        Of any model, one that `read` returned or another.
    """
    if not hasattr(mmap, "MADV_DONTNEED"):
        return
    for array in vars(weight).values():
        mapped = array.base if isinstance(array, np.ndarray) else None
        while isinstance(mapped, np.ndarray):
            mapped = mapped.base
        # what was written into a private mapping of somebody else's would be lost
        if isinstance(mapped, mmap.mmap) and memoryview(mapped).readonly and array.nbytes:
            start = array.ctypes.data - np.frombuffer(mapped, np.uint8).ctypes.data
            first = start - start % mmap.PAGESIZE
            mapped.madvise(mmap.MADV_DONTNEED, first, start + array.nbytes - first)


def _map(descriptor: int, header: Header) -> dict[str, npt.NDArray[Any]]:
    """Return each tensor as a view of the mapped file."""
    mapped = mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ)
    return {
        name: np.ndarray(spec.shape, DTYPES[spec.dtype], mapped, header.offsets[name])
        for name, spec in header.tensors.items()
    }
