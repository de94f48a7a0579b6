"""The tasks beside training: a scan that goes on, an allocation that training takes."""

from __future__ import annotations

import csv
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig
from torch import nn

from blocksparse.export import export_model
from blocksparse.format import Model
from blocksparse.pipeline import allocate_job, scan_job
from blocksparse.pipeline.evaluation import CalibrationLoss
from blocksparse.pipeline.folders import RunFolder
from blocksparse.pipeline.layer_times import LayerTimes
from blocksparse.pipeline.scan_files import COLUMNS
from blocksparse.pipeline.setup import build, build_data, build_network
from blocksparse.pipeline.stages import save_weights
from blocksparse.sparsity import FileAllocation, Plan, Uniform
from blocksparse.sparsity.curves import Curve

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
SMALL = ["model.widths=[8,16,32]", "trainer=cpu", "threads=1", "sparsity.target=0.4"]
TASK = ["task.images=100", "task.batchnorm_batches=1"]
QUICK = ["report.rounds=3", "report.min_seconds=0", "report.threads=1"]


def configuration(*overrides: str) -> DictConfig:
    task = TASK if any(override.startswith("task=") for override in overrides) else []
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return compose("train", [*SMALL, *task, *overrides])


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of a network that was not trained: a scan does not mind."""
    torch.manual_seed(0)
    cfg = configuration()
    path = tmp_path_factory.mktemp("weights") / "dense.ckpt"
    save_weights(build_network(cfg, build_data(cfg)), path)
    return path


def rows_of(folder: Path) -> list[dict[str, str]]:
    with (folder / "sensitivity.csv").open(encoding="utf-8") as file:
        return list(csv.DictReader(file))


@contextmanager
def counted(monkeypatch: pytest.MonkeyPatch, stop_at: int | None = None) -> Iterator[list[int]]:
    """Count evaluations, and break off at one of them as a power cut would."""
    calls: list[int] = []
    real = CalibrationLoss.__call__

    def call(self: CalibrationLoss, network: nn.Module) -> tuple[float, float]:
        if len(calls) == stop_at:
            raise RuntimeError("power cut")
        calls.append(1)
        return real(self, network)

    with monkeypatch.context() as patch:
        patch.setattr(CalibrationLoss, "__call__", call)
        yield calls


@pytest.fixture(scope="module")
def scanned(weights: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    folder = RunFolder(tmp_path_factory.mktemp("scan"))
    cfg = configuration("task=sensitivity", f"model.weights={weights}")
    assert scan_job.run(cfg, folder) == float(rows_of(folder.path)[0]["accuracy"])
    return folder


def test_scan_writes_what_it_says_and_nothing_else(scanned: RunFolder) -> None:
    assert {path.name for path in scanned.path.iterdir()} == {
        "config.yaml",
        "sensitivity.csv",
        "sensitivity.json",
        "sensitivity.png",
        "allocation.yaml",
    }
    assert (scanned.path / "sensitivity.png").read_bytes()[:4] == b"\x89PNG"


def test_rows_are_those_of_the_pruned_network(scanned: RunFolder, weights: Path) -> None:
    rows = rows_of(scanned.path)
    assert tuple(rows[0]) == COLUMNS
    cfg = configuration("task=sensitivity", f"model.weights={weights}")
    data = build_data(cfg)
    evaluate = CalibrationLoss(data, 100, 1)
    assert evaluate.images == 128  # whole batches of 64
    network = build_network(cfg, data)
    dense = evaluate(network)
    assert float(rows[0]["loss"]) == pytest.approx(dense[0], abs=1e-6)
    # All blocks but those the floors keep: 4 by 4 blocks, of which 4 stay.
    row = next(r for r in reversed(rows) if r["layer"] == "layer3.0.conv2")
    assert (row["weights"], row["sparsity"]) == ("9216", "0.750000")
    pruned = build(cfg.sparsity, target=0.5).plan_for(network)
    assert {r["layer"] for r in rows[1:]} == {layer.name for layer in pruned.pruned}
    for r in rows:
        assert float(r["drop"]) == pytest.approx(
            float(rows[0]["accuracy"]) - float(r["accuracy"]), abs=2e-6
        )


def test_layers_that_an_allocation_leaves_dense_are_looked_at(
    weights: Path, tmp_path: Path
) -> None:
    targets = "sparsity.allocation.targets=[[*,0.5],[layer2.*,0.0]]"
    cfg = configuration(
        "task=sensitivity", f"model.weights={weights}", "sparsity/allocation=targets", targets
    )
    names = {layer.name for layer in scan_job.prepare(cfg, RunFolder(tmp_path)).plan.pruned}
    assert {"layer2.0.conv2", "layer3.0.conv2"} <= names


def test_decisions_never_see_validation_images(weights: Path) -> None:
    data = build_data(configuration(f"model.weights={weights}"))
    validation, _ = next(iter(data.val_dataloader()))
    seen = torch.cat([images for images, _ in CalibrationLoss(data, 640, 3).batches])
    assert len(seen) == 13 * 64
    assert not (seen[:, None] == validation[None]).flatten(2).all(2).any()
    flat = seen.flatten(1)
    assert len(flat.unique(dim=0)) > 0.99 * len(flat)  # each image once, but for twins in the data


@pytest.mark.slow
def test_broken_scan_goes_on(
    scanned: RunFolder, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cfg = configuration("task=sensitivity", f"model.weights={weights}")
    folder = RunFolder(tmp_path)
    with (
        counted(monkeypatch, stop_at=4),
        pytest.raises(RuntimeError, match="power cut"),
    ):
        scan_job.run(cfg, folder)
    expected = rows_of(scanned.path)
    assert rows_of(tmp_path) == expected[:4]
    with counted(monkeypatch) as calls:
        scan_job.run(cfg, folder)
    assert len(calls) == len(expected) - 4
    for name in ("sensitivity.csv", "sensitivity.json", "allocation.yaml"):
        assert (tmp_path / name).read_bytes() == (scanned.path / name).read_bytes(), name


@pytest.mark.slow
@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("sparsity.score=l1", "score was l2, is l1"),
        ("task.images=200", "images was 128, is 256"),
        ("sparsity=nm24", "pattern was"),
        ("data.mean=[0.5]", "the weights or the images are others"),
    ],
)
def test_rows_of_something_else_are_not_used(
    change: str, message: str, scanned: RunFolder, weights: Path, tmp_path: Path
) -> None:
    base = ["task=allocate", f"task.scan={scanned.path}", f"model.weights={weights}"]
    cfg = configuration(*base, change)
    with pytest.raises(ValueError, match=f"a scan of something else: .*{message}"):
        allocate_job.run(cfg, RunFolder(tmp_path))


def test_scan_of_other_weights_is_not_used(
    scanned: RunFolder, weights: Path, tmp_path: Path
) -> None:
    state = torch.load(weights)
    state["state_dict"]["layer1.0.conv1.weight"][0, 0, 0, 0] += 1e-3
    torch.save(state, tmp_path / "other.ckpt")
    cfg = configuration(
        "task=allocate",
        f"task.scan={scanned.path}",
        f"model.weights={tmp_path}/other.ckpt",
    )
    with pytest.raises(ValueError, match="the weights or the images are others"):
        allocate_job.run(cfg, RunFolder(tmp_path / "run"))


def test_damaged_and_missing_scans_say_how_to_mend_it(
    scanned: RunFolder, weights: Path, tmp_path: Path
) -> None:
    base = ["task=allocate", f"model.weights={weights}"]
    cfg = configuration(*base, f"task.scan={tmp_path}")
    with pytest.raises(FileNotFoundError, match="holds no sensitivity scan"):
        allocate_job.run(cfg, RunFolder(tmp_path / "run"))
    (tmp_path / "sensitivity.json").write_bytes((scanned.path / "sensitivity.json").read_bytes())
    lines = (scanned.path / "sensitivity.csv").read_text().splitlines()
    (tmp_path / "sensitivity.csv").write_text("\n".join([*lines[:2], "layer1.0.conv2,57"]))
    with pytest.raises(ValueError, match=r"sensitivity\.csv, line 3: not a row of layer, weights"):
        allocate_job.run(cfg, RunFolder(tmp_path / "run"))
    (tmp_path / "sensitivity.csv").write_text("\n".join(lines[:4]))
    with pytest.raises(ValueError, match=r"has 3 of the \d+ rows .* resume="):
        allocate_job.run(cfg, RunFolder(tmp_path / "run"))


def test_scan_wants_a_trained_network_and_enough_images(weights: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"model\.weights names none: set model\.weights=FILE"):
        scan_job.run(configuration("task=sensitivity"), RunFolder(tmp_path))
    cfg = configuration("task=sensitivity", f"model.weights={weights}", "task.images=99999")
    with pytest.raises(ValueError, match=r"take 1564 batches of 64, and the training images make"):
        scan_job.run(cfg, RunFolder(tmp_path))
    assert not list(tmp_path.iterdir())


@pytest.fixture(scope="module")
def allocated(
    scanned: RunFolder, weights: Path, tmp_path_factory: pytest.TempPathFactory
) -> RunFolder:
    folder = RunFolder(tmp_path_factory.mktemp("allocate"))
    cfg = configuration(
        "task=allocate",
        f"task.scan={scanned.path}",
        f"model.weights={weights}",
        "task.min_sparsity=0.3",
        *QUICK,
    )
    with pytest.MonkeyPatch.context() as patch:
        # Each rule is a network to export.
        patch.setattr(allocate_job, "RULES", {"uniform": Uniform()})
        allocate_job.run(cfg, folder)
    return folder


@pytest.mark.slow
def test_allocation_keeps_its_budget(allocated: RunFolder) -> None:
    assert {path.name for path in allocated.path.iterdir()} == {
        "config.yaml",
        "sensitivity.csv",
        "allocation.yaml",
        "allocation.json",
        "layer_times.csv",
    }
    found = json.loads((allocated.path / "allocation.json").read_text())
    compared = found["compared"]
    assert set(compared) == {"dense", "latency-aware", "uniform"}
    ours = compared["latency-aware"]
    assert ours["predicted_ms"] <= found["budget_ms"] * (1 + 1e-5)
    assert ours["sparsity"] >= 0.3
    assert ours["predicted_loss"] == pytest.approx(found["predicted_loss"])
    assert found["bound"] <= found["predicted_loss"] <= found["bound"] + 1e-3
    for name, line in compared.items():
        assert line["measured_ms"] > 0
        if name != "dense":
            assert line["predicted_ms"] <= ours["predicted_ms"] * (1 + 2e-3)


@pytest.mark.slow
def test_training_takes_the_allocation(allocated: RunFolder, weights: Path) -> None:
    path = allocated.path / "allocation.yaml"
    cfg = configuration("sparsity/allocation=file", f"sparsity.allocation.path={path}")
    network = build_network(cfg, build_data(cfg))
    plan = build(cfg.sparsity).plan_for(network)
    compared = json.loads((allocated.path / "allocation.json").read_text())["compared"]
    assert plan.sparsity == pytest.approx(compared["latency-aware"]["sparsity"])
    assert plan.target == pytest.approx(plan.sparsity)
    wanted = FileAllocation(str(path)).layers
    assert {layer.name: layer.target for layer in plan.pruned} == {
        name: stored.sparsity for name, stored in wanted.items() if stored.sparsity > 0
    }


@pytest.fixture(scope="module")
def dense_model(weights: Path) -> Model:
    cfg = configuration(f"model.weights={weights}")
    data = build_data(cfg)
    return export_model(build_network(cfg, data), data.input_shape)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["task.milliseconds=1e-9"], r"budget of 1e-09 ms \(as given\).*milliseconds: at most"),
        (["task.min_sparsity=0.99"], "prunable weights that go, negated"),
        (["task.min_flops_cut=0.99"], "multiply-adds: at most"),
        (["task.speedup=0"], "speedup=0: must be above 0"),
        (["task.min_sparsity=50"], "min_sparsity=50: is a share"),
        (["task.speedup=2", "task.milliseconds=2"], "give one of them"),
    ],
)
def test_budgets_that_cannot_be_kept_say_so(
    overrides: list[str],
    message: str,
    scanned: RunFolder,
    weights: Path,
    dense_model: Model,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def times(model: Model, plan: Plan, levels: object, **options: object) -> LayerTimes:
        names = [layer.name for layer in plan.pruned]
        curve = Curve((0.0, 1.0), (1.0, 0.1))
        return LayerTimes(
            dict.fromkeys(names, 1.0), dict.fromkeys(names, curve), 0.5, (0.0,), 1.0, 1
        )

    monkeypatch.setattr(allocate_job, "measure_times", times)
    monkeypatch.setattr(allocate_job, "export_model", lambda *_: dense_model)
    cfg = configuration(
        "task=allocate",
        f"task.scan={scanned.path}",
        f"model.weights={weights}",
        *QUICK,
        *overrides,
    )
    with pytest.raises(ValueError, match=message):
        allocate_job.run(cfg, RunFolder(tmp_path))
    assert not (tmp_path / "allocation.yaml").exists()


def typed(*overrides: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(CONFIGS.parent / "train.py"), *overrides],
        capture_output=True,
        text=True,
        cwd=cwd,
        env=os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "100"},
        check=False,
    )


@pytest.mark.long
def test_tasks_can_be_typed(weights: Path, tmp_path: Path) -> None:
    done = typed("task=sensitivity", *SMALL, cwd=tmp_path)
    assert done.returncode == 1
    assert done.stdout.startswith("error: task=sensitivity looks at a trained network")
    assert not list(tmp_path.iterdir())
    common = [*SMALL, *TASK, f"model.weights={weights}"]
    done = typed("task=sensitivity", "hydra.run.dir=runs/a/scan", *common, cwd=tmp_path)
    assert done.returncode == 0, done.stdout
    assert "Written to runs/a/scan" in done.stdout
    assert not done.stderr
    csv_file = tmp_path / "runs/a/scan/sensitivity.csv"
    whole = csv_file.read_text()
    csv_file.write_text("".join(whole.splitlines(keepends=True)[:4]))
    done = typed("resume=runs/a/scan", cwd=tmp_path)
    assert "scanning: 3 of" in done.stdout
    assert csv_file.read_text() == whole
    done = typed(
        "task=allocate",
        "task.scan=runs/a/scan",
        "hydra.run.dir=runs/a/b",
        *common,
        *QUICK,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stdout
    compared = json.loads((tmp_path / "runs/a/b/allocation.json").read_text())["compared"]
    assert {"dense", "latency-aware", "uniform", "global magnitude", "ERK"} == set(compared)
    done = typed(
        "experiment=smoke",
        "sparsity/allocation=file",
        f"model.weights={weights}",
        *SMALL,
        "sparsity.allocation.path=runs/a/b/allocation.yaml",
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stdout
    (report,) = tmp_path.glob("runs/smoke/*/report.json")
    sparsity = json.loads(report.read_text())["sparsity"]
    assert sparsity["target"] == pytest.approx(compared["latency-aware"]["sparsity"])
    assert sparsity["reached"] == pytest.approx(sparsity["target"])


def test_times_need_kept_channels(weights: Path, tmp_path: Path) -> None:
    cfg = configuration("task=allocate", f"model.weights={weights}", "sparsity.keep_channels=false")
    with pytest.raises(ValueError, match=r"leave sparsity\.keep_channels at true"):
        allocate_job.run(cfg, RunFolder(tmp_path))
    assert not list(tmp_path.iterdir())
