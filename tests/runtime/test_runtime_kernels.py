"""The micro-kernels: code for other processors, the cache on disk."""

from __future__ import annotations

import logging
import os
import re
import subprocess
import sys
from functools import partial

import llvmlite.binding as llvm
import pytest

from blocksparse.runtime.kernels import microkernels, objects
from blocksparse.runtime.kernels.microkernels import Kernel, write
from blocksparse.runtime.kernels.target import Target, host, tile_for

KERNELS = [
    Kernel("sparse_conv", 8, 8, 3),
    Kernel("nm_conv", 1, 2, 4, 4),
    Kernel("sparse_linear", 8, 8, 2),
    Kernel("nm_linear", 1, 1, 2, 4),
    Kernel("sparse_product", 8, 8, 3),
    Kernel("sparse_tail", 8, 8, 7),
    Kernel("winograd_input", width=7),
    Kernel("winograd_output", width=5),
    Kernel("line_input", width=5),
    Kernel("line_output", width=7),
    Kernel("tile_input", 1, 2, 3),
    Kernel("tile_output", 1, 2, 3),
    Kernel("tile_output", 2, 1, 3),
    Kernel("copy_phases"),
    Kernel("pool_max", 3, 3, 2),
    Kernel("pool_mean"),
    Kernel("pool_avg", 2, 3, 1),
    Kernel("sparse_conv", 8, 8, 3, activation="silu"),
    Kernel("sparse_tail", 8, 8, 7, activation="hardswish"),
    Kernel("nm_conv", 1, 2, 4, 4, activation="sigmoid"),
    Kernel("tile_output", 1, 2, 3, activation="silu"),
    Kernel("pointwise_same", activation="silu"),
    Kernel("pointwise_add", activation="hardswish"),
    Kernel("pointwise_mul", activation="relu"),
    Kernel("pointwise_gate", activation="sigmoid"),
    Kernel("pointwise_affine", activation="relu6"),
]
WITHOUT_FMA = {"copy_phases", "pool_max", "pool_avg", "pool_mean", "pointwise_add", "pointwise_mul"}


def test_every_kernel_is_compiled_for_other_processors():
    assert {kernel.op for kernel in KERNELS} == microkernels._WRITERS.keys()


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda k: k.name)
@pytest.mark.parametrize(
    ("triple", "cpu", "features"),
    [
        ("x86_64-unknown-linux-gnu", "znver4", "+avx512f,+avx2,+fma"),
        ("x86_64-unknown-linux-gnu", "x86-64-v3", "+avx2,+fma"),
        ("aarch64-unknown-linux-gnu", "generic", "+neon"),
    ],
    ids=["avx512", "avx2", "neon"],
)
def test_one_source_gives_vector_code_everywhere(kernel, triple, cpu, features):
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    target = Target(triple, cpu, features, **tile_for(triple, features))
    module = llvm.parse_assembly(write(kernel, target))
    module.verify()
    machine = llvm.Target.from_triple(triple).create_target_machine(
        cpu=cpu, features=features, opt=3
    )
    assembly = machine.emit_assembly(module)
    # such as fmaf, or a masked store that the processor does not have
    assert not re.search(r"^\s+(call|callq|bl|blr)\s", assembly, re.MULTILINE), "no function called"
    vector, scalar = r"\bvfn?m(add|sub)\d+ps\b", r"\bvfn?m(add|sub)\d+ss\b"
    if triple.startswith("aarch64"):
        vector, scalar = r"\bfml[as]\b.*v\d+\.4s", r"\bfn?madd\b"
    if kernel.op == "nm_linear":  # a scalar product
        vector, scalar = scalar, vector
    assert bool(re.search(vector, assembly)) == (kernel.op not in WITHOUT_FMA)
    assert not re.search(scalar, assembly)
    if "avx512" in features and not kernel.op.endswith(("linear", "tail")):
        assert "zmm" in assembly


def test_a_kernel_is_kept_on_disk_and_a_damaged_one_made_again(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("BLOCKSPARSE_CACHE", str(tmp_path / "kernels"))
    caplog.set_level(logging.INFO, "blocksparse")
    kernel, target = Kernel("sparse_conv", 3, 2, 1), host()
    compiled = partial(objects.compile_text, kernel.name, write(kernel, target), target)
    assert compiled() != 0
    (path,) = (tmp_path / "kernels").glob("*.o")
    assert "once on this machine" in caplog.text
    caplog.clear()
    assert compiled() != 0
    assert not caplog.records, "loaded, not compiled"
    good = path.read_bytes()
    path.write_bytes(good[:40] + b"\0" * 8 + good[48:])
    assert compiled() != 0
    assert path.read_bytes() == good


def test_a_cache_that_cannot_be_written_only_warns(tmp_path, monkeypatch, caplog):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("BLOCKSPARSE_CACHE", str(tmp_path / "file"))
    kernel = Kernel("sparse_conv", 2, 3, 1)
    assert objects.compile_text(kernel.name, write(kernel, host()), host()) != 0
    assert "not kept" in caplog.text


@pytest.mark.long
@pytest.mark.skipif("x86" not in host().triple, reason="switches off AVX-512")
def test_the_runtime_without_avx512(tmp_path):
    """The same tests, compiled for a processor with AVX2 only and with neither."""
    for cpu, features in (("haswell", "+avx2,+fma,+avx"), ("x86-64", "")):
        environment = {
            **os.environ, "NUMBA_CPU_NAME": cpu, "NUMBA_CPU_FEATURES": features,
            "BLOCKSPARSE_CACHE": str(tmp_path / cpu),
        }  # fmt: skip
        where = [
            os.path.join(os.path.dirname(__file__), f"test_runtime_{part}.py")
            for part in ("compiled", "winograd", "winograd_parts", "planes", "program")
        ]
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *where]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-3000:]
