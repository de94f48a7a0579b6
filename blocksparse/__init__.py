"""blocksparse: train, prune, export and run block-sparse convolutional networks on CPUs.

The names below are loaded on first use, so that ``import blocksparse`` costs next to nothing.

Examples
--------
>>> import blocksparse
>>> network = blocksparse.load("model.bsr.safetensors")  # doctest: +SKIP
>>> logits = network(images)  # doctest: +SKIP
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import version
from typing import Any

_LAZY = {
    "load": "blocksparse.runtime",
    "read": "blocksparse.format",
    "FormatError": "blocksparse.format",
}

__all__ = ["FormatError", "__version__", "load", "read"]


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return version("blocksparse")
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'blocksparse' has no attribute {name!r}")
