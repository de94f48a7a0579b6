"""The folder where a machine keeps what was compiled and measured on it."""

from __future__ import annotations

import os
import sys
from functools import cache
from importlib import metadata
from importlib.util import find_spec
from pathlib import Path


def cache_folder() -> Path:
    """Return the folder that keeps compiled kernels.

    The environment variable ``BLOCKSPARSE_CACHE`` overrides the platform's usual place. Without it,
    a user who has no home folder gets one that cannot be written.
    """
    if custom := os.environ.get("BLOCKSPARSE_CACHE"):
        return Path(custom)
    if sys.platform == "win32":
        base = Path(os.environ.get("LOCALAPPDATA") or _home() / "AppData" / "Local")
    elif sys.platform == "darwin":
        base = _home() / "Library" / "Caches"
    else:
        base = Path(os.environ.get("XDG_CACHE_HOME") or _home() / ".cache")
    return base / "blocksparse"


def _home() -> Path:
    try:
        return Path.home()
    except RuntimeError:  # no HOME, and a user that the system does not know
        return Path(os.devnull)  # no folder: whoever writes below it warns, and names the remedy


@cache
def compiler_versions() -> str:
    """Versions of the compilers, read without importing them: that takes half a second."""
    found = []
    for package in ("numba", "llvmlite"):
        spec = find_spec(package)
        if spec is None or not spec.origin:
            continue
        try:
            found.append(Path(spec.origin).with_name("_version.py").read_text("utf-8"))
        except OSError:
            found.append(metadata.version(package))
    return "\n".join(found)
