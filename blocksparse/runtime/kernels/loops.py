"""The loops around the micro-kernels: which there are, and how all get compiled.

They are few, they take long to compile, and nearly every network needs most of them. So all are
compiled when the first is asked for, each apart, by as many processes as there are cores, at most
four.
"""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from importlib import import_module
from pathlib import Path

from blocksparse.whole_file import write_whole_bytes

from ..limits import memory_limit, usable_cores
from ..locks import Lock
from . import objects
from . import records as r
from .cache import cache_folder

_log = logging.getLogger(__name__)

PROGRAM = "program.run"
"""What walks the steps."""

ITEMS = {
    r.POOL: "pooling.pool_item",
    r.WINOGRAD: "winograd.winograd_item",
    r.TILES_CONV: "winograd_tiles.tiles_item",
    r.LINES_CONV: "winograd_lines.lines_item",
    r.CONV: "convolution.conv_item",
    r.CONV_NM: "convolution.conv_item",
    r.ELEMENTWISE: "elementwise.elementwise_item",
    r.COPY: "copying.copy_item",
    r.LOAD: "copying.copy_item",
    r.STORE: "copying.copy_item",
    r.LINEAR: "linear.linear_item",
    r.LINEAR_NM: "linear.linear_item",
    r.ADAPTIVE_POOL: "pooling.adaptive_pool_item",
}
"""What computes one item of a kind of step.

A function of this package. It takes the address of the call's record (see `call_record`), that of
the step's record (see `records`), the number of the item, the address of this thread's scratch
memory, and the number of the step.
"""

FAST = {
    r.COPY: "copying.phases_item",
    r.POOL: "pooling.fast_pool_item",
    r.ADAPTIVE_POOL: "pooling.mean_item",
}
"""The same for copies and pools that have a micro-kernel."""

# in the order of the time they take, from 3 s to 0.4, so that every n-th makes equal shares
_NAMES = (*dict.fromkeys(ITEMS.values()), *FAST.values(), PROGRAM)

# more would wait for the first loop, which takes a fifth of all; and each wants its memory
_PROCESSES = 4
_PROCESS_BYTES = 2**29

_lock = Lock()
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
                objects.import_compiler(PROGRAM)  # if there is none, that is all there is to say
                _log.warning(
                    "blocksparse compiles its kernels for this processor, once: ten to twenty "
                    "seconds, less with many cores"
                )
                _compile(missing)
            _addresses.update({name: build(name) for name in _NAMES})
    return _addresses[name]


def build(name: str) -> int:
    """Return the address of one loop, compiling it alone where no cached object fits.

    Parameters
    ----------
    name : str
        As for `address`.

    Returns
    -------
    int
        Address of a C function.
    """

    def text() -> str:
        from .compiler import loop_text

        module, function = name.split(".")
        loop = getattr(import_module(f".{module}", __package__), function)
        return loop_text(loop, _symbol(name))

    return objects.loop_address(_symbol(name), text)


def _symbol(name: str) -> str:
    return f"blocksparse_{name.split('.')[1]}"


def _compile(names: Sequence[str]) -> None:
    """Put the objects of some loops into the cache folder, as far as that goes.

    What a helper cannot do, or that there is none, is made up for by whoever needs the loop.
    """
    room = max(1, memory_limit() // _PROCESS_BYTES)
    processes = min(usable_cores(), _PROCESSES, len(names), room) if _can_share() else 1
    helpers: list[subprocess.Popen[bytes]] = []
    try:
        with suppress(OSError):
            helpers.extend(_start(names[first::processes]) for first in range(1, processes))
        for name in names[::processes]:
            build(name)
        for helper in helpers:
            if helper.wait() != 0:
                _log.info("a process that was to compile kernels ended with %d", helper.returncode)
    finally:
        for helper in helpers:
            helper.kill()


def _can_share() -> bool:
    """Whether a Python can be started, and what it writes to the cache folder be found."""
    if getattr(sys, "frozen", False) or "python" not in Path(sys.executable or "").name:
        return False
    probe = cache_folder() / f"probe-{os.getpid()}"
    try:
        write_whole_bytes(probe, b"")
        probe.unlink()
    except OSError:
        return False
    return True


def _start(names: Sequence[str]) -> subprocess.Popen[bytes]:
    """Start a process that compiles some loops with this very package."""
    command = (
        "import sys; root, *names = sys.argv[1:]; root in sys.path or sys.path.insert(0, root); "
        "from blocksparse.runtime.kernels.loops import build; [build(name) for name in names]"
    )
    root = str(Path(__file__).resolve().parents[3])
    return subprocess.Popen(
        [sys.executable, "-I" if sys.flags.isolated else "-P", "-c", command, root, *names],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
