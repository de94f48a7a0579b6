"""Writing a model file: whole under its final name, or not at all."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

import numpy as np

from blocksparse.format.container import DTYPES, Header, TensorSpec, header_bytes, render_header
from blocksparse.format.errors import FormatError
from blocksparse.format.layout import Arrays
from blocksparse.format.metadata import encode
from blocksparse.format.model import Model
from blocksparse.format.validate import check_model, model_arrays


def write(path: str | os.PathLike[str], model: Model) -> None:
    """Write `model` to `path`, the same bytes for the same model.

    The file is written under a temporary name in the same folder, flushed to disk, and then
    renamed: a reader sees the old file or the new one, and a failure leaves the old one as it was.

    Parameters
    ----------
    path : path-like
        By custom ``<name>.bsr.safetensors``. An existing file is replaced.
    model : Model

    Raises
    ------
    FormatError
        Where the model breaks a rule of the format; nothing is written.
    FileNotFoundError
        Where the folder does not exist.
    """
    path = Path(path)
    try:
        header, arrays = _lay_out(model)
        head = header_bytes(header)
    except FormatError as error:
        raise error.at(path) from None
    if not path.parent.is_dir():
        raise FileNotFoundError(f"{path.parent}: no such folder to write {path.name} in; create it")
    temporary = path.parent / f".{path.name}.{secrets.token_hex(4)}.tmp"
    try:
        with temporary.open("xb") as file:
            file.write(head)
            for name in header.tensors:
                file.write(np.ascontiguousarray(arrays[name]).reshape(-1).view(np.uint8).data)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def file_size(model: Model) -> int:
    """Return the bytes of the file that :func:`write` makes of `model`, without writing it.

    Raises
    ------
    FormatError
        Where the model breaks a rule of the format.
    """
    header, arrays = _lay_out(model)
    return len(header_bytes(header)) + sum(array.nbytes for array in arrays.values())


def _lay_out(model: Model) -> tuple[Header, Arrays]:
    check_model(model)
    arrays = model_arrays(model)
    names = {dtype: name for name, dtype in DTYPES.items()}
    specs = {name: TensorSpec(names[a.dtype], a.shape) for name, a in arrays.items()}
    return render_header(encode(model), specs), arrays
