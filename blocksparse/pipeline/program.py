"""A program that Hydra starts, ending with a line where the user can mend it, not a traceback.

Nothing here imports torch, so that ``--help`` answers at once.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException
from rich.text import Text

from blocksparse.pipeline.console import console
from blocksparse.pipeline.folders import RunFolder

__all__ = ["call", "importing"]

_FULL = "HYDRA_FULL_ERROR"
# Hydra's advice for a key that is not there; what is added so, nobody reads.
_APPEND = "To append to your config use"


@contextmanager
def importing() -> Iterator[None]:
    """Leave no folder behind where the user interrupts an import; that of PyTorch takes seconds."""
    try:
        yield
    except KeyboardInterrupt:
        folder = RunFolder(Path(HydraConfig.get().runtime.output_dir))
        folder.remove_unstarted(is_new=False)
        raise


def call(program: Callable[[], object]) -> None:
    """Call what ``hydra.main`` made.

    Errors of the configuration, of files and folders, and of a sweep's jobs are printed, and the
    process exits with 1; interrupted, with 130. Other errors are defects and keep their traceback,
    as all do with Hydra's ``HYDRA_FULL_ERROR=1``.
    """
    if os.environ.get(_FULL) == "1":
        program()
        return
    os.environ[_FULL] = "1"  # else Hydra prints the traceback itself
    try:
        program()
    except KeyboardInterrupt:
        sys.exit(130)  # a training has said how to go on
    except (HydraException, OmegaConfBaseException, OSError, ValueError) as error:
        lines = [line for line in str(error).splitlines() if not line.startswith(_APPEND)]
        if isinstance(error, HydraException) and error.__cause__ is not None:
            lines += str(error.__cause__).splitlines()[:1]
        console.print(Text.assemble(("error: ", "bold red"), "\n".join(lines)), soft_wrap=True)
        if isinstance(error, HydraException | OmegaConfBaseException):
            console.print("--help lists what can be set; --cfg job prints all of it")
            if any(argument.startswith("resume=") for argument in sys.argv):
                console.print("A run that goes on keeps its configuration, the task included")
        sys.exit(1)
