"""Fresh processes: what a program costs that starts from nothing, memory and start-up included."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

from blocksparse.cli import console as ui

# Peak resident memory of this process in bytes. Linux counts in getrusage what the parent had when
# it forked, so the kernel's own record of this program is read where there is one.
PEAK = """
def peak_bytes():
    import resource, sys
    try:
        with open("/proc/self/status") as status:
            line = next(line for line in status if line.startswith("VmHWM:"))
        return 1024 * int(line.split()[1])
    except (OSError, StopIteration):
        unit = 1 if sys.platform == "darwin" else 1024
        return unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
"""


class ChildError(ui.CommandError):
    """A child process that failed."""


def child(
    program: str, *arguments: str | Path, environment: Mapping[str, str] | None = None
) -> dict[str, float]:
    """Run a Python program in a fresh process and return the JSON object it prints last.

    Parameters
    ----------
    program : str
        Source code.
    *arguments : str or Path
        Its ``sys.argv[1:]``.
    environment : mapping of str to str, optional
        Variables besides those of this process.

    Raises
    ------
    ChildError
        If it fails, with the last line it wrote to standard error.
    """
    done = subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, **(environment or {})},
        check=False,
    )
    if done.returncode != 0:
        last = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
        raise ChildError(f"a measured process failed: {last}")
    facts: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return facts
