"""A NumPy and Numba runtime for block-sparse model files."""

from __future__ import annotations

from blocksparse.runtime.network import Network, load

__all__ = ["Network", "load"]
