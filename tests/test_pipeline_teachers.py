"""Networks that are followed besides the dense one: their logits, and mistakes in naming them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig
from safetensors.torch import save_file
from torch import nn

from blocksparse.pipeline.folders import RunFolder
from blocksparse.pipeline.job import run
from blocksparse.pipeline.setup import build_data, build_network, build_teachers, check
from blocksparse.training import Distillation, Ensemble, build_model, load_weights, read_weights
from blocksparse.training.module import fingerprint

CONFIGS = Path(__file__).resolve().parents[1] / "configs"


def configuration(*overrides: str) -> DictConfig:
    torch.set_num_threads(1)
    small = ["model.widths=[8,16,16]", "sparsity.target=0.5", "trainer=cpu"]
    small += ["trainer.limit_train_batches=3"]
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return compose("train", [*small, *overrides])


@pytest.fixture
def teacher(tmp_path: Path) -> Path:
    """Weights of a network for the digits, of another depth than the one that is trained."""
    torch.manual_seed(5)
    network = build_model("resnet14", num_classes=10, input_shape=(1, 8, 8), widths=(8, 8, 8))
    file = tmp_path / "teacher.safetensors"
    save_file(network.state_dict(), file)
    return file


def test_ensemble_averages_logits() -> None:
    torch.manual_seed(0)
    networks = [nn.Linear(4, 3) for _ in range(3)]
    images = torch.randn(5, 4)
    wanted = torch.stack([images @ n.weight.T + n.bias for n in networks]).mean(dim=0)
    assert torch.allclose(Ensemble(networks)(images), wanted, atol=1e-6)


def test_networks_are_followed_together(tmp_path: Path, teacher: Path) -> None:
    named = f"{{name: resnet14, weights: {teacher}, widths: [8,8,8]}}"
    cfg = configuration(
        f"distillation.teachers=[{named},{named}]", "dense.epochs=1", "sparse.epochs=1",
        "sparsity.interval=1", "report.rounds=3", "report.min_seconds=0",
    )  # fmt: skip
    check(cfg)
    folder = RunFolder(tmp_path / "run")
    run(cfg, folder)
    data = build_data(cfg)
    dense = build_network(cfg, data)
    load_weights(dense, read_weights(folder.checkpoint("dense")), source="dense")
    together = Ensemble([dense, *build_teachers(cfg, data)])
    assert len(together.networks) == 3
    for network in together.networks[1:]:
        assert fingerprint(network) == fingerprint(_loaded(teacher))
    checkpoint = torch.load(folder.last("sparse"), weights_only=True)
    assert checkpoint["teacher"] == fingerprint(together)


def _loaded(file: Path) -> nn.Module:
    return build_model(
        "resnet14", num_classes=10, input_shape=(1, 8, 8), widths=(8, 8, 8), weights=file
    )


def test_what_is_said_of_them(
    tmp_path: Path, teacher: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    named = f"{{name: resnet14, weights: {teacher}, widths: [8,8,8]}}"
    cfg = configuration(
        f"distillation.teachers=[{named}]", "dense.epochs=0", "sparse.epochs=1",
        "trainer.limit_train_batches=1", "report.rounds=3", "report.min_seconds=0",
    )  # fmt: skip
    run(cfg, RunFolder(tmp_path / "run"))
    assert "with distillation from 2 networks" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("{name: resnet14}", r"teachers\[0\] is .*resnet14.*must have a name and weights"),
        ("{name: resnet14, weights: null}", r"teachers\[0\] is .*must have a name and weights"),
        ("resnet14", r"teachers\[0\] is resnet14; it must have a name"),
    ],
)
def test_entries_without_name_or_weights_are_refused(entry: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check(configuration(f"distillation.teachers=[{entry}]"))


@pytest.mark.parametrize(
    ("entry", "kind", "message"),
    [
        ("{name: resnet14, weights: FOLDER/none.safetensors}", FileNotFoundError,
         r"none\.safetensors.*check distillation\.teachers\[0\]\.weights"),
        ("{name: resnte14, weights: FILE}", ValueError,
         r"^distillation\.teachers\[0\]\.name=resnte14 is no .*resnet14"),
        ("{name: resnet14, weights: FILE}", ValueError, r"teacher\.safetensors"),
        ("{name: resnet14, weights: FILE, depth: 3}", ValueError,
         r"^distillation\.teachers\[0\]: .*depth"),
    ],
)  # fmt: skip
def test_teachers_that_cannot_be_built_show_before_training(
    tmp_path: Path, teacher: Path, entry: str, kind: type[Exception], message: str
) -> None:
    entry = entry.replace("FILE", str(teacher)).replace("FOLDER", str(tmp_path))
    cfg = configuration(f"distillation.teachers=[{entry}]")
    with pytest.raises(kind, match=message):
        run(cfg, RunFolder(tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_feature_maps_are_of_one_network() -> None:
    with pytest.raises(ValueError, match=r"features .* dense network.*leave one of the two"):
        Distillation(features=1.0, teachers=[{"name": "resnet14", "weights": "a.safetensors"}])
