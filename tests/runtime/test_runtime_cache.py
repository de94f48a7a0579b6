"""What is kept on disk: code that runs without its compilers, and measured layers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from blocksparse.runtime import algorithms
from blocksparse.runtime.algorithms import Memory
from blocksparse.runtime.kernels import elf, objects, target
from blocksparse.runtime.kernels.cache import cache_folder
from blocksparse.runtime.kernels.target import host

GOLDEN = Path(__file__).parents[1] / "golden" / "v1.bsr.safetensors"

PROGRAM = """
import logging, sys
logging.basicConfig()
import numpy as np, blocksparse
network = blocksparse.load(sys.argv[1], engine="compiled", threads=2)
images = np.random.default_rng(0).standard_normal((1, *network.input_shape), np.float32)
print(network(images).sum(), *sorted({"numba", "llvmlite"} & set(sys.modules)))
"""

WITHOUT_COMPILERS = """
import builtins
allowed = builtins.__import__
def refuse(name, *rest, **options):
    if name.split(".")[0] in ("numba", "llvmlite"):
        raise ImportError(f"no {name} here")
    return allowed(name, *rest, **options)
builtins.__import__ = refuse
"""

FALLING_BACK = """
import sys, blocksparse
print(blocksparse.load(sys.argv[1]).engine)
try:
    blocksparse.load(sys.argv[1], engine="compiled")
except RuntimeError as error:
    print(error)
"""

ENDING = """
import sys, threading, time, numpy as np, blocksparse
network = blocksparse.load(sys.argv[1], engine="compiled", threads=2)
images = np.zeros((8192, *network.input_shape), np.float32)
def work():
    while True:
        network(images)
network(images)
threading.Thread(target=work, daemon=True).start()
time.sleep(0.05)
"""


def run(cache, program=PROGRAM, **environment):
    """Run a program with the golden file in a fresh process; return what it printed and logged."""
    done = subprocess.run(
        [sys.executable, "-c", program, str(GOLDEN)],
        env={**os.environ, "BLOCKSPARSE_CACHE": str(cache), **environment},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, (done.returncode, done.stderr)
    return done.stdout.split(), done.stderr


@pytest.mark.parametrize(
    "content",
    [
        b"", b"{", b"[]", b"null", b"7", b'{"a": 1}', b'{"a": null}', b'{"a": {"direct": "fast"}}',
        b'{"a": {"direct": [1]}}', b"\xff\xfe\0", b'{"a": {"direct": null}}',
    ],
)  # fmt: skip
def test_damaged_measurements_are_ignored_and_replaced(tmp_path, monkeypatch, content):
    monkeypatch.setenv("BLOCKSPARSE_CACHE", str(tmp_path))
    memory, times = Memory(host()), {"key": {"direct": 1.5}}
    memory.path.write_bytes(content)
    assert memory.read() == {}
    memory.write(times)
    assert memory.read() == times
    assert json.loads(memory.path.read_text()) == times
    assert list(tmp_path.glob("*layers*")) == [memory.path], "nothing else is left behind"


def test_measurements_lie_beside_the_kernels(tmp_path, monkeypatch):
    monkeypatch.setenv("BLOCKSPARSE_CACHE", str(tmp_path / "kept" / "here"))
    memory = Memory(host())
    memory.write({"key": {"direct": 1.0}})
    assert memory.path.parent == tmp_path / "kept" / "here"
    assert Memory(host()).read() == {"key": {"direct": 1.0}}


@pytest.mark.skipif(not elf.SUPPORTED, reason="LLVM links here")
def test_a_process_that_finds_its_kernels_imports_no_compiler():
    (first, *_), _ = run(cache_folder())  # whatever is not there yet
    (second, *compilers), said = run(cache_folder())
    assert compilers == []
    assert said == ""
    (third, *_), said = run(cache_folder(), WITHOUT_COMPILERS + PROGRAM)
    assert first == second == third
    assert said == ""


def test_without_compilers_and_kernels_the_reference_runs(tmp_path):
    printed, said = run(tmp_path, WITHOUT_COMPILERS + FALLING_BACK)
    assert printed[:2] == ["reference", "engine:"]
    assert "cannot run here: no llvmlite.binding here" in " ".join(printed)
    assert "use engine='reference'" in " ".join(printed)
    assert "running in NumPy, slowly" in said


def test_without_numba_nothing_is_announced(tmp_path):
    """LLVM is there, and says which processor this is; Numba is not."""
    without = WITHOUT_COMPILERS.replace('("numba", "llvmlite")', '("numba",)')
    printed, said = run(tmp_path, without + FALLING_BACK)
    assert printed[:2] == ["reference", "engine:"]
    assert "Numba cannot be imported" in " ".join(printed)
    assert "compiles its kernels" not in said


def test_the_interpreter_may_end_while_kernels_run():
    """Modules are taken apart then; the code must not be, under a thread that still runs it."""
    assert run(cache_folder(), ENDING) == ([], "")


@pytest.mark.skipif(sys.platform in ("win32", "darwin"), reason="has another usual place")
def test_the_usual_place(tmp_path, monkeypatch):
    monkeypatch.delenv("BLOCKSPARSE_CACHE", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    for nothing in (None, ""):
        if nothing is None:
            monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
        else:
            monkeypatch.setenv("XDG_CACHE_HOME", nothing)
        assert cache_folder() == tmp_path / ".cache" / "blocksparse"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "kept"))
    monkeypatch.setattr(Path, "home", no_home)
    assert cache_folder() == tmp_path / "kept" / "blocksparse"


def test_without_a_home_nothing_is_kept_and_the_remedy_is_named(tmp_path, monkeypatch, caplog):
    for name in ("BLOCKSPARSE_CACHE", "XDG_CACHE_HOME", "LOCALAPPDATA"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", no_home)
    monkeypatch.setattr(objects, "_unwritable", set())
    monkeypatch.chdir(tmp_path)
    objects.compile_text("nothing", "define void @nothing() {\n ret void\n}", host())
    assert "set BLOCKSPARSE_CACHE" in caplog.text
    assert not list(tmp_path.iterdir())


def no_home():
    raise RuntimeError("Could not determine home directory.")


def test_another_compiler_or_switch_compiles_anew(tmp_path, monkeypatch):
    monkeypatch.setenv("BLOCKSPARSE_CACHE", str(tmp_path))
    text = "define void @nothing(i64 %a) {\n ret void\n}"

    def kept():
        objects.compile_text("nothing", text, host())
        return len(list(tmp_path.glob("nothing-*.o")))

    assert (kept(), kept()) == (1, 1)
    monkeypatch.setattr(objects, "compiler_versions", lambda: "newer")
    assert kept() == 2
    before = objects.sources()
    monkeypatch.setenv("NUMBA_BOUNDSCHECK", "1")
    objects.sources.cache_clear()
    assert objects.sources() != before
    monkeypatch.delenv("NUMBA_BOUNDSCHECK")
    objects.sources.cache_clear()
    assert objects.sources() == before


def test_kept_files_can_be_read_by_others(tmp_path, monkeypatch):
    monkeypatch.setenv("BLOCKSPARSE_CACHE", str(tmp_path))
    old = os.umask(0o022)
    try:
        objects.compile_text("nothing", "define void @nothing() {\n ret void\n}", host())
    finally:
        os.umask(old)
    (path,) = tmp_path.glob("nothing-*.o")
    assert path.stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize("content", [b"", b"{", b"7", b"[1, 2]", b"null", b"\xff"])
def test_a_damaged_description_of_the_processor_is_made_again(tmp_path, monkeypatch, content):
    monkeypatch.setenv("BLOCKSPARSE_CACHE", str(tmp_path))
    target._host.cache_clear()
    wanted = host()
    target._host.cache_clear()
    for path in tmp_path.glob("processor-*.json"):
        path.write_bytes(content)
    assert host() == wanted
    target._host.cache_clear()
    assert host() == wanted, "and is found again"


def test_the_generic_processor_has_the_features_asked_for(monkeypatch):
    monkeypatch.setattr(target, "_host", lambda: ("x86_64-linux", "generic", "+avx2,+fma"))
    assert host().lanes == 8, "LLVM does not know the processor, but what it can do"
    monkeypatch.setenv("NUMBA_CPU_NAME", "generic")
    assert (host().features, host().lanes) == ("", 4)
    monkeypatch.setenv("NUMBA_CPU_FEATURES", "+avx2,+fma")
    assert host().lanes == 8


@pytest.mark.long
def test_what_is_kept_runs_without_the_compilers(tmp_path):
    """The first process compiles and says so; the second has the same bits and no Numba."""
    (first, *compilers), said = run(tmp_path)
    assert compilers == ["llvmlite", "numba"]
    assert said.count("compiles its kernels") == 1
    (second, *compilers), said = run(tmp_path)
    assert second == first
    assert said == ""
    if elf.SUPPORTED:
        assert compilers == []
        damaged = min(tmp_path.glob("blocksparse_run-*.o"))
        damaged.write_bytes(damaged.read_bytes()[:-100])
        (third, *_), said = run(tmp_path)
        assert third == first
        assert "compiles its kernels" in said
    (other, *_), said = run(tmp_path, NUMBA_CPU_NAME="generic")
    assert float(other) == pytest.approx(float(first), rel=1e-4)
    assert "compiles its kernels" in said, "another processor has objects of its own"


@pytest.mark.long
def test_without_a_writable_cache_everything_still_runs(tmp_path):
    (tmp_path / "file").write_text("")
    _, said = run(tmp_path / "file")
    assert "BLOCKSPARSE_CACHE" in said
    assert (tmp_path / "file").read_text() == ""


def test_times_of_other_code_are_not_believed(monkeypatch):
    before, read = Memory(host()).path, Path.read_bytes
    assert Memory(host()).path == before
    monkeypatch.setattr(algorithms, "sources", lambda: "other kernels")
    assert Memory(host()).path != before
    monkeypatch.undo()
    monkeypatch.setattr(Path, "read_bytes", lambda p: read(p) + b"#" * (p.name == "bands.py"))
    algorithms._plan_sources.cache_clear()
    assert Memory(host()).path != before
    algorithms._plan_sources.cache_clear()
