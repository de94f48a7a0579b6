"""The one error a bad model file, or a model that cannot be written, is reported with."""

from __future__ import annotations

import os


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
        self.rule = rule
        self.tensor = tensor
        self.path = None if path is None else os.fspath(path)
        self.mend = mend
        where = [part for part in (self.path, tensor) if part is not None]
        message = ": ".join([*where, rule])
        super().__init__(message if mend is None else f"{message} ({mend})")

    def at(self, path: str | os.PathLike[str]) -> FormatError:
        """Return the same error, told of `path`."""
        return FormatError(self.rule, tensor=self.tensor, path=path, mend=self.mend)
