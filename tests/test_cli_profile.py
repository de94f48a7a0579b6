from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import pytest

from blocksparse.cli import main
from blocksparse.perf import measure

GOLDEN = Path(__file__).parent / "golden" / "v1.bsr.safetensors"


@pytest.fixture(scope="module", autouse=True)
def ceilings(tmp_path_factory):
    """Real ceilings, from short runs, kept in a folder of their own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BLOCKSPARSE_CACHE", str(tmp_path_factory.mktemp("kept")))
        quick = partial(measure.measure, rounds=2, run_seconds=1e-4, memory_bytes=2**20)
        patch.setattr(measure, "measure", quick)
        yield


def call(capsys, *arguments):
    status = main(["profile", *map(str, arguments)])
    return status, *capsys.readouterr()


def test_profile_is_a_table_with_totals(capsys):
    status, out, err = call(capsys, GOLDEN, "--rounds", "2", "--threads", "2")
    assert (status, err) == (0, "")
    for text in ("useful GFLOP/s", "of bound", "imbalance", "(load)", "(store)", "2 threads"):
        assert text in out
    for text in ("sum of layers", "network", "dispatch", "GB/s", "kernel", "f32_"):
        assert text in out


def test_a_narrow_terminal_gets_fewer_columns_rather_than_broken_ones(capsys, monkeypatch):
    monkeypatch.setattr("blocksparse.cli.console.PIPE_WIDTH", 100)
    _, out, _ = call(capsys, GOLDEN, "--rounds", "1")
    assert "f32_" not in out
    assert "of bound" in out
    assert max(map(len, out.split("whole network")[0].splitlines())) <= 100


def test_profile_as_json_adds_up_and_sorts(capsys):
    options = ("--rounds", "2", "--batch", "3", "--threads", "1", "--sort", "time", "--json")
    status, out, _ = call(capsys, GOLDEN, *options)
    facts = json.loads(out)
    times = [layer["ms"] for layer in facts["layers"]]
    assert status == 0
    assert (facts["batch"], facts["threads"]) == (3, 1)
    assert times == sorted(times, reverse=True)
    assert sum(times) == pytest.approx(facts["layers_ms"])
    assert facts["rest_ms"] == pytest.approx(facts["network"]["median_ms"] - sum(times))
    for layer in facts["layers"]:
        assert layer["bound_share"] == pytest.approx(layer["bound_ms"] / layer["ms"])
        assert layer["bound_by"] in {"compute", *(r["name"] for r in facts["ceilings"]["reading"])}
        assert layer["imbalance"] is None


def test_profile_without_numba_says_what_it_needs(capsys, monkeypatch):
    monkeypatch.setenv("NUMBA_DISABLE_JIT", "1")
    status, out, err = call(capsys, GOLDEN)
    assert (status, out) == (1, "")
    assert "only the compiled engine can be profiled" in err
    assert "NUMBA_DISABLE_JIT" in err


def test_a_missing_file_is_one_line_and_status_2(tmp_path, capsys):
    status, out, err = call(capsys, tmp_path / "no.bsr.safetensors")
    assert (status, out) == (2, "")
    assert len(err.splitlines()) == 1


def test_help_teaches_with_examples(capsys):
    with pytest.raises(SystemExit) as leaving:
        main(["profile", "--help"])
    assert leaving.value.code == 0
    assert "blocksparse profile" in capsys.readouterr().out.split("examples:")[1]
