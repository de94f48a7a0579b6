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
