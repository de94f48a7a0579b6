"""The machine a figure was measured on, without names that say whose it is."""

from __future__ import annotations

import platform
from dataclasses import dataclass
from pathlib import Path

import llvmlite
import llvmlite.binding
import numba
import numpy as np

from blocksparse.runtime.limits import usable_cores

# Features that decide how fast float kernels can be; the rest is left out.
TELLING = ("sse4.2", "avx", "avx2", "fma", "avx512f", "avx512bf16", "avx512vnni", "neon", "sve")


@dataclass(frozen=True)
class Machine:
    """Processor, usable cores, and the versions that matter to speed.

    Attributes
    ----------
    processor : str
        Its name as the operating system gives it.
    architecture : str
        LLVM's name for it, such as ``znver4``.
    features : tuple of str
        Vector instruction sets it has, of those in `TELLING`.
    cores : int
        Cores this process may use.
    system : str
        Operating system and instruction set, such as ``Linux x86_64``.
    versions : tuple of (str, str)
        Python and libraries.
    """

    processor: str
    architecture: str
    features: tuple[str, ...]
    cores: int
    system: str
    versions: tuple[tuple[str, str], ...]

    def __str__(self) -> str:
        features = ", ".join(self.features) or "no vector features known"
        versions = ", ".join(f"{name} {version}" for name, version in self.versions)
        plural = "" if self.cores == 1 else "s"
        return (
            f"{self.processor} ({self.architecture}; {features}), {self.cores} core{plural}, "
            f"{self.system}; {versions}"
        )


def describe_machine(**versions: str) -> Machine:
    """Describe this machine.

    Parameters
    ----------
    **versions : str
        Versions of further libraries that took part, such as ``torch="2.11.0"``.
    """
    known = llvmlite.binding.get_host_cpu_features()
    own = {
        "Python": platform.python_version(),
        "NumPy": np.__version__,
        "Numba": numba.__version__,
        "llvmlite": llvmlite.__version__,
    }
    return Machine(
        processor=_processor_name(),
        architecture=llvmlite.binding.get_host_cpu_name(),
        features=tuple(name for name in TELLING if known.get(name)),
        cores=usable_cores(),
        system=f"{platform.system()} {platform.machine()}",
        versions=tuple((own | versions).items()),
    )


def _processor_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        lines = []
    for line in lines:
        key, _, value = line.partition(":")
        if key.strip() in {"model name", "Model"}:
            return value.strip()
    return platform.processor() or platform.machine()
