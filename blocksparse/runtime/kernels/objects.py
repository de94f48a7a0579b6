"""Compiled kernels: built once for a machine, kept on disk, loaded in milliseconds.

What is kept is plain machine code, one object file for every micro-kernel and for every loop around
them, so that a process which finds it needs neither Numba nor LLVM. The key covers the source code,
the processor and the versions of the compilers, so a stale object is never loaded; a damaged one is
compiled again.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import ModuleType

from blocksparse.format import weights
from blocksparse.whole_file import write_whole_bytes

from ..locks import Lock
from . import elf
from .cache import cache_folder, compiler_versions
from .kernel import Kernel
from .target import Target, describe, host

_OTHER_SWITCHES = {
    "NUMBA_CACHE_DIR", "NUMBA_CPU_FEATURES", "NUMBA_CPU_NAME", "NUMBA_NUM_THREADS",
    "NUMBA_THREADING_LAYER",
}  # fmt: skip
"""Variables of Numba's that do not change the code, or are part of the target."""

_log = logging.getLogger(__name__)
_lock = Lock()
_addresses: dict[tuple[str, Target], int] = {}
_unwritable: set[Path] = set()  # folders of which that was said


def address(kernel: Kernel, target: Target | None = None) -> int:
    """Return the address of a compiled micro-kernel, compiling it where no cached object fits.

    Parameters
    ----------
    kernel : Kernel
        Which micro-kernel.
    target : Target, optional
        What to compile for; the host by default, and nothing else can be run.

    Returns
    -------
    int
        Address of the function.
    """
    target = target or host()

    def text() -> str:
        from .microkernels import write

        return write(kernel, target)

    return _address(kernel.name, target, text)


def loop_address(symbol: str, text: Callable[[], str]) -> int:
    """Return the address of a compiled loop, compiling it where no cached object fits.

    Parameters
    ----------
    symbol : str
        The function's name.
    text : callable
        Writes it as LLVM IR, see `compiler.loop_text`. It has to follow from the source code of
        this package.

    Returns
    -------
    int
        Address of the function.
    """
    return _address(symbol, host(), text)


def is_kept(symbol: str) -> bool:
    """Say whether there is a cached object of a loop, undamaged.

    Parameters
    ----------
    symbol : str
        The function's name.
    """
    return _read(_path(symbol, host(), sources())) is not None


def compile_text(name: str, text: str, target: Target) -> int:
    """Compile an LLVM module, or load the object kept on disk, and return a function's address.

    Parameters
    ----------
    name : str
        The function, which also names the object.
    text : str
        The module, as LLVM IR.
    target : Target
        The host, as code generation knows it.
    """
    return _load(name, target, text, lambda: text)


def _address(name: str, target: Target, text: Callable[[], str]) -> int:
    """Load what the source code of this package determines, once in a process."""
    with _lock:
        if (name, target) not in _addresses:
            _addresses[name, target] = _load(name, target, sources(), text)
        return _addresses[name, target]


def _load(name: str, target: Target, source: str, text: Callable[[], str]) -> int:
    path = _path(name, target, source)
    text = cache(text)  # both linkers may need an object
    if elf.SUPPORTED:
        try:
            return elf.link(_object(path, name, target, text, "small"), name)
        except elf.UnlinkableError as error:
            _log.info("%s is linked by LLVM: %s", name, error)
            path = path.with_suffix(".llvm.o")
    code = _object(path, name, target, text, "jitdefault")
    return import_compiler(name).link(code, name, target)


def _path(name: str, target: Target, source: str) -> Path:
    parts = (source, target.triple, target.cpu, target.features, str(target.lanes),
             compiler_versions())  # fmt: skip
    digest = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:24]
    return cache_folder() / f"{name}-{digest}.o"


def _object(path: Path, name: str, target: Target, text: Callable[[], str], model: str) -> bytes:
    """Read the object kept at `path`, or compile it for a code model and keep it."""
    code = _read(path)
    if code is None:
        compiler = import_compiler(name)
        code = compiler.emit(text(), target, model)
        _log.info("compiled %s for %s (once on this machine)", name, describe(target))
        _save(path, code)
    return code


def import_compiler(name: str) -> ModuleType:
    """Import `compiler`, and with it Numba and LLVM.

    Parameters
    ----------
    name : str
        What is to be compiled, for the error.

    Raises
    ------
    RuntimeError
        If they cannot be imported.
    """
    try:
        from . import compiler
    except ImportError as error:
        raise RuntimeError(
            f"{name} has to be compiled, and Numba cannot be imported ({error}): pip install numba"
        ) from error
    return compiler


@cache
def sources() -> str:
    """Digest of what decides on the code: this package, packed indices, Numba's own switches."""
    files = [*sorted(Path(__file__).parent.glob("*.py")), Path(weights.__file__)]
    switches = [
        f"{name}={value}"
        for name, value in sorted(os.environ.items())
        if name.startswith("NUMBA_") and name not in _OTHER_SWITCHES
    ]
    parts = [*(path.read_bytes() for path in files), *(switch.encode() for switch in switches)]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()


def _save(path: Path, code: bytes) -> None:
    """Keep an object with its checksum; a cache that cannot be written only costs time."""
    try:
        write_whole_bytes(path, hashlib.sha256(code).digest() + code)
    except OSError as error:
        if path.parent in _unwritable:
            return
        _unwritable.add(path.parent)
        _log.warning(
            "compiled kernels are not kept, every process compiles them again: cannot write %s "
            "(%s); set BLOCKSPARSE_CACHE to a folder that can be written",
            path.parent,
            error,
        )


def _read(path: Path) -> bytes | None:
    try:
        content = path.read_bytes()
    except OSError:
        return None
    digest, code = content[:32], content[32:]
    return code if hashlib.sha256(code).digest() == digest else None
