"""The line that says why the first call ever on a machine takes seconds."""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path

import llvmlite
import numba

import blocksparse

from .kernels.objects import cache_folder
from .kernels.target import Target, describe

_log = logging.getLogger(__name__)


class FirstTime:
    """Remembers, in the cache folder, that the kernels of this version were compiled here.

    Parameters
    ----------
    target : Target
        The processor.
    """

    def __init__(self, target: Target) -> None:
        kernels = Path(__file__).parent / "kernels"
        changed = max(path.stat().st_mtime_ns for path in kernels.glob("*.py"))
        parts = (describe(target), target.features, str(changed), str(kernels),
                 blocksparse.__version__, numba.__version__, llvmlite.__version__)  # fmt: skip
        digest = hashlib.sha256("\0".join(parts).encode()).hexdigest()[:16]
        self._mark = cache_folder() / f"compiled-{digest}"
        self.announced = False

    def announce(self) -> None:
        """Say that kernels are being compiled, if they are."""
        if not self.announced and not self._mark.exists():
            _log.warning(
                "blocksparse compiles its kernels for this processor, once: about ten seconds"
            )
        self.announced = True

    def done(self) -> None:
        """Note that everything is compiled; a folder that cannot be written is no harm."""
        if not self._mark.exists():
            try:
                self._mark.parent.mkdir(parents=True, exist_ok=True)
                self._mark.touch()
            except OSError:
                _log.debug("cannot write %s", self._mark)
