"""The closing report: the same figures in the table, in Markdown and in JSON, with their units."""

from __future__ import annotations

import dataclasses
import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from blocksparse.report import Accuracy, Cost, Latency, Report, Sizes, Sparsity

REPORT = Report(
    name="digits",
    command="python train.py experiment=digits seed=3",
    seed=3,
    sparsity=Sparsity(pattern="block 8x8 shared", target=0.75, reached=0.7503, layers=6),
    accuracy=Accuracy(dense=0.98333, sparse=0.98056, runtime=0.98056, images=360),
    sizes=Sizes(dense_checkpoint=1_207_989, exported_file=316_832, values=303_144, indices=4_856),
    cost=Cost(parameters=296_970, parameters_kept=75_786, flops=5_941_248, flops_kept=1_512_000),
    latencies=(
        Latency("dense, PyTorch eager", 0.559, 0.530, 0.627, 50),
        Latency("dense, blocksparse", 0.259, 0.250, 0.276, 50),
        Latency("sparse, blocksparse", 0.157, 0.154, 0.165, 50),
    ),
    threads=2,
    machine="a processor, 2 cores",
    cores=2,
    load=1.9,
    seconds=87.4,
    folder="runs/digits/now",
    files={"model.bsr.safetensors": "the network"},
)


def terminal(report: Report, width: int = 80) -> str:
    text = io.StringIO()
    Console(file=text, width=width).print(report.table())
    return text.getvalue()


def lines_with(text: str, *words: str) -> list[str]:
    return [line for line in text.splitlines() if all(word in line for word in words)]


@pytest.mark.parametrize("text", [terminal(REPORT), REPORT.to_markdown()], ids=["terminal", "page"])
@pytest.mark.parametrize(
    "words",
    [
        ("Accuracy", "360 validation images"),
        ("dense, PyTorch", "98.33 %"),
        ("sparse, PyTorch", "98.06 %", "-0.28 points"),
        ("sparse, blocksparse", "98.06 %", "-0.28 points"),
        ("dense checkpoint", "1,207,989 bytes", "weights only"),
        ("exported file", "316,832 bytes", "3.81x smaller"),
        ("values", "303,144 bytes", "95.7 % of the file"),
        ("indices", "4,856 bytes", "1.5 % of the file"),
        ("metadata", "8,832 bytes", "2.8 % of the file"),
        ("prunable weights", "25.0 %", "sparsity 75.0 %"),
        ("all parameters", "25.5 %", "75,786 of 296,970 parameters"),
        ("FLOPs per image", "25.4 %", "1.51 million of 5.94 million FLOPs"),
        ("dense, PyTorch eager", "0.559 ms", "[0.530 to 0.627 ms]"),
        ("sparse, blocksparse", "0.157 ms", "[0.154 to 0.165 ms]", "3.56x as fast"),
    ],
    ids=lambda words: words[0],
)
def test_line(text: str, words: tuple[str, ...]) -> None:
    assert len(lines_with(text, *words)) == 1


def test_fits_one_screen() -> None:
    text = terminal(REPORT)
    assert max(map(len, text.splitlines())) <= 80
    assert len(text.splitlines()) <= 30


def test_says_batch_and_threads() -> None:
    text = REPORT.to_markdown()
    assert lines_with(text, "Time per image", "batch 1", "2 threads", "median [quartiles]")
    alone = dataclasses.replace(REPORT, threads=1)
    assert lines_with(alone.to_markdown(), "Time per image", "1 thread,")


def test_page_is_a_table_of_three_columns() -> None:
    table = [line for line in REPORT.to_markdown().splitlines() if line.startswith("|")]
    assert {line.count("|") for line in table} == {4}


def test_page_says_where_things_are() -> None:
    assert lines_with(REPORT.to_markdown(), "- `model.bsr.safetensors`: the network")
    assert "Written to `runs/digits/now`" in REPORT.to_markdown()


def test_says_what_was_typed_and_the_seed() -> None:
    assert "digits, seed 3, 87 s in all" in terminal(REPORT)
    assert lines_with(REPORT.to_markdown(), "Command: `python train.py experiment=digits seed=3`")
    assert lines_with(REPORT.to_markdown(), "Seed 3, 87 s on a processor")
    values = REPORT.to_dict()
    assert (values["command"], values["seed"]) == (REPORT.command, 3)
    old = dataclasses.replace(REPORT, command="")
    assert "Command" not in old.to_markdown()


def test_json_holds_every_figure_under_its_unit() -> None:
    values = json.loads(json.dumps(REPORT.to_dict()))
    assert values["sizes"] == {
        "dense_checkpoint_bytes": 1_207_989,
        "exported_file_bytes": 316_832,
        "values_bytes": 303_144,
        "indices_bytes": 4_856,
        "metadata_bytes": 8_832,
    }
    assert values["latency"]["engines"][2] == {
        "engine": "sparse, blocksparse",
        "median_ms": 0.157,
        "q1_ms": 0.154,
        "q3_ms": 0.165,
        "rounds": 50,
    }
    assert values["accuracy"]["runtime"] == 0.98056
    assert values["sparsity"]["reached"] == 0.7503
    assert values["cost"]["flops_kept"] == 1_512_000


@pytest.mark.parametrize(("load", "busy"), [(None, False), (2.4, False), (7.7, True)])
def test_remarks_on_a_busy_machine(load: float | None, busy: bool) -> None:
    report = dataclasses.replace(REPORT, load=load)
    assert bool(report.remarks()) == busy
    assert ("do not trust" in report.to_markdown()) == busy
    assert report.to_dict()["remarks"] == report.remarks()


@pytest.mark.parametrize(
    ("median", "shown"), [(0.0314, "0.031 ms"), (4.567, "4.57 ms"), (61.04, "61.0 ms")]
)
def test_milliseconds_keep_what_is_known(median: float, shown: str) -> None:
    slow = Latency("dense, PyTorch eager", median, median, median, 5)
    report = dataclasses.replace(REPORT, latencies=(slow,))
    assert lines_with(report.to_markdown(), "dense, PyTorch eager", f"| {shown} |")


def test_large_counts_are_readable() -> None:
    cost = Cost(25_557_032, 8_000_000, 8_178_000_000, 2_100_000_000)
    text = dataclasses.replace(REPORT, cost=cost).to_markdown()
    assert "8.00 million of 25.56 million parameters" in text
    assert "2.10 billion of 8.18 billion FLOPs" in text


def test_sizes_that_cannot_be_are_refused() -> None:
    with pytest.raises(ValueError, match="more than the exported file"):
        Sizes(dense_checkpoint=100, exported_file=50, values=40, indices=20)


def test_save_replaces_what_was_there(tmp_path: Path) -> None:
    (tmp_path / "report.md").write_text("old")
    REPORT.save(tmp_path)
    assert (tmp_path / "report.md").read_text() == REPORT.to_markdown()
    assert json.loads((tmp_path / "report.json").read_text()) == REPORT.to_dict()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.json", "report.md"]
