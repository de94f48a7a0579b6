"""The loops around the micro-kernels: which there are, and how all get compiled.

They are few, they take long to compile, and nearly every network needs most of them. So all are
compiled when the first is asked for, by as many processes as there are cores, at most four.
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import threading
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from . import objects
from . import records as r
from .cache import cache_folder
from .target import usable_cores

_log = logging.getLogger(__name__)

PROGRAM = "program"
"""`program.run`, which walks the steps."""

ITEMS = {
    r.POOL: "pool",
    r.WINOGRAD: "winograd",
    r.TILES_CONV: "tiles",
    r.CONV: "conv",
    r.CONV_NM: "conv",
    r.ELEMENTWISE: "elementwise",
    r.COPY: "copy",
    r.LOAD: "copy",
    r.STORE: "copy",
    r.LINEAR: "linear",
    r.LINEAR_NM: "linear",
    r.ADAPTIVE_POOL: "adaptive_pool",
}
"""The function in `items` that computes a kind of step."""

FAST = {r.COPY: "phases", r.POOL: "fast_pool"}
"""The one for copies and pools that have a micro-kernel."""

# in the order of the time they take, so that every n-th makes equal shares
_NAMES = (*dict.fromkeys(ITEMS.values()), *FAST.values(), PROGRAM)

_PROCESSES = 4

_lock = threading.Lock()
_addresses: dict[str, int] = {}


def address(name: str) -> int:
    """Return the address of a loop, compiling all of them where no cached objects fit.

    Parameters
    ----------
    name : str
        `PROGRAM`, or a value of `ITEMS` or `FAST`.

    Returns
    -------
    int
        Address of a C function; see `compiler.loop_text`.
    """
    with _lock:
        if not _addresses:
            missing = [name for name in _NAMES if not objects.is_kept(_symbol(name))]
            if missing:
                _log.warning(
                    "blocksparse compiles its kernels for this processor, once: ten to twenty "
                    "seconds, less with many cores"
                )
                _compile(missing)
            _addresses.update({name: build(name) for name in _NAMES})
    return _addresses[name]


def build(name: str) -> int:
    """Return the address of one loop, compiling it alone where no cached object fits."""

    def text() -> str:
        from . import items, program
        from .compiler import loop_text

        function = program.run if name == PROGRAM else getattr(items, name)
        return loop_text(function, _symbol(name))

    return objects.loop_address(_symbol(name), text)


def _symbol(name: str) -> str:
    return f"blocksparse_{name}"


def _compile(names: Sequence[str]) -> None:
    """Put the objects of some loops into the cache folder, as far as that goes.

    What a helper cannot do, or that there is none, is made up for by whoever needs the loop.
    """
    processes = min(usable_cores(), _PROCESSES, len(names)) if _has_python() else 1
    helpers: list[subprocess.Popen[bytes]] = []
    try:
        with suppress(OSError):
            helpers.extend(_start(names[first::processes]) for first in range(1, processes))
        for name in names[::processes]:
            build(name)
        for helper in helpers:
            helper.wait()
    finally:
        for helper in helpers:
            helper.kill()


def _has_python() -> bool:
    """Whether a Python can be started that writes to the cache folder."""
    frozen = getattr(sys, "frozen", False) or "python" not in Path(sys.executable or "").name
    folder = cache_folder()
    with suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
    return not frozen and os.access(folder, os.W_OK)


def _start(names: Sequence[str]) -> subprocess.Popen[bytes]:
    command = "import sys; from blocksparse.runtime.kernels.loops import build"
    command += "; [build(name) for name in sys.argv[1:]]"
    root = Path(__file__).resolve().parents[3]
    path = os.pathsep.join(filter(None, [str(root), os.environ.get("PYTHONPATH")]))
    return subprocess.Popen(
        [sys.executable, "-P", "-c", command, *names],
        env={**os.environ, "PYTHONPATH": path},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
