"""What the processor offers to the micro-kernels: vector length and register tile."""

from __future__ import annotations

import platform
from dataclasses import dataclass

import llvmlite.binding as llvm


@dataclass(frozen=True)
class Target:
    """A processor, as far as code generation cares.

    Parameters
    ----------
    triple, cpu, features : str
        What LLVM compiles for; ``features`` is LLVM's comma-separated list.
    lanes : int
        float32 values in one vector register.
    rows : int
        Output channels in the largest register tile.
    vectors : int
        Vectors of pixels in the largest register tile. ``rows * vectors`` accumulators, ``vectors``
        inputs and one broadcast weight have to fit the register file.
    """

    triple: str
    cpu: str
    features: str
    lanes: int
    rows: int
    vectors: int


# AVX-512 and NEON have 32 vector registers, room for 24 accumulators; AVX2 and SSE have 16, room
# for 12. With AVX2 two vectors are one cache line, while three read every other line twice: on a
# Zen 3, 1x1 convolutions of ResNet-50 take 1.5 ms with 4x2 and 2.6 ms with 4x3.
_WIDE = {"lanes": 16, "rows": 8, "vectors": 3}
_AVX2 = {"lanes": 8, "rows": 4, "vectors": 2}
_NEON = {"lanes": 4, "rows": 8, "vectors": 3}
_BASELINE = {"lanes": 4, "rows": 4, "vectors": 3}


def tile_for(triple: str, features: str) -> dict[str, int]:
    """Choose lanes, rows and vectors for a target.

    Parameters
    ----------
    triple : str
        LLVM target triple, such as ``x86_64-unknown-linux-gnu``.
    features : str
        LLVM feature list, such as ``+avx2,+fma``.

    Returns
    -------
    dict
        Keyword arguments ``lanes``, ``rows`` and ``vectors`` of `Target`.
    """
    have = set(features.split(","))
    if triple.startswith(("aarch64", "arm64")):
        return _NEON
    if "+avx512f" in have:
        return _WIDE
    if {"+avx2", "+fma"} <= have:
        return _AVX2
    return _BASELINE


def host() -> Target:
    """Describe the processor this process runs on.

    Honours ``NUMBA_CPU_NAME`` and ``NUMBA_CPU_FEATURES``, so that one pair of variables switches
    off AVX-512 for Numba's loops and for the micro-kernels alike.

    Returns
    -------
    Target
        The host's target.
    """
    from numba.core import config

    triple = llvm.get_process_triple()
    cpu = config.CPU_NAME or llvm.get_host_cpu_name()
    features = config.CPU_FEATURES
    if features is None:
        try:
            features = llvm.get_host_cpu_features().flatten()
        except RuntimeError:  # LLVM cannot tell on this platform: the baseline instruction set
            features = ""
    return Target(triple, cpu, features, **tile_for(triple, features))


def describe(target: Target) -> str:
    """Name a target in one line, for tables and cache folders."""
    bits = 32 * target.lanes
    tile = f"{target.rows}x{target.vectors}"
    return f"{platform.machine()} {target.cpu}, {bits}-bit vectors, {tile} register tile"
