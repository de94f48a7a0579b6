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

from numba import njit
from numba.core import config


def _probe() -> None:
    """Serve to ask Numba whether it can keep code of this package."""


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
