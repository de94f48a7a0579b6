"""The loops around the micro-kernels: all are there, errors get out, several processes compile."""

from __future__ import annotations

import os
import subprocess
import sys
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
from bare import engine_of
from models import Builder, randoms

from blocksparse.runtime.kernels import loops, objects, records
from blocksparse.runtime.kernels.target import host

GOLDEN = Path(__file__).parents[1] / "golden" / "v1.bsr.safetensors"

PROGRAM = """
import sys
{first}
import numpy as np, blocksparse
network = blocksparse.load({path!r}, engine="compiled", threads=2)
print(network(np.ones((1, *network.input_shape), np.float32)).sum())
"""

FAIL = """
define i32 @fail(i64 %a, i64 %b, i64 %c, i64 %d, i64 %e) {
  ret i32 1
}
"""


def test_every_kind_of_step_has_a_loop():
    kinds = {*range(records.LINES_CONV + 1)}
    assert set(loops.ITEMS) == kinds
    names = {*loops.ITEMS.values(), *loops.FAST.values()}
    assert {*names, loops.PROGRAM} == set(loops._NAMES)
    addresses = [loops.address(name) for name in loops._NAMES]
    assert len(set(addresses)) == len(loops._NAMES)


@pytest.mark.parametrize("threads", [1, 3])
def test_an_error_in_an_item_is_told(threads):
    b = Builder((8, 6, 6))
    b.linear(b.node("flatten", b.conv("x", 8)), 3)
    engine = engine_of(b.model())
    x = randoms(1, 8, 6, 6)
    engine.run(x, threads)
    record = engine._plan(1, threads).plan.records[1]
    record[records.COMPUTE] = objects.compile_text("fail", FAIL, host())
    for _ in range(20):  # whichever thread takes the item
        with pytest.raises(RuntimeError, match="stopped at an error"):
            engine.run(x, threads)


@pytest.mark.slow
def test_a_helper_compiles_and_keeps_what_it_is_asked_for(tmp_path, monkeypatch):
    monkeypatch.setenv("BLOCKSPARSE_CACHE", str(tmp_path))
    monkeypatch.chdir(tmp_path)  # no checkout there
    name = loops.ITEMS[records.LINEAR]
    assert loops._start([name]).wait() == 0
    (path,) = tmp_path.glob("*.o")
    assert path == objects._path("blocksparse_linear_item", host(), objects.sources())
    assert objects.is_kept("blocksparse_linear_item")
    path.write_bytes(path.read_bytes()[:-1])
    assert not objects.is_kept("blocksparse_linear_item")


def test_nothing_is_shared_where_nothing_can_be_kept(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    for folder, wanted in ((tmp_path / "file", False), (tmp_path / "new" / "folder", True)):
        monkeypatch.setenv("BLOCKSPARSE_CACHE", str(folder))
        assert loops._can_share() == wanted
    assert list((tmp_path / "new" / "folder").iterdir()) == []


@pytest.mark.parametrize(
    ("cores", "mebibytes", "processes"),
    [(1, 8192, 1), (2, 8192, 2), (3, 8192, 3), (64, 8192, 4), (64, 1024, 2), (2, 100, 1)],
)
def test_processes_share_what_is_missing(monkeypatch, cores, mebibytes, processes):
    shares = [[]]

    class Helper:
        def wait(self):
            return 0

        def kill(self):
            """It is done."""

    def start(names):
        shares.append(list(names))
        return Helper()

    monkeypatch.setattr(loops, "usable_cores", lambda: cores)
    monkeypatch.setattr(loops, "_start", start)
    monkeypatch.setattr(loops, "build", shares[0].append)
    monkeypatch.setattr(loops, "memory_limit", lambda: mebibytes * 2**20)
    loops._compile(loops._NAMES)
    assert sorted(chain.from_iterable(shares)) == sorted(loops._NAMES)
    assert len(shares) == processes
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


@pytest.mark.long
@pytest.mark.parametrize("case", ["as it is", "frozen", "no such Python", "a Python that fails"])
def test_first_process_compiles_with_helpers_and_without(tmp_path, case):
    broken = tmp_path / "python"
    broken.write_text("#!/bin/sh\nexit 1\n")
    broken.chmod(0o755)
    first = {
        "as it is": "",
        "frozen": "sys.frozen = True",
        "no such Python": "sys.executable = '/nowhere/python3'",
        "a Python that fails": f"sys.executable = {str(broken)!r}",
    }[case]
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(first=first, path=str(GOLDEN))],
        env={**os.environ, "BLOCKSPARSE_CACHE": str(tmp_path / "cache")},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("compiles its kernels") == 1
    kept = {path.name.split("-")[0] for path in (tmp_path / "cache").glob("blocksparse_*.o")}
    assert kept == {f"blocksparse_{name.split('.')[1]}" for name in loops._NAMES}
    assert np.isfinite(float(done.stdout))
