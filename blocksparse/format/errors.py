"""The one error a bad model file, or a model that cannot be written, is reported with."""

from __future__ import annotations

import os

MAX_TEXT = 400
"""Most characters of a rule or a name that a message shows."""


class FormatError(ValueError):
    """A file or model breaks a rule of the format (``docs/format.md``).

    Parameters
    ----------
    rule : str
        The rule that is broken, and what was found instead.
    tensor : str, optional
        Name of the tensor or graph node at fault; None where the whole file is.
    path : path-like, optional
        The file, where one is being read or written.
    mend : str, optional
        What the reader of the message can do about it.
    """

    def __init__(
        self,
        rule: str,
        *,
        tensor: str | None = None,
        path: str | os.PathLike[str] | None = None,
        mend: str | None = None,
    ) -> None:
        self.rule = rule if len(rule) <= MAX_TEXT else f"{rule[:MAX_TEXT]}..."
        self.tensor = tensor
        self.path = None if path is None else os.fspath(path)
        self.mend = mend
        # A damaged file may hold any name: show one that fits a line and a terminal.
        named = tensor is None or (tensor.isprintable() and len(tensor) <= MAX_TEXT)
        shown = tensor if named else ascii(tensor)[:MAX_TEXT]
        message = ": ".join(part for part in (self.path, shown, self.rule) if part is not None)
        super().__init__(message if mend is None else f"{message} ({mend})")

    def at(self, path: str | os.PathLike[str]) -> FormatError:
        """Return the same error, told of `path`."""
        return FormatError(self.rule, tensor=self.tensor, path=path, mend=self.mend)
