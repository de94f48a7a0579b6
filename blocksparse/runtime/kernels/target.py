"""What the processor offers to the micro-kernels: vector length and register tile."""

from __future__ import annotations

import hashlib
import json
import os
import platform
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from blocksparse.whole_file import write_whole

from .cache import cache_folder, compiler_versions


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
    together : int
        Output channels computed of one tile of pixels before the next, where they have blocks at
        the same places.
    """

    triple: str
    cpu: str
    features: str
    lanes: int
    rows: int
    vectors: int
    together: int


# AVX-512 and NEON have 32 vector registers, room for 24 accumulators; AVX2 and SSE have 16, room
# for 12. With AVX2 two vectors are one cache line, while three read every other line twice: on a
# Zen 3, 1x1 convolutions of ResNet-50 take 1.5 ms with 4x2 and 2.6 ms with 4x3. The whole network,
# dense, takes 92 ms there with up to 64 channels together and 97 with 4. Not measured elsewhere.
_WIDE = {"lanes": 16, "rows": 8, "vectors": 3, "together": 8}
_AVX2 = {"lanes": 8, "rows": 4, "vectors": 2, "together": 64}
_NEON = {"lanes": 4, "rows": 8, "vectors": 3, "together": 8}
_BASELINE = {"lanes": 4, "rows": 4, "vectors": 3, "together": 4}


def tile_for(triple: str, features: str) -> dict[str, int]:
    """Choose the register tile and what goes with it for a target.

    Parameters
    ----------
    triple : str
        LLVM target triple, such as ``x86_64-unknown-linux-gnu``.
    features : str
        LLVM feature list, such as ``+avx2,+fma``.

    Returns
    -------
    dict
        Keyword arguments ``lanes``, ``rows``, ``vectors`` and ``together`` of `Target`.
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
    triple, cpu, features = _host()
    name = os.environ.get("NUMBA_CPU_NAME")
    # as Numba has it: if this name is asked for, it has no features but those asked for
    features = "" if name and name.lower() == "generic" else features
    cpu, features = name or cpu, os.environ.get("NUMBA_CPU_FEATURES", features)
    return Target(triple, cpu, features, **tile_for(triple, features))


@cache
def _host() -> tuple[str, str, str]:
    """Triple, processor and features, as LLVM finds them.

    What it found is kept beside the kernels, and found again while Linux describes the same
    processor: asking takes loading LLVM.
    """
    path = None
    if processor := _processor():
        digest = hashlib.sha256((processor + compiler_versions()).encode()).hexdigest()[:16]
        path = cache_folder() / f"processor-{digest}.json"
        try:
            triple, cpu, features = json.loads(path.read_text("utf-8"))
            return str(triple), str(cpu), str(features)
        except (OSError, ValueError, TypeError):
            pass  # not kept yet, or damaged
    import llvmlite.binding as llvm

    try:
        features = llvm.get_host_cpu_features().flatten()
    except RuntimeError:  # LLVM cannot tell on this platform: the baseline instruction set
        features = ""
    found = (llvm.get_process_triple(), llvm.get_host_cpu_name(), features)
    if path is not None:
        with suppress(OSError):  # it only costs time
            write_whole(path, json.dumps(found))
    return found


def _processor() -> str:
    """Return what Linux says of the first processor but for its clock; elsewhere nothing."""
    try:
        first = Path("/proc/cpuinfo").read_text("utf-8", "replace").split("\n\n")[0]
    except OSError:
        return ""
    return platform.machine() + "\n".join(
        line for line in first.splitlines() if "MHz" not in line and "mips" not in line.lower()
    )


def describe(target: Target) -> str:
    """Name a target in one line, for tables and cache folders."""
    bits = 32 * target.lanes
    tile = f"{target.rows}x{target.vectors}"
    return f"{platform.machine()} {target.cpu}, {bits}-bit vectors, {tile} register tile"
