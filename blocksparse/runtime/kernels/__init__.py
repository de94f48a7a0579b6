"""The kernels: LLVM vector code for the products, plain Numba loops around it.

``target`` says what the processor offers, ``microkernels`` writes the vector code for it,
``objects`` compiles and keeps it, ``intrinsics`` lets Numba call it, and the other modules are the
loops: one 2-D primitive each.
"""

from __future__ import annotations

import atexit
import logging
import shutil
import tempfile
from pathlib import Path

from numba import njit
from numba.core import config


def forget_stale(folder: Path) -> None:
    """Remove Numba's caches of a package if any of its files changed since they were made.

    Numba looks only at the file of the function that it kept. The loops here have the layout of
    records compiled in, so a change of one file makes the code of all others wrong, silently.

    Parameters
    ----------
    folder : Path
        The package.
    """
    kept = folder / "__pycache__"
    stamp = kept / "numba-sources.txt"
    sources = ((path.name, path.stat()) for path in sorted(folder.glob("*.py")))
    state = "\n".join(f"{name} {stat.st_mtime_ns} {stat.st_size}" for name, stat in sources)
    try:
        if stamp.exists() and stamp.read_text(encoding="utf-8") == state:
            return
        for path in kept.glob("*.nb[ic]"):
            path.unlink(missing_ok=True)
        kept.mkdir(exist_ok=True)
        stamp.write_text(state, encoding="utf-8")
    except OSError:
        # A package that cannot be written is not edited either: it was installed as a whole.
        return


def _probe() -> None:
    """Serve to ask Numba whether it can keep code of this package."""


forget_stale(Path(__file__).parent)
try:
    njit(cache=True, nogil=True)(_probe)
except RuntimeError as error:
    # Read-only packages and no home folder, as in many containers: Numba refuses to compile at all
    # where it cannot keep the result. A folder that lives as long as the process costs only time.
    config.CACHE_DIR = tempfile.mkdtemp(prefix="blocksparse-")
    atexit.register(shutil.rmtree, config.CACHE_DIR, ignore_errors=True)
    logging.getLogger(__name__).warning(
        "compiled loops are not kept, every process compiles them again: %s; set NUMBA_CACHE_DIR "
        "to a folder that can be written",
        error,
    )
