"""The pages of the benchmarks: what is compared with what, and when not to believe it."""

from __future__ import annotations

import dataclasses
import json

import pytest

from benchmarks.figures import OURS, Result, Row, Setting, Work
from benchmarks.tables import MARK, busy, facts, page, save, summary
from blocksparse.perf import Timing


def row(name, kind, ms, sparsity=0.0, spread=1.0):
    return Row(name, kind, sparsity, Timing(ms, ms, ms * spread, ms, 10), 1e-6, 1e-4)


def result(*rows, batch=1, left_out=()):
    return Result(
        setting=Setting("resnet50", 224, (0.0, 0.75), "shared", batch, 2),
        date="2026-01-01",
        machine="a machine",
        command="python -m benchmarks.compare",
        rows=rows,
        work=(Work(0.0, 1000, 100, 100, 2000, 2000), Work(0.75, 300, 100, 28, 2000, 600)),
        left_out=tuple(left_out),
        seconds={"measuring": 1.0},
    )


SLOW = row("torch-eager, dense", "torch-eager", 60.0)
FAST = row("openvino, dense", "openvino", 30.0)
ZEROS = row("onnxruntime, 75 % sparse, zeros kept", "onnxruntime", 10.0, 0.75)
DENSE = row("blocksparse, dense", OURS, 40.0)
SPARSE = row("blocksparse, 75 % sparse", OURS, 20.0, 0.75)


@pytest.mark.parametrize("rows", [(SLOW, FAST, ZEROS, DENSE, SPARSE), (SPARSE, FAST, SLOW)])
def test_ratio_is_to_the_fastest_peer_on_the_dense_network(rows):
    figures = result(*rows)
    assert figures.fastest_peer == FAST  # neither the slower one, nor a sparse network, nor ours
    assert figures.ratio(SPARSE) == pytest.approx(1.5)


def test_page_shows_each_row_with_its_ratio():
    text = page(result(SLOW, FAST, DENSE, SPARSE, batch=4))
    assert "the fastest peer (openvino)" in text
    assert "| blocksparse, 75 % sparse | 20.00 | 20.00 to 20.00 | 200.0 | 1.50 |" in text
    assert "| blocksparse, dense | 40.00 | 40.00 to 40.00 | 100.0 | 0.75 |" in text
    assert "| torch-eager, dense | 60.00 | 60.00 to 60.00 | 66.7 | 0.50 |" in text
    assert "| 75 % | 300 | 28 | 28.0 % | 0.00 | 30.0 % |" in text
    assert "| openvino, dense | 1.0e-06 | 1.0e-04 |" in text
    assert "Not to be quoted" not in text


def test_tables_have_as_many_cells_as_columns():
    for text in (page(result(SLOW, FAST, SPARSE)), summary([result(FAST, SPARSE, DENSE)] * 2)):
        width = None
        for line in text.splitlines():
            width = (width or line.count("|")) if line.startswith("|") else None
            assert width is None or line.count("|") == width


def test_page_says_how_far_apart_the_cores_were():
    figures = dataclasses.replace(result(FAST, SPARSE), handovers=(30.0, 34.0, 38.0, 150.0, 158.0))
    assert "in 38 ns (quartiles of the rounds 34 to 150)" in page(figures)
    assert facts(figures)["handovers"] == figures.handovers
    assert "from one core" not in page(result(FAST, SPARSE))


def test_page_names_what_was_too_noisy():
    noisy = row("openvino, dense", "openvino", 30.0, spread=1.3)
    text = page(result(noisy, SPARSE))
    assert "**Not to be quoted.**" in text
    assert "quartiles of openvino, dense lie" in text
    assert not facts(result(noisy, SPARSE))["quiet"]


def test_page_names_what_was_left_out():
    assert "\nOpenvino is not here.\n" in page(result(FAST, left_out=["openvino is not here"]))


def test_without_peers_there_is_no_ratio():
    figures = result(DENSE, SPARSE)
    assert figures.ratio(SPARSE) is None
    assert "| blocksparse, 75 % sparse | 20.00 | 20.00 to 20.00 | 50.0 |  |" in page(figures)
    assert "| none |" in summary([figures, figures])


BUSY = row("openvino, dense", "openvino", 30.0, spread=1.3)
GOOD = result(SLOW, FAST, SPARSE)


def saved(folder, figures):
    return save(folder, "page", facts(figures), page(figures)).name


@pytest.mark.parametrize(
    ("figures", "stem"),
    [
        (result(SLOW, BUSY, SPARSE), "page-busy"),
        (result(SLOW, SPARSE), "page-partial"),
        (result(SLOW, DENSE, ZEROS, SPARSE), "page-partial"),  # as many, but one is not there
        (result(BUSY, SPARSE), "page-partial-busy"),
    ],
)
def test_better_page_stays_and_the_worse_is_kept_beside_it(tmp_path, capsys, figures, stem):
    assert saved(tmp_path, GOOD) == "page"
    assert saved(tmp_path, figures) == stem
    assert (tmp_path / "page.md").read_text() == page(GOOD)
    assert json.loads((tmp_path / "page.json").read_text()) == json.loads(json.dumps(facts(GOOD)))
    assert (tmp_path / f"{stem}.md").read_text() == page(figures)
    assert json.loads((tmp_path / f"{stem}.json").read_text())["rows"]
    said = " ".join(capsys.readouterr().err.split())
    assert "page.md is kept" in said
    assert "--output" in said
    assert ("not to be quoted" in said) == ("busy" in stem)
    missing = "torch-eager, dense" if figures.rows[0] == BUSY else "openvino, dense"
    assert (f"lacks {missing}" in said) == ("partial" in stem)


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (GOOD, result(SLOW, FAST, SPARSE, DENSE)),
        (result(SLOW, FAST), result(SLOW, FAST, SPARSE)),
        (result(SLOW, BUSY, SPARSE), result(SLOW, BUSY, SPARSE, batch=2)),
        (result(SLOW, BUSY, SPARSE), GOOD),
    ],
)
def test_page_that_is_as_good_replaces_the_one_before(tmp_path, capsys, before, after):
    saved(tmp_path, before)
    assert saved(tmp_path, after) == "page"
    assert (tmp_path / "page.md").read_text() == page(after)
    assert {path.name for path in tmp_path.iterdir()} == {"page.md", "page.json"}
    assert not capsys.readouterr().err


def test_page_without_rows_and_one_that_cannot_be_read_are_handled(tmp_path):
    save(tmp_path, "page", {"points": []}, "quiet\n")
    assert save(tmp_path, "page", {"points": []}, "still quiet\n").name == "page"
    (tmp_path / "page.json").write_text("{")
    assert save(tmp_path, "page", facts(GOOD), page(GOOD)).name == "page"


def test_summary_links_to_the_pages_that_were_written():
    assert "](page-busy.md)" in summary([GOOD, GOOD], ["page", "page-busy"])


def test_summary_has_a_line_per_setting_and_a_column_per_sparsity():
    text = summary([result(SLOW, FAST, DENSE, SPARSE), result(SLOW, DENSE, SPARSE, batch=8)])
    assert "| network | pattern | batch | threads | fastest peer | 0 % | 75 % |" in text
    assert "| resnet50 | shared | 1 | 2 | openvino | 0.75 | 1.50 |" in text
    assert "| resnet50 | shared | 8 | 2 | torch-eager | 1.50 | 3.00 |" in text
    assert "| resnet50 | shared | 1 | 2 | 60.00 | 30.00 | 40.00 | 20.00 |" in text
    assert "| resnet50 | shared | 8 | 2 | 60.00 |  | 40.00 | 20.00 |" in text


def test_facts_are_json_and_hold_the_ratio():
    tree = json.loads(json.dumps(facts(result(SLOW, FAST, SPARSE))))
    assert tree["fastest_peer"] == "openvino, dense"
    ratios = [cells["times_as_fast_as_fastest_peer"] for cells in tree["rows"]]
    assert ratios == pytest.approx([0.5, 1.0, 1.5])
    assert tree["setting"]["sparsities"] == [0.0, 0.75]


def test_file_names_tell_settings_apart():
    usual = Setting("resnet50", 224, (0.0, 0.5, 0.75, 0.9), "shared", 1, 2)
    assert usual.name == "resnet50-image224-8x8-shared-batch1-threads2"
    other = Setting("resnet50", 224, (0.125,), "per-position", 1, 2)
    assert other.name == "resnet50-image224-8x8-per-position-sparsity-12_5-batch1-threads2"


@pytest.mark.parametrize(("rounds", "quotable"), [(1, False), (4, False), (5, True)])
def test_a_few_rounds_do_not_tell_how_quiet_it_was(rounds, quotable):
    said = "\n".join(busy({"a": Timing(1.0, 1.0, 1.0, 1.0, rounds)}))
    assert (MARK not in said) == quotable
