"""Compiled micro-kernels: built once for a machine, kept on disk, loaded in milliseconds.

Numba's own cache cannot keep code that is written at run time, so the micro-kernels are LLVM
modules of their own with an object cache on disk. The key covers the code, the processor and the
library versions, so a stale object is never loaded; a damaged one is compiled again.
"""

from __future__ import annotations

import hashlib
import logging
import os
import sys
import tempfile
import threading
from pathlib import Path

import llvmlite
import llvmlite.binding as llvm

from .microkernels import write
from .target import Target, describe, host
from .writer import Kernel

_log = logging.getLogger(__name__)
_lock = threading.Lock()
_addresses: dict[tuple[Kernel, Target], int] = {}
_engines: list[llvm.ExecutionEngine] = []  # the code lives as long as its engine


def cache_folder() -> Path:
    """Return the folder that keeps compiled kernels.

    The environment variable ``BLOCKSPARSE_CACHE`` overrides the platform's usual place.
    """
    if custom := os.environ.get("BLOCKSPARSE_CACHE"):
        return Path(custom)
    if sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA", Path.home() / "AppData" / "Local"))
    elif sys.platform == "darwin":
        base = Path.home() / "Library" / "Caches"
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    return base / "blocksparse"


def keep(path: Path, content: bytes) -> None:
    """Write a file of the cache whole or not at all, whoever else writes it at the same time.

    Raises
    ------
    OSError
        Where it cannot be written; nothing is left then.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
        try:
            file.write(content)
            file.close()
            os.replace(file.name, path)
        except OSError:
            Path(file.name).unlink(missing_ok=True)
            raise


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
    with _lock:
        if (kernel, target) not in _addresses:
            text = write(kernel, target)
            _addresses[kernel, target] = compile_text(kernel.name, text, target)
        return _addresses[kernel, target]


def target_machine(target: Target) -> llvm.TargetMachine:
    """Return LLVM's code generator for a target, at full optimisation."""
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    return llvm.Target.from_triple(target.triple).create_target_machine(
        cpu=target.cpu, features=target.features, opt=3, reloc="pic", jit=True
    )


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
    parts = (text, target.triple, target.cpu, target.features, llvmlite.__version__)
    digest = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:24]
    path = cache_folder() / f"{name}-{digest}.o"
    code = _read(path)
    machine = target_machine(target)
    if code is None:
        module = llvm.parse_assembly(text)
        module.verify()
        code = machine.emit_object(module)
        _log.info("compiled %s for %s (once on this machine)", name, describe(target))
        _save(path, code)
    # an object is only linked: of LLVM itself, 30 MB of code, little has to be in memory then
    engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), machine)
    engine.add_object_file(llvm.ObjectFileRef.from_data(code))
    engine.finalize_object()
    _engines.append(engine)
    return int(engine.get_function_address(name))


def _save(path: Path, code: bytes) -> None:
    """Keep an object with its checksum; a cache that cannot be written only costs time."""
    try:
        keep(path, hashlib.sha256(code).digest() + code)
    except OSError as error:
        _log.warning("compiled kernels are not kept: cannot write %s (%s)", path.parent, error)


def _read(path: Path) -> bytes | None:
    try:
        content = path.read_bytes()
    except OSError:
        return None
    digest, code = content[:32], content[32:]
    return code if hashlib.sha256(code).digest() == digest else None
