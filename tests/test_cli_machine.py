from __future__ import annotations

import json
from functools import partial

import pytest

from blocksparse.cli import main
from blocksparse.perf import measure
from blocksparse.runtime.caches import Cache


@pytest.fixture(autouse=True)
def small_and_elsewhere(tmp_path, monkeypatch):
    """Real measurements, but short ones, kept in a folder of their own."""
    monkeypatch.setenv("BLOCKSPARSE_CACHE", str(tmp_path / "kept"))
    quick = partial(measure.measure, rounds=2, run_seconds=1e-4, memory_bytes=2**20)
    monkeypatch.setattr(measure, "measure", quick)


def test_machine_prints_a_table_with_units(capsys):
    assert main(["machine"]) == 0
    out = capsys.readouterr().out
    for text in ("multiply-add f32", "read L1", "read memory", "GFLOP/s", "GB/s", "1 thread"):
        assert text in out
    assert "note: reading from memory took 1 MiB at most" in out


def test_a_cache_that_cannot_be_told_apart_has_no_figure_for_all_cores(capsys, monkeypatch):
    caches = (Cache(1, 16 * 1024, 1), Cache(2, 128 * 1024, 1), Cache(3, 300 * 1024, 2))
    monkeypatch.setattr(measure, "system_caches", lambda cpus: caches)
    monkeypatch.setattr(measure, "usable_cores", lambda: 2)
    assert main(["machine"]) == 0
    out = capsys.readouterr().out
    row = next(line.split() for line in out.splitlines() if "read L3" in line)
    assert row[3] == "GB/s"  # after the one figure
    assert "note: reading from L3 is not measured on all cores" in out


def test_machine_measures_once_and_again_when_asked(capsys, monkeypatch):
    trees, really, calls = [], measure.measure, []
    monkeypatch.setattr(measure, "measure", lambda **how: (calls.append(how), really(**how))[1])
    for extra in ([], [], ["--again"]):
        assert main(["machine", "--json", *extra]) == 0
        trees.append(json.loads(capsys.readouterr().out))
    assert len(calls) == 2
    assert trees[0] == trees[1]
    for before, after in zip(trees[0]["compute"], trees[2]["compute"], strict=True):
        assert after["one"] >= before["one"]
    assert {row["name"] for row in trees[0]["reading"]} >= {"L1", "memory"}
    assert all(row["one"] > 0 for row in trees[0]["compute"])


def test_machine_says_where_its_figures_are_kept(capsys, tmp_path):
    assert main(["machine"]) == 0
    (path,) = (tmp_path / "kept").glob("ceilings-*.json")
    assert f"kept in {path}" in capsys.readouterr().out


def test_help_teaches_with_examples(capsys):
    with pytest.raises(SystemExit) as leaving:
        main(["machine", "--help"])
    assert leaving.value.code == 0
    assert "blocksparse machine" in capsys.readouterr().out.split("examples:")[1]
