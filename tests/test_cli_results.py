"""`blocksparse results`: groups of seeds, spreads, what is left out, the page and its plots."""

from __future__ import annotations

import builtins
import dataclasses
import json
import re
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_cli import call
from test_report import REPORT

from blocksparse.cli import main
from blocksparse.cli.result_groups import find_runs, group_runs, without_seed
from blocksparse.cli.result_labels import box, overlap, place_labels
from blocksparse.report import Accuracy, Sizes, Sparsity

CONFIG = "task:\n  name: train\ndata:\n  root: data/cifar10\nmodel:\n  widths:\n  - 8\n  name: {}\n"
TOP1 = (0.905, 0.9, 0.9125)


def save(path, command="", model="resnet20", config=True, **changes):
    """Write a run as `train.py` leaves it."""
    seed = re.search(r"seed=(\d+)", command)
    report = dataclasses.replace(
        REPORT, command=command, seed=int(seed[1]) if seed else 0, **changes
    )
    path.mkdir(parents=True)
    report.save(path)
    if config:
        (path / "config.yaml").write_text(CONFIG.format(model))
    return report


def accuracy(top1):
    return Accuracy(dense=0.925, sparse=top1, runtime=top1, images=5000)


def save_four(folder):
    """Write three seeds of blocks, one of them on a busy machine, and one run of 2:4."""
    for seed, top1 in enumerate(TOP1):
        latencies = tuple(
            dataclasses.replace(one, median_ms=one.median_ms * (1 + seed))
            for one in REPORT.latencies
        )
        save(
            folder / "sweep" / str(seed),
            f"python train.py experiment=blocks seed={seed} sparsity.target=0.75",
            name="blocks",
            accuracy=accuracy(top1),
            sizes=Sizes(1_200_000, 300_000 + seed, 290_000, 5_000),
            latencies=latencies,
            load=9.0 if seed == 2 else 0.5,
        )
    save(
        folder / "nm",
        "python train.py experiment=blocks sparsity=nm24",
        name="blocks",
        accuracy=accuracy(0.92),
        sparsity=Sparsity(pattern="2:4", target=0.5, reached=0.5, layers=6),
        sizes=Sizes(1_200_000, 600_000, 580_000, 10_000),
        load=9.0,
    )
    return folder


@pytest.fixture
def runs(tmp_path):
    return save_four(tmp_path / "runs")


def facts(capsys, *arguments):
    status, out, err = call(capsys, "results", *arguments, "--json")
    assert (status, err) == (0, "")
    return json.loads(out)


def test_files_of_one_name_in_two_places_are_two_rows(tmp_path, capsys):
    """A command has only the last part of a path; the configuration has all of it."""
    for seed, place in enumerate(("a", "b")):
        path = tmp_path / place
        save(path, f"python train.py model.weights=dense.ckpt seed={seed}", config=False)
        weights = f"  weights: /runs/{place}/dense.ckpt\n"
        (path / "config.yaml").write_text(CONFIG.format("resnet20") + weights)
    assert [len(row["runs"]) for row in facts(capsys, tmp_path)["rows"]] == [1, 1]


def test_times_of_one_machine_count(tmp_path, capsys):
    for seed, (machine, factor) in enumerate((("fast", 1), ("slow", 10), ("slow", 12))):
        times = [dataclasses.replace(x, median_ms=x.median_ms * factor) for x in REPORT.latencies]
        save(
            tmp_path / str(seed),
            f"python train.py seed={seed}",
            machine=machine,
            load=0.0,
            latencies=tuple(times),
        )
    (row,) = facts(capsys, tmp_path)["rows"]
    assert row["ms"] == pytest.approx(11 * REPORT.latencies[-1].median_ms)


def test_seeds_share_a_row(runs, capsys):
    rows = facts(capsys, runs)["rows"]
    assert [(row["pattern"], len(row["runs"])) for row in rows] == [
        ("2:4", 1),
        ("block 8x8 shared", 3),
    ]
    alone, blocks = rows
    losses = 100 * (0.925 - np.array(TOP1))
    assert blocks["loss_points"]["mean"] == pytest.approx(np.mean(losses))
    assert blocks["loss_points"]["standard_deviation"] == pytest.approx(np.std(losses, ddof=1))
    assert blocks["top1"] == pytest.approx(
        {"mean": np.mean(TOP1), "lowest": 0.9, "highest": 0.9125}
    )
    assert blocks["file_bytes"] == 300_001
    assert blocks["command"] == (
        "python train.py -m experiment=blocks sparsity.target=0.75 seed=0,1,2"
    )
    assert alone["loss_points"]["standard_deviation"] is None
    assert alone["command"] == "python train.py experiment=blocks sparsity=nm24"


def test_times_of_a_busy_machine_count_only_where_there_are_no_others(runs, capsys):
    alone, blocks = facts(capsys, runs)["rows"]
    assert not blocks["busy"]
    assert blocks["ms"] == pytest.approx(np.median([0.157, 2 * 0.157]))
    assert blocks["times_as_fast_as_dense"] == pytest.approx(0.259 / 0.157)
    assert alone["busy"]
    assert alone["ms"] == pytest.approx(0.157)


def test_table_in_words(runs, capsys):
    status, out, err = call(capsys, "results", runs)
    assert (status, err) == (0, "")
    for text in (
        "90.58 % (90.00 to 91.25, 3 seeds)",
        "1.92 (sd 0.63)",
        "300,001",
        "0.157 (busy)",
        "1.65x as fast",
        "Do not trust these times",
        "2: python train.py -m experiment=blocks sparsity.target=0.75 seed=0,1,2",
        "Times at batch 1, 2 threads on a processor",
    ):
        assert text in out


def test_rows_are_sorted_by_name_then_sparsity(tmp_path, capsys):
    for number, (name, share) in enumerate([("b", 0.5), ("a", 0.75), ("b", 0.25), ("a", 0.5)]):
        sparsity = dataclasses.replace(REPORT.sparsity, reached=share)
        save(tmp_path / str(number), f"python train.py x={number}", name=name, sparsity=sparsity)
    rows = facts(capsys, tmp_path)["rows"]
    assert [(row["name"], row["sparsity"]) for row in rows] == [
        ("a", 0.5),
        ("a", 0.75),
        ("b", 0.25),
        ("b", 0.5),
    ]


def test_runs_without_a_command_stay_apart(tmp_path, capsys):
    for name in ("one", "two"):
        save(tmp_path / name)
        path = tmp_path / name / "report.json"
        old = json.loads(path.read_text())
        del old["command"], old["seed"]  # as earlier versions wrote it
        path.write_text(json.dumps(old))
    assert [len(row["runs"]) for row in facts(capsys, tmp_path)["rows"]] == [1, 1]
    _, out, _ = call(capsys, "results", tmp_path)
    assert "1: no command recorded, the run in one" in out


def test_the_same_seed_twice_is_no_second_draw(tmp_path, capsys):
    for name in ("a", "b"):
        save(tmp_path / name, "python train.py seed=1")
    (row,) = facts(capsys, tmp_path)["rows"]
    assert [run["folder"] for run in row["runs"]] == [str(tmp_path / "b")]
    _, out, _ = call(capsys, "results", tmp_path)
    assert f"{tmp_path / 'a'}: same command and seed as {tmp_path / 'b'}" in out


def test_other_numbers_of_threads_stay_apart(tmp_path, capsys):
    for threads in (1, 2):
        save(tmp_path / str(threads), f"python train.py seed={threads}", threads=threads)
    assert len(facts(capsys, tmp_path)["rows"]) == 2
    _, out, _ = call(capsys, "results", tmp_path)
    assert "do not compare; here they are of: 1 thread on a processor" in out


def test_a_run_below_two_of_the_folders_counts_once(runs, capsys):
    found = facts(capsys, runs, runs / "sweep")
    assert [len(row["runs"]) for row in found["rows"]] == [1, 3]
    assert not found["replaced"]


def test_runs_that_are_in_no_row_are_named(runs, capsys):
    broken_off, scan = runs / "broken_off", runs / "scan"
    for folder, task in ((broken_off, "train"), (scan, "sensitivity")):
        (folder / ".hydra").mkdir(parents=True)
        (folder / ".hydra" / "config.yaml").write_text("seed: 0\n")
        (folder / "config.yaml").write_text(f"task:\n  name: {task}\nseed: 0\n")
    _, out, _ = call(capsys, "results", runs)
    assert f"{broken_off}: still running, or broken off" in out
    assert f"python train.py resume={broken_off}" in out
    assert f"{scan}: task=sensitivity, which ends without a closing report" in out
    assert ".hydra" not in out


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda text: text[: len(text) // 2], "line"),
        (lambda text: "[]", "it holds no object"),
        (lambda text: text.replace('"flops_kept"', '"flops_left"'), "'flops_kept' is missing"),
        (lambda text: text.replace("sparse, blocksparse", "other"), "'sparse, blocksparse' is"),
    ],
)
def test_a_broken_report_is_an_error_that_names_it(runs, capsys, change, words):
    path = runs / "nm" / "report.json"
    path.write_text(change(path.read_text()))
    status, out, err = call(capsys, "results", runs)
    assert (status, out) == (1, "")
    assert len(err.splitlines()) == 1
    for text in (str(path), words, f"python train.py resume={path.parent}"):
        assert text in err


def test_nothing_to_compare_is_an_error(tmp_path, capsys):
    status, out, err = call(capsys, "results", tmp_path)
    assert (status, out) == (2, "")
    assert f"no finished run (report.json) at or below {tmp_path}" in err
    (tmp_path / "config.yaml").write_text("seed: 0\n")
    assert "broken off" in call(capsys, "results", tmp_path)[2]
    status, _, err = call(capsys, "results", tmp_path / "nowhere")
    assert status == 2
    assert "nowhere does not exist" in err
    assert "is not a folder" in call(capsys, "results", tmp_path / "config.yaml")[2]


@pytest.mark.parametrize(
    ("command", "rest"),
    [
        ("python train.py seed=1 x=2", "python train.py x=2"),
        ("python train.py x=2 ++seed=1", "python train.py x=2"),
        ("python train.py data.seed=1 'a=b seed=3'", "python train.py data.seed=1 'a=b seed=3'"),
    ],
)
def test_only_the_seed_goes(command, rest):
    assert without_seed(command) == rest


# the page and the plots


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    pytest.importorskip("matplotlib")
    base = tmp_path_factory.mktemp("page")
    runs, out = save_four(base / "runs"), base / "new" / "out"
    assert main(["results", str(runs), "--out", str(out)]) == 0
    return out


def test_page_holds_the_table_and_the_commands(page):
    text = (page / "results.md").read_text()
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert len(table) == 4
    assert {line.count("|") for line in table} == {12}
    assert "| 2 | blocks | block 8x8 shared | 75.0 % |" in text
    assert "python train.py -m experiment=blocks sparsity.target=0.75 seed=0,1,2  # 2\n" in text
    for name in ("accuracy_latency.svg", "accuracy_bytes.svg"):
        assert f"]({name})" in text
    assert str(page.parent.parent) not in text
    assert sorted(path.name for path in page.iterdir()) == [
        "accuracy_bytes.svg",
        "accuracy_latency.svg",
        "results.md",
    ]


@pytest.mark.parametrize("name", ["accuracy_latency.svg", "accuracy_bytes.svg"])
def test_plot_has_a_point_for_each_row_and_one_for_the_dense_network(page, name):
    tree = ElementTree.parse(page / name)
    points = [i for e in tree.iter() if (i := e.get("id", "")).startswith("point-")]
    assert points == ["point-0-0", "point-1-0", "point-2-0"]
    comments = re.findall(r"<!-- (.*?) -->", (page / name).read_text())
    for text in ("resnet20, dense", "resnet20, 2:4", "resnet20, block 8x8 shared", "75 %", "50 %"):
        assert text in comments
    assert "top-1 accuracy, %" in comments
    unit = "ms (batch 1, 2 threads, median)" if "latency" in name else "MB"
    assert any(text.endswith(unit) for text in comments)
    assert ("hollow: machine was busy, time not to be trusted" in comments) == ("latency" in name)


def test_plots_are_the_same_each_time(page, runs, tmp_path, capsys):
    call(capsys, "results", runs, "--out", tmp_path / "again")
    for path in page.iterdir():
        assert path.read_bytes() == (tmp_path / "again" / path.name).read_bytes()
        assert b"date" not in path.read_bytes().lower()


def test_points_lie_where_the_figures_say(runs):
    plots = pytest.importorskip("blocksparse.cli.result_plots")
    save(runs / "other", "python train.py model=resnet56", model="resnet56")
    groups, _ = group_runs(find_runs([runs]).runs)
    drawn = []
    draw = plots.draw
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            plots, "draw", lambda series, label: drawn.append(series) or draw(series, label)
        )
        plots.against_latency(groups)
        plots.against_bytes(groups)
    times, sizes = drawn
    titles = ["resnet20, dense", "resnet20, 2:4", "resnet20, block 8x8 shared"]
    titles += ["resnet56, dense", "resnet56, block 8x8 shared"]
    assert [series.title for series in times] == [series.title for series in sizes] == titles
    dense, nm, blocks = (series.points[0] for series in times[:3])
    assert (dense.y, dense.trusted) == (pytest.approx(92.5), True)
    assert dense.x == pytest.approx(1.5 * 0.259)  # of the quiet group: the median of two runs
    assert (nm.x, nm.y, nm.trusted) == (pytest.approx(0.157), pytest.approx(92), False)
    assert (blocks.low, blocks.high) == pytest.approx((90, 91.25))
    assert [series.points[0].x for series in sizes[:3]] == pytest.approx(
        [1.2, 0.6, 0.300001], rel=1e-6
    )


def test_without_matplotlib_the_table_is_there_and_plots_say_what_to_install(
    runs, tmp_path, capsys, monkeypatch
):
    real = builtins.__import__

    def without(name, *arguments):
        if name.partition(".")[0] == "matplotlib" or name.endswith("result_plots"):
            raise ImportError("No module named 'matplotlib'")
        return real(name, *arguments)

    monkeypatch.setattr(builtins, "__import__", without)
    assert call(capsys, "results", runs)[0] == 0
    status, out, err = call(capsys, "results", runs, "--out", tmp_path / "out")
    assert (status, out) == (1, "")
    assert 'pip install "blocksparse[train]"' in err
    assert not (tmp_path / "out").exists()


def test_out_cannot_be_a_file(runs, capsys):
    status, _, err = call(capsys, "results", runs, "--out", runs / "nm" / "report.json")
    assert status == 2
    assert "is a file; name a folder" in err


# places of labels


@given(st.lists(st.tuples(st.integers(0, 60), st.integers(0, 60)), min_size=1, max_size=6))
def test_labels_cover_no_mark_and_no_other_label(places):
    marks = np.array(places, np.float64) * 5 + 150
    sizes = np.tile([30.0, 10.0], (len(marks), 1))
    obstacles = box(marks, np.full(2, 8.0))
    middles = place_labels(marks, sizes, obstacles, np.array([0.0, 0, 600, 600]))
    boxes = box(middles, sizes)
    assert overlap(boxes[:, None], obstacles[None]).max() == 0
    assert np.triu(overlap(boxes[:, None], boxes[None]), 1).max() == 0
    assert (boxes >= 0).all()
    assert (boxes <= 600).all()


def test_label_stands_beside_its_mark_where_nothing_is_in_the_way():
    mark = np.array([[50.0, 50.0]])
    inside = np.array([0.0, 0, 100, 100])
    (middle,) = place_labels(mark, np.array([[20.0, 10]]), box(mark, np.full(2, 8.0)), inside)
    assert tuple(middle) == (50 + 14 + 5, 50)
    # Up against the right edge, it stands on the left.
    mark = np.array([[95.0, 50.0]])
    (middle,) = place_labels(mark, np.array([[20.0, 10]]), box(mark, np.full(2, 8.0)), inside)
    assert middle[0] == pytest.approx(95 - 14 - 5)
