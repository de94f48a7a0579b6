"""``export.py``: which run or checkpoint is exported, on what it is verified, and its errors."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from export_networks import prune_blocks, randomized
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from safetensors.torch import save_file

from blocksparse.format import read
from blocksparse.pipeline.export_job import run
from blocksparse.training import build_model

ROOT = Path(__file__).resolve().parents[2]
MODEL = {"name": "resnet8", "widths": [8, 16, 16]}


@pytest.fixture
def export(tmp_path, monkeypatch):
    """Call ``export.py`` with command-line overrides, in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def call(*overrides: str):
        with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
            return run(compose("export", [*overrides, "export.images=3"]))

    return call


def network(seed: int = 0) -> torch.nn.Module:
    model = randomized(build_model(**MODEL, num_classes=10, input_shape=(1, 8, 8)), seed)
    prune_blocks(model, 0.5, seed=seed)
    return model


def make_run(folder: Path, seed: int = 0) -> torch.nn.Module:
    """Write what a finished run leaves behind, as far as an export needs it."""
    (folder / "checkpoints").mkdir(parents=True)
    data = OmegaConf.load(ROOT / "configs" / "data" / "digits.yaml")
    data.seed = 0
    # The weights that the run started from may be gone when it is exported.
    model = {"_target_": "blocksparse.training.build_model", **MODEL, "weights": "gone.pth"}
    OmegaConf.save({"data": data, "model": model}, folder / "config.yaml")
    trained = network(seed)
    torch.save({"state_dict": trained.state_dict()}, folder / "checkpoints" / "sparse.ckpt")
    return trained


@pytest.mark.slow
def test_the_latest_run_is_the_default(export, tmp_path):
    make_run(tmp_path / "runs" / "a" / "2030-01-01", seed=1)
    latest = make_run(tmp_path / "runs" / "b" / "2029-01-01", seed=2)
    os.utime(tmp_path / "runs" / "a" / "2030-01-01" / "checkpoints" / "sparse.ckpt", (1, 1))
    report = export("report=reports/report.json")
    assert report.path == Path("runs/b/2029-01-01/model.bsr.safetensors")
    stored = read(report.path)
    assert torch.equal(
        torch.from_numpy(stored.weights["linear"].to_dense()), latest.linear.weight.detach()
    )
    assert stored.classes == tuple("0123456789")
    assert stored.preprocessing.channels == "gray"
    assert stored.provenance["checkpoint"] == "sparse.ckpt"
    assert stored.provenance["config"]["model"]["name"] == "resnet8"
    assert report.verification.val_images == 360
    assert (tmp_path / "reports" / "report.json").is_file()


@pytest.mark.long
def test_a_run_can_be_named_by_its_folder_or_a_checkpoint_in_it(export, tmp_path):
    folder = tmp_path / "elsewhere"
    make_run(folder)
    dense = network(seed=5)
    torch.save({"state_dict": dense.state_dict()}, folder / "checkpoints" / "dense.ckpt")
    by_folder = export(f"run={folder}", "export.val_batches=0")
    assert by_folder.path == folder / "model.bsr.safetensors"
    assert by_folder.verification.accuracy_torch is None
    export(f"checkpoint={folder}/checkpoints/dense.ckpt", "output=dense.bsr.safetensors")
    stored = read("dense.bsr.safetensors").weights["linear"].to_dense()
    assert torch.equal(torch.from_numpy(stored), dense.linear.weight.detach())


@pytest.mark.slow
@pytest.mark.parametrize("stem", ["dense", "last_sparse"])
def test_another_checkpoint_of_a_run_leaves_the_file_of_the_run_alone(export, tmp_path, stem):
    folder = tmp_path / "run"
    make_run(folder)
    (folder / "model.bsr.safetensors").write_text("the pruned network")
    checkpoint = folder / "checkpoints" / f"{stem}.ckpt"
    torch.save({"state_dict": network(seed=5).state_dict()}, checkpoint)
    report = export(f"checkpoint={checkpoint}", "export.val_batches=0")
    assert report.path == folder / "checkpoints" / f"{stem}.bsr.safetensors"
    assert (folder / "model.bsr.safetensors").read_text() == "the pruned network"
    report = export("checkpoint=run/checkpoints/sparse.ckpt", "export.val_batches=0")
    assert report.path.resolve() == folder / "model.bsr.safetensors"


@pytest.mark.slow
def test_any_checkpoint_is_exported_on_random_images(export, capsys):
    save_file(network().state_dict(), "net.safetensors")
    report = export(
        "checkpoint=net.safetensors",
        "model.name=resnet8",
        "model.widths=[8,16,16]",
        "input_shape=[1,8,8]",
        "num_classes=10",
    )
    assert report.path == Path("net.bsr.safetensors")
    assert report.verification.images == 1 + 3
    assert read(report.path).classes is None
    assert "random images, as no data was named" in " ".join(capsys.readouterr().out.split())


@pytest.mark.long
def test_a_checkpoint_is_exported_on_named_data(export, capsys):
    torch.save(network().state_dict(), "net.pth")
    report = export(
        "checkpoint=net.pth", "model.name=resnet8", "model.widths=[8,16,16]", "data=digits"
    )
    assert report.verification.val_images == 360
    assert "3 validation images" in capsys.readouterr().out


@pytest.mark.long
def test_block_key(export, tmp_path):
    make_run(tmp_path / "runs" / "a" / "b")
    report = export("export.block=[4,8]", "export.val_batches=0")
    assert "bsr 4x8" in {row.layout for row in report.layers}
    assert "bsr 8x8" not in {row.layout for row in report.layers}


NET = ["checkpoint=net.pth", "model.name=resnet8", "model.widths=[8,16,16]"]
ERRORS = {
    "no runs": ([], r"runs: no finished run .* \(runs does not exist\)"),
    "no such run": (
        ["run=runs/x"],
        r"run=runs/x: there is no such folder\. Name the folder [^:]*$",
    ),
    "no run": (
        ["run=half/checkpoints"],
        r"config\.yaml is not there .that folder holds last_[^:]*$",
    ),
    "unfinished run": (["run=half"], r"its pruned network sparse\.ckpt is not there \(that folder"),
    "no model": (["checkpoint=net.pth"], r"checkpoint=net\.pth: say which network it belongs to"),
    "no checkpoint": (
        ["checkpoint=x.pth", "model.name=resnet8"],
        r"^checkpoint=x\.pth: there is no such",
    ),
    "no checkpoint in a run": (["checkpoint=half/checkpoints/x.ckpt"], r"no .*; check checkpoint$"),
    "wrong model": (["checkpoint=net.pth", "model.name=resnet14"], r"does not fit ResNetCifar"),
    "classes": ([*NET, "input_shape=[1,8,8]"], r"for 10 classes, .* 1000: set num_classes=10$"),
    "two numbers": ([*NET, "input_shape=[8,8]"], r"input_shape=\[8, 8\]: must be \[C,H,W\]"),
    "four numbers": ([*NET, "input_shape=[1,1,8,8]"], r"input_shape=.*: must be \[C,H,W\]"),
    "one number": ([*NET, "input_shape=8"], r"input_shape=8: must be \[C,H,W\]"),
    "unknown model": (["checkpoint=net.pth", "model.name=resnet8_"], r"did you mean"),
    "block": (["run=whole", "export.block=[8]"], r"export\.block=\[8\]: give rows and columns"),
    "one side": (["run=whole", "export.block=8"], r"export\.block=8: give rows and columns"),
    "output folder": (["run=whole", "output=half"], r"^half is a folder"),
    "report folder": (["run=whole", "report=half"], r"^half is a folder"),
    "images": (["run=whole", "export.images=0"], r"export\.images=0: at least one"),
    "no number": (["run=whole", "export.images=x"], r"export\.images=x: a whole number"),
}


@pytest.mark.parametrize(("overrides", "message"), ERRORS.values(), ids=ERRORS)
def test_errors_say_what_is_there(tmp_path, monkeypatch, overrides, message):
    monkeypatch.chdir(tmp_path)
    make_run(tmp_path / "whole")
    make_run(tmp_path / "half")
    (tmp_path / "half" / "checkpoints" / "sparse.ckpt").rename("half/checkpoints/last_sparse.ckpt")
    torch.save(network().state_dict(), "net.pth")
    with initialize_config_dir(str(ROOT / "configs"), version_base="1.3"):
        cfg = compose("export", overrides)
    with pytest.raises((ValueError, OSError), match=message):
        run(cfg)
    assert not list(tmp_path.rglob("*.bsr.safetensors*"))


@pytest.mark.long
def test_the_command_line(tmp_path):
    make_run(tmp_path / "runs" / "a" / "b")
    command = [sys.executable, str(ROOT / "export.py")]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Written to runs/a/b/model.bsr.safetensors" in done.stdout
    assert sorted(path.name for path in tmp_path.iterdir()) == ["runs"]
    failed = subprocess.run(
        [*command, "run=nowhere"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert failed.returncode == 1
    assert failed.stdout.startswith("error: run=nowhere")
    assert "Traceback" not in failed.stdout + failed.stderr
    added = subprocess.run(
        [*command, "+ouput=x"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert added.returncode == 1
    assert added.stdout.startswith("error: +ouput=x: nothing reads ouput")
