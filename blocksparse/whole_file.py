"""Files that are written whole or not at all."""

from __future__ import annotations

import os
import threading
from pathlib import Path

__all__ = ["write_whole", "write_whole_bytes"]


def write_whole(path: Path, text: str) -> None:
    """Write a text file as `write_whole_bytes` does."""
    write_whole_bytes(path, text.encode("utf-8"))


def write_whole_bytes(path: Path, content: bytes) -> None:
    """Write a file beside its place and rename it into it; make its folder if need be.

    Raises
    ------
    OSError
        Where it cannot be written; nothing is left then.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # other processes and threads may write the same file
    draft = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}")
    try:
        draft.write_bytes(content)
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)
