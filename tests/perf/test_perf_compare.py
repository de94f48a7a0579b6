"""`python -m benchmarks.compare`, run small: real engines, compared before they are timed."""

from __future__ import annotations

import json
import sys
from contextlib import closing
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch._inductor import config as inductor

from benchmarks import compare, exports
from benchmarks.engines import OURS, PEERS, Engine, Source, build
from benchmarks.exports import MismatchError
from benchmarks.figures import Setting
from benchmarks.measurement import build_engines, measure
from benchmarks.networks import dense_network, random_images
from blocksparse.sparsity import Block

SHARES = (0.0, 0.75)
SETTING = Setting("resnet8", 32, SHARES, "shared", 3, 1)


@pytest.fixture(autouse=True)
def same_threads_afterwards():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("exports")
    ready = exports.make("resnet8", 32, SHARES, Block(8, 8), 3, 0, folder, zeros=True)
    with closing(ready):
        yield ready


@pytest.mark.slow
def test_all_engines_compute_the_same_and_are_timed(made):
    engines, left_out = build_engines(made, SETTING, ["torch-compile", "deepsparse"])
    rows = measure(made, engines, batch=3, rounds=2, seconds=0)
    names = {row.name: row for row in rows}
    assert list(names) == [
        "onnxruntime, dense",
        "openvino, dense",
        "torch-eager, dense",
        "onnxruntime, 75 % sparse, zeros kept",
        "openvino, 75 % sparse, zeros kept",
        "blocksparse, dense",
        "blocksparse, 75 % sparse",
    ]
    assert all(row.timing.rounds == 2 and row.timing.median_ms > 0 for row in rows)
    assert all(row.max_error <= row.allowed for row in rows)
    assert names["blocksparse, 75 % sparse"].max_error > 0  # compared with another engine
    assert left_out == ["torch-compile is left out, as asked", "deepsparse is left out, as asked"]


@pytest.mark.slow
def test_engines_take_the_batch_and_threads_they_are_built_for(made):
    engines, _ = build_engines(made, SETTING, ["torch-compile"])
    assert torch.get_num_threads() == 1
    assert all(engine.run(made.images).shape == (3, 1000) for engine in engines)
    assert made.file(0.75).network.threads == 1


def test_sparse_files_keep_what_they_should(made):
    dense, sparse = made.file(0.0), made.file(0.75)
    assert dense.flops_kept == dense.flops == sparse.flops
    # the first convolution and the shortcuts' padding apart, a quarter of the convolutions is left
    assert 0.25 < sparse.flops_kept / sparse.flops < 0.45
    assert np.abs(dense.logits - sparse.logits).max() > 0.1


def test_another_network_is_caught(made, tmp_path):
    other = dense_network("resnet8", 32, seed=1)
    wrong = Source(other, random_images(1, 32, 0), tmp_path / "wrong.onnx")
    run = build("onnxruntime", wrong, made.images.shape, 1)
    timed = []
    engines = [Engine(OURS, lambda x: timed.append(1) or made.file(0.0).network(x))]
    with pytest.raises(MismatchError, match=r"^onnxruntime, dense: .* up to [\d.]+, .* explains"):
        measure(made, [*engines, Engine("onnxruntime", run)], 3, rounds=5, seconds=0)
    assert len(timed) == 1  # compared, and never timed


def test_less_than_float32_is_caught(made):
    half = dense_network("resnet8", 32, 0).bfloat16()

    def run(images):
        return half(torch.from_numpy(images).bfloat16()).float().detach().numpy()

    with pytest.raises(MismatchError, match="not in float32"):
        made.check(Engine("torch-eager", run), 3)


@pytest.mark.parametrize(
    "spoil", [lambda logits: logits[:1], lambda logits: logits * np.float32(np.nan)]
)
def test_other_shapes_and_nan_are_caught(made, spoil):
    network = made.file(0.0).network
    with pytest.raises(MismatchError, match="nothing was timed"):
        made.check(Engine(OURS, lambda images: spoil(network(images))), 3)


def test_engine_that_is_not_installed_is_left_out_with_a_line(made, monkeypatch):
    monkeypatch.setitem(sys.modules, "openvino", None)  # what import does where it is missing
    engines, left_out = build_engines(made, SETTING, ["torch-compile", "deepsparse"])
    assert "openvino" not in {engine.kind for engine in engines}
    assert {"onnxruntime", "torch-eager", OURS} <= {engine.kind for engine in engines}
    line = left_out[0]
    assert line.startswith("openvino is left out")
    assert 'pip install -e ".[bench]"' in line


def test_without_onnx_those_that_do_not_read_it_run(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "onnx", None)
    with closing(exports.make("resnet8", 32, [0.0], Block(8, 8), 1, 0, tmp_path)) as ready:
        setting = replace(SETTING, sparsities=(0.0,), batch=1)
        engines, left_out = build_engines(ready, setting, ["torch-compile", "deepsparse"])
    assert [engine.kind for engine in engines] == ["torch-eager", OURS]
    for kind, line in zip(["onnxruntime", "openvino"], left_out, strict=False):
        assert line.startswith(f"{kind} is left out: no network can be written as ONNX")
        assert 'pip install -e ".[bench]"' in line


def test_network_is_written_as_onnx_when_an_engine_asks_and_then_once(tmp_path):
    with closing(exports.make("resnet8", 32, [0.0], Block(8, 8), 1, 0, tmp_path)) as ready:
        assert not list(tmp_path.glob("*.onnx"))
        written = ready.dense.onnx().stat()
        assert ready.dense.onnx().stat() == written


@pytest.mark.parametrize("kind", ["onnxruntime", "openvino"])
def test_engine_that_fails_to_build_is_left_out_with_a_line(made, tmp_path, monkeypatch, kind):
    unreadable = tmp_path / "unreadable.onnx"
    unreadable.write_bytes(b"no graph")
    peer = PEERS[kind]

    def fails(module, source, shape, threads):  # with what the engine itself raises
        return peer.build(module, replace(source, path=unreadable), shape, threads)

    monkeypatch.setitem(PEERS, kind, replace(peer, build=fails))
    engines, left_out = build_engines(made, SETTING, ["torch-compile", "deepsparse"])
    kinds = {"onnxruntime", "openvino", "torch-eager", OURS}
    assert {engine.kind for engine in engines} == kinds - {kind}
    assert left_out[0].startswith(f"{kind} is left out: it failed to build: ")
    assert f"--without {kind}" in left_out[0]
    assert "\n" not in left_out[0]


def run_small(folder, *options):
    small = ["--model", "resnet8", "--sparsity", "0", "0.75", "--rounds", "1", "--seconds", "0"]
    return compare.main([*small, "--threads", "1", "--output", str(folder), *options])


@pytest.mark.slow
def test_pages_and_summary_are_written(tmp_path, capsys):
    folder = tmp_path / "new" / "results"
    assert run_small(folder, "--batch", "1", "2", "1", "--without", "torch-compile") == 0
    stem = "resnet8-image32-8x8-shared-sparsity-0-75-batch"
    assert {path.name for path in folder.iterdir()} == {
        f"{stem}{batch}-threads1.{kind}" for batch in (1, 2) for kind in ("md", "json")
    } | {"summary.md"}
    tree = json.loads((folder / f"{stem}2-threads1.json").read_text())
    own = [cells for cells in tree["rows"] if cells["kind"] == OURS]
    peers = [cells for cells in tree["rows"] if cells["kind"] != OURS]
    fastest = min(cells["timing"]["median_ms"] for cells in peers)
    for cells in own:
        ratio = fastest / cells["timing"]["median_ms"]
        assert cells["times_as_fast_as_fastest_peer"] == pytest.approx(ratio)
    again = compare.parse(tree["command"].split()[3:])  # the command that is printed can be run
    assert (again.model, again.batch, again.threads) == (("resnet8",), (2,), (1,))
    assert again.sparsity == SHARES
    assert again.without == ["torch-compile"]
    assert "onnxruntime 1." in tree["machine"]
    shown = capsys.readouterr()
    assert (folder / "summary.md").read_text() in shown.out
    assert "deepsparse is left out" in shown.err


def test_unknown_network_is_refused_before_anything_is_measured(tmp_path, capsys):
    assert run_small(tmp_path, "--model", "resnet8", "resnet51") == 2
    assert "there is no network resnet51; there are resnet" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("text", ["1", "-0.1", "75", "half", "nan"])
def test_sparsity_is_a_share(text, capsys):
    with pytest.raises(SystemExit):
        compare.parse(["--sparsity", text])
    assert "such as 0.75 for 75 %" in capsys.readouterr().err


@pytest.mark.long
def test_compiled_pytorch_takes_part(tmp_path):
    assert run_small(tmp_path) == 0
    [facts] = tmp_path.glob("*.json")
    assert "torch-compile" in {cells["kind"] for cells in json.loads(facts.read_text())["rows"]}


@pytest.mark.long
def test_compiler_that_fails_is_said_and_the_rest_goes_on(made, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    with inductor.patch({"cpp.cxx": (None, "no-such-compiler")}):
        engines, left_out = build_engines(made, SETTING, ["deepsparse"])
    assert "torch-compile" not in {engine.kind for engine in engines}
    assert OURS in {engine.kind for engine in engines}
    assert left_out[0].startswith("torch-compile is left out: it failed: ")


@pytest.mark.long
def test_resnet50_at_75_percent_is_twice_as_fast_as_dense_eager(tmp_path):
    options = ["--sparsity", "0.75", "--without", "torch-compile", "--output", str(tmp_path)]
    assert compare.main(options) == 0
    [facts] = tmp_path.glob("*.json")
    times = {
        cells["name"]: cells["timing"]["median_ms"]
        for cells in json.loads(facts.read_text())["rows"]
    }
    assert times["torch-eager, dense"] >= 2 * times["blocksparse, 75 % sparse"]
