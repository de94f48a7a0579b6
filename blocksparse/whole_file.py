"""Files that are written whole or not at all."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["check_place", "draft_of", "write_whole", "write_whole_bytes"]


def check_place(path: Path) -> None:
    """Find out before the work whether a file can be written to its place, its folder be made.

    Raises
    ------
    IsADirectoryError, NotADirectoryError, PermissionError
        Where not, with the path and what is in the way.
    """
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder; name the file that is to be written")
    folder = next(parent for parent in path.absolute().parents if parent.exists())
    if not folder.is_dir():
        raise NotADirectoryError(f"{path} cannot be written: {folder} is a file, not a folder")
    if not os.access(folder, os.W_OK):
        raise PermissionError(f"{path} cannot be written: {folder} may not be written to")


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
    with draft_of(path) as draft:
        draft.write_bytes(content)


@contextmanager
def draft_of(path: Path) -> Iterator[Path]:
    """Give a place beside a file's to write it to; rename it into its own if that went well.

    Its folder is made if need be. After an error nothing is left, and the file is what it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # other processes and threads may write the same file; the ending says what is written
    draft = path.with_name(f".{os.getpid()}.{threading.get_ident()}.{path.name}")
    try:
        yield draft
        draft.replace(path)
    finally:
        draft.unlink(missing_ok=True)
