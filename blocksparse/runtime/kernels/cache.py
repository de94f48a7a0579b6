"""The folder where a machine keeps what was compiled and measured on it."""

from __future__ import annotations

import os
import sys
import tempfile
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
