from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from blocksparse.cli import main
from blocksparse.cli.bench import MIN_SECONDS
from blocksparse.cli.console import bytes_text, count_text, one_line
from blocksparse.cli.verify import _compiled_checks
from blocksparse.format import (
    BsrWeight,
    DenseWeight,
    Graph,
    Model,
    NMWeight,
    Node,
    Preprocessing,
    ValueSpec,
)
from blocksparse.format.writer import write
from blocksparse.perf.timing import Timing
from blocksparse.runtime import load, reference
from blocksparse.runtime.tolerance import tolerance

CLASSES = ("cat", "dog", "[red]fish[/red]", "\x1b[31mowl")


def conv(name, source, shape, stride=1, activation="relu"):
    attrs = {
        "stride": (stride, stride),
        "padding": (1, 1),
        "dilation": (1, 1),
        "groups": 1,
        "activation": activation,
    }
    return Node(name, "conv2d", source, attrs, shape)


def small_model(**changes):
    """RGB 12x12 -> dense stem -> block-sparse residual conv -> 2:4 conv -> mean -> linear."""
    random = np.random.default_rng(3)
    pruned = random.standard_normal((16, 16, 3, 3)).astype(np.float32) / 12
    pruned[8:, :8] = 0
    pruned[:8, 8:] = 0
    grouped = random.standard_normal((8, 16, 3, 3)).astype(np.float32) / 12
    grouped[:, 2::4] = 0
    grouped[:, 3::4] = 0
    nodes = (
        conv("stem", ("x",), (16, 6, 6), stride=2),
        conv("body", ("stem", "stem"), (16, 6, 6)),
        conv("tail", ("body",), (8, 6, 6)),
        Node("pool", "adaptive_avg_pool2d", ("tail",), {"output_size": (1, 1)}, (8, 1, 1)),
        Node("flat", "flatten", ("pool",), {}, (8,)),
        Node("fc", "linear", ("flat",), {"activation": "none"}, (4,)),
    )
    facts = {
        "graph": Graph((ValueSpec("x", (3, 12, 12)),), ("fc",), nodes),
        "weights": {
            "stem": DenseWeight.from_dense(random.standard_normal((16, 3, 3, 3)) / 5),
            "body": BsrWeight.from_dense(pruned, (8, 8)),
            "tail": NMWeight.from_dense(grouped, 2, 4),
            "fc": DenseWeight.from_dense(random.standard_normal((4, 8))),
        },
        "vectors": {"stem.bias": np.ones(16, np.float32), "fc.bias": np.ones(4, np.float32)},
        "classes": CLASSES,
        "preprocessing": Preprocessing(12, (12, 12), (0.5,) * 3, (0.25,) * 3, "rgb"),
        "provenance": {"config": {"seed": 7}, "metrics": {"val_acc": 0.5}},
    }
    return Model(**{**facts, **changes})


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "small.bsr.safetensors"
    write(path, small_model())
    return path


def call(capsys, *arguments):
    """Run the command line in this process: exit status, standard output, standard error."""
    status = main([str(argument) for argument in arguments])
    return status, *capsys.readouterr()


# info


def test_info_json_counts_bytes_and_weights(file, capsys):
    status, out, _ = call(capsys, "info", file, "--json")
    facts = json.loads(out)
    size = facts["bytes"]
    assert status == 0
    assert size["file"] == file.stat().st_size
    assert size["values"] + size["indices"] + size["metadata"] == size["file"]
    values = 16 * 27 + 2 * 9 * 64 + 8 * 9 * 8 + 32 + 16 + 4
    assert size["values"] == 4 * values
    assert size["indices"] == 4 * (2 * 9 + 3) + 8 * 9 * 8 // 4
    assert facts["parameters"]["kept"] == values
    assert facts["parameters"]["dense"] == values + 2 * 9 * 64 + 8 * 9 * 8
    assert [(row["name"], row["layout"], row["density"]) for row in facts["layers"]] == [
        ("stem", "dense", 1.0),
        ("body", "bsr 8x8", 0.5),
        ("tail", "2:4", 0.5),
        ("fc", "dense", 1.0),
    ]
    assert facts["classes"] == list(CLASSES)
    assert facts["provenance"]["config"]["seed"] == 7


def test_info_says_everything_once_in_words(file, capsys):
    status, out, err = call(capsys, "info", file)
    assert (status, err) == (0, "")
    for text in ("body", "16x16x3x3", "bsr 8x8", "50.0 %", "values + ", "FLOPs per image"):
        assert text in out
    for text in ("config.seed", "shorter side to 12", "3 x 12 x 12", "3 conv2d"):
        assert text in out


def test_names_from_the_file_cannot_steer_the_terminal(file, capsys):
    _, out, _ = call(capsys, "info", file)
    assert "\x1b" not in out
    assert "\\x1b[31mowl" in out
    assert "[red]fish[/red]" in out  # shown, not obeyed


def test_info_of_a_model_nothing_is_known_about(tmp_path, capsys):
    path = tmp_path / "bare.bsr.safetensors"
    write(path, small_model(classes=None, preprocessing=None, provenance={}))
    _, out, _ = call(capsys, "info", path)
    assert out.count("not recorded") == 3


def test_explain_names_a_kernel_for_every_layer(file, capsys):
    status, out, _ = call(capsys, "info", file, "--explain", "--json")
    rows = json.loads(out)["explain"]
    assert status == 0
    assert {"stem", "body", "tail", "fc"} <= {row["name"] for row in rows}
    assert all(row["kernel"] and row["reason"] for row in rows)


# verify


def test_verify_finds_a_sound_file_sound(file, capsys):
    status, out, _ = call(capsys, "verify", file, "--json")
    tree = json.loads(out)
    assert status == 0
    assert tree["sound"]
    states = {check["name"]: check["state"] for check in tree["checks"]}
    assert states.pop("file format") == "passed"
    assert set(states.values()) <= {"passed", "skipped"}


def test_verify_says_what_it_checked(file, capsys):
    status, out, _ = call(capsys, "verify", file)
    assert status == 0
    assert "is sound" in out
    assert "reference engine" in out


def test_verify_finds_a_broken_file_unsound(file, tmp_path, capsys):
    path = tmp_path / "broken.bsr.safetensors"
    path.write_bytes(file.read_bytes()[:-8])
    status, out, _ = call(capsys, "verify", path)
    assert status == 1
    assert "failed" in out
    assert "NOT sound" in out


def test_verify_warns_of_subnormal_weights(tmp_path, capsys):
    tiny = np.full((16, 3, 3, 3), 1e-40, np.float32)
    weights = {**small_model().weights, "stem": DenseWeight.from_dense(tiny)}
    path = tmp_path / "tiny.bsr.safetensors"
    write(path, small_model(weights=weights))
    status, out, _ = call(capsys, "verify", path, "--json")
    checks = {check["name"]: check for check in json.loads(out)["checks"]}
    assert status == 0
    assert checks["no subnormal weights"]["state"] == "warning"
    assert "432 weights" in checks["no subnormal weights"]["detail"]


def test_verify_fails_where_outputs_overflow(tmp_path, capsys):
    huge = np.full((4, 8), 3e38, np.float32)
    weights = {**small_model().weights, "fc": DenseWeight.from_dense(huge)}
    path = tmp_path / "huge.bsr.safetensors"
    write(path, small_model(weights=weights))
    status, out, _ = call(capsys, "verify", path, "--json")
    assert status == 1
    assert json.loads(out)["checks"][-1]["name"] == "reference engine"


def test_verify_sees_an_engine_that_computes_something_else(file):
    fc = small_model().weights["fc"].values.copy()
    fc[2, 5] += 0.01
    other = small_model(weights={**small_model().weights, "fc": DenseWeight.from_dense(fc)})
    images = np.random.default_rng(0).standard_normal((3, 3, 12, 12)).astype(np.float32)
    for truth, state in ((small_model(), "passed"), (other, "failed")):
        expected = reference.run(truth, images)
        allowed = tolerance(truth, np.abs(expected).max())
        checks = list(_compiled_checks(load(file, threads=2), images, expected, allowed))
        assert [check.state for check in checks[:2]] == [state, state]
        assert [check.state for check in checks[2:]] == ["passed", "passed"]


# run


def test_run_takes_a_float_array_as_it_is(file, tmp_path, capsys):
    images = np.random.default_rng(0).standard_normal((5, 3, 12, 12)).astype(np.float32)
    np.save(tmp_path / "five.npy", images)
    arguments = ("--json", "--top", "2", "--batch", "2", "--engine", "reference")
    status, out, _ = call(capsys, "run", file, tmp_path / "five.npy", *arguments)
    results = json.loads(out)
    logits = reference.run(small_model(), images)
    assert status == 0
    assert [Path(result["image"]).name for result in results] == [
        f"five.npy[{i}]" for i in range(5)
    ]
    for result, row in zip(results, logits, strict=True):
        best, second = result["predictions"]
        assert best["index"] == row.argmax()
        assert best["class"] == CLASSES[row.argmax()]
        assert best["logit"] == pytest.approx(row.max(), rel=1e-5)
        odds = np.exp(best["logit"] - second["logit"])
        assert best["probability"] / second["probability"] == pytest.approx(odds, rel=1e-5)


def test_run_prints_a_table_of_a_folder(file, tmp_path, capsys):
    for name in ("b.npy", "a.npy"):
        np.save(tmp_path / name, np.zeros((3, 12, 12), np.float32))
    status, out, err = call(capsys, "run", file, tmp_path, "--top", "1")
    lines = [line.split()[0] for line in out.splitlines() if ".npy" in line]
    assert (status, err) == (0, "")
    assert [Path(line).name for line in lines] == ["a.npy", "b.npy"]


@pytest.mark.parametrize(
    ("array", "words"),
    [
        (np.zeros((3, 12, 11), np.float32), ("(3, 12, 11)", "(3, 12, 12)")),
        (np.zeros((12, 12), np.float64), ("(12, 12)", "neither")),
        (np.zeros((12, 12, 4), np.uint8), ("1 or 3 channels",)),
        (np.array([{}], dtype=object), ("not a readable .npy",)),
    ],
)
def test_run_refuses_arrays_that_do_not_fit(file, tmp_path, capsys, array, words):
    np.save(tmp_path / "odd.npy", array, allow_pickle=True)
    status, out, err = call(capsys, "run", file, tmp_path / "odd.npy")
    assert (status, out) == (1, "")
    assert len(err.splitlines()) == 1
    for word in ("odd.npy", *words):
        assert word in err


def test_run_refuses_a_text_called_image(file, tmp_path, capsys):
    pytest.importorskip("PIL")
    (tmp_path / "cat.jpg").write_text("no image")
    status, _, err = call(capsys, "run", file, tmp_path / "cat.jpg")
    assert status == 1
    assert "cat.jpg is not a readable image" in err


# bench


def test_bench_writes_figures_that_agree_with_each_other(file, tmp_path, capsys):
    target = tmp_path / "figures.json"
    arguments = ("--batch", "1,3", "--rounds", "3", "--threads", "1", "--save", target)
    status, out, _ = call(capsys, "bench", file, *arguments)
    facts = json.loads(target.read_text())
    assert status == 0
    assert [speed["batch"] for speed in facts["speeds"]] == [1, 3]
    for speed in facts["speeds"]:
        timing = speed["timing"]
        assert 0 < timing["q1_ms"] <= timing["median_ms"] <= timing["q3_ms"]
        assert timing["rounds"] >= 3
        per_second = speed["batch"] / timing["median_ms"] * 1e3
        assert speed["images_per_second"] == pytest.approx(per_second)
        work = 2 * (36 * (16 * 27 + 2 * 9 * 64 + 8 * 9 * 8) + 32)
        assert speed["gflops_useful"] == pytest.approx(per_second * work / 1e9)
        assert speed["gflops_dense_equivalent"] > speed["gflops_useful"]
    for text in ("ms per batch", "images/s", "useful GFLOP/s", "1 thread", "rounds on"):
        assert text in out
    assert list(tmp_path.iterdir()) == [target]


def test_bench_goes_on_where_its_rounds_take_no_time(file, monkeypatch, capsys):
    asked = []

    def interleave(candidates, **how):
        asked.append(how["min_seconds"])
        return {name: Timing(1.0, 1.0, 1.0, 1.0, how["rounds"]) for name in candidates}

    monkeypatch.setattr("blocksparse.perf.interleave", interleave)
    assert call(capsys, "bench", file, "--threads", "1")[0] == 0
    assert asked == [MIN_SECONDS]
    assert MIN_SECONDS > 0


# errors and exit status


@pytest.mark.parametrize("command", ["info", "verify", "run", "bench"])
def test_a_missing_file_is_one_line_and_status_2(command, tmp_path, capsys):
    extra = ["cat.jpg"] if command == "run" else []
    status, out, err = call(capsys, command, tmp_path / "no.bsr.safetensors", *extra)
    assert (status, out) == (2, "")
    assert err.startswith("blocksparse: error: there is no file ")
    assert len(err.splitlines()) == 1


def test_a_near_miss_is_told_what_lies_there(file, capsys):
    for wrong in (file.parent, file.with_name("smal.bsr.safetensors")):
        status, _, err = call(capsys, "info", wrong)
        assert status == 2
        assert f"did you mean {file}?" in err


@pytest.mark.parametrize("command", ["info", "run", "bench"])
def test_a_broken_file_is_one_line_and_status_1(command, file, tmp_path, capsys):
    path = tmp_path / "broken.bsr.safetensors"
    path.write_bytes(file.read_bytes()[:100])
    image = tmp_path / "x.npy"
    np.save(image, np.zeros((3, 12, 12), np.float32))
    extra = [image] if command == "run" else []
    status, out, err = call(capsys, command, path, *extra)
    assert (status, out) == (1, "")
    assert str(path) in err
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize(
    "arguments",
    [[], ["dance"], ["bench"], ["bench", "f", "--batch", "0"], ["bench", "f", "--batch", "1,,2"]],
)
def test_a_wrong_command_line_is_status_2(arguments, capsys):
    try:
        status = main(arguments)
    except SystemExit as leaving:
        status = leaving.code
    assert status == 2


@pytest.mark.parametrize("command", ["info", "verify", "run", "bench"])
def test_help_teaches_with_examples(command, capsys):
    with pytest.raises(SystemExit) as leaving:
        main([command, "--help"])
    assert leaving.value.code == 0
    assert f"blocksparse {command}" in capsys.readouterr().out.split("examples:")[1]


def test_the_module_is_the_command(file):
    command = [sys.executable, "-m", "blocksparse.cli", "info", str(file), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    assert json.loads(done.stdout)["file"] == file.name


# figures in words


def test_figures_in_words():
    assert [bytes_text(n) for n in (0, 999, 1000, 12_345, 4_110_000)] == [
        "0 B",
        "999 B",
        "1.00 kB",
        "12.3 kB",
        "4.11 MB",
    ]
    assert [count_text(n) for n in (812, 25_600_000, 4_110_000_000)] == [
        "812",
        "25.6 million",
        "4.11 billion",
    ]
    assert one_line("a\nb\x1b[2J\t c") == "a b\\x1b[2J c"
