"""One training stage: what it changes, what it leaves alone, and what goes wrong in words."""

from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf
from torch import nn

from blocksparse.pipeline.folders import RunFolder
from blocksparse.pipeline.measure import accuracy
from blocksparse.pipeline.setup import build, build_data, build_network, check, threads
from blocksparse.pipeline.stages import Stage, save_weights
from blocksparse.training import read_weights

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
SMALL = ["model.widths=[8,8,8]", "trainer=cpu", "trainer.limit_train_batches=3", "dense.epochs=1"]


def configuration(*overrides: str) -> DictConfig:
    torch.set_num_threads(1)
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return compose("train", [*SMALL, *overrides])


def test_trains_in_training_mode_and_leaves_it(tmp_path: Path) -> None:
    cfg = configuration()
    data = build_data(cfg)
    network = build_network(cfg, data).eval()
    before = copy.deepcopy(network.state_dict())
    Stage(cfg, "dense", RunFolder(tmp_path)).fit(network, data)
    after = network.state_dict()
    assert not network.training
    assert after["bn1.num_batches_tracked"] == 3  # batch norm saw the batches
    assert not torch.equal(after["conv1.weight"], before["conv1.weight"])


@pytest.mark.parametrize(
    ("name", "side", "options"),
    [
        ("squeezenet1_1", 16, []),
        # Fits as it is, but not its auxiliary classifier, which runs in training alone.
        ("inception_v3", 75, ["+model.options.init_weights=false"]),
    ],
)
def test_images_too_small_for_the_network_are_refused(
    name: str, side: int, options: list[str]
) -> None:
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        cfg = compose(
            "train",
            [
                "data=fake",
                f"data.input_shape=[3,{side},{side}]",
                "model=torchvision",
                f"model.name={name}",
                *options,
            ],
        )
    data = build_data(cfg)
    with pytest.raises(
        ValueError, match=rf"name={name} cannot take images of 3x{side}x{side}: "
    ) as e:
        build_network(cfg, data)
    assert "Set data.input_shape to the size of its images" in str(e.value)


def test_trying_the_images_changes_nothing() -> None:
    cfg = configuration()
    data = build_data(cfg)
    torch.manual_seed(0)
    network = build_network(cfg, data)
    drawn = torch.rand(1)
    torch.manual_seed(0)
    fresh = build(cfg.model, num_classes=data.num_classes, input_shape=data.input_shape)
    assert torch.equal(drawn, torch.rand(1))
    assert network.training == fresh.training
    for name, value in fresh.state_dict().items():
        assert torch.equal(value, network.state_dict()[name]), name


def test_stage_does_not_depend_on_what_ran_before(tmp_path: Path) -> None:
    cfg = configuration()
    data = build_data(cfg)
    first = build_network(cfg, data)
    second = copy.deepcopy(first)
    Stage(cfg, "dense", RunFolder(tmp_path / "a")).fit(first, data)
    torch.rand(17)
    Stage(cfg, "dense", RunFolder(tmp_path / "b")).fit(second, data)
    for name, value in first.state_dict().items():
        assert torch.equal(value, second.state_dict()[name]), name


def test_teacher_is_followed_and_left_alone(tmp_path: Path) -> None:
    results = []
    for choice in ("dense", "none"):
        cfg = configuration(f"distillation={choice}")
        data = build_data(cfg)
        torch.manual_seed(0)
        network, teacher = build_network(cfg, data), build_network(cfg, data)
        before = copy.deepcopy(teacher.state_dict())
        Stage(cfg, "dense", RunFolder(tmp_path / choice)).fit(network, data, teacher=teacher)
        assert all(torch.equal(v, before[n]) for n, v in teacher.state_dict().items())
        results.append(network.state_dict()["conv1.weight"])
    assert not torch.equal(*results)


def test_save_weights_is_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "dense.ckpt"
    network = nn.Conv2d(1, 2, 3)
    save_weights(network, path, note="kept")
    assert torch.load(path, weights_only=True)["note"] == "kept"
    assert torch.equal(read_weights(path)["weight"], network.weight)
    with pytest.raises(AttributeError):  # cannot be pickled: the old file stays
        save_weights(network, path, note=lambda: None)
    assert torch.load(path, weights_only=True)["note"] == "kept"


def test_accuracy_counts_images_not_batches() -> None:
    class Echo(nn.Module):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return nn.functional.one_hot(images.flatten().long(), 3).float()

    batches = [
        (torch.tensor([0.0, 1.0, 2.0])[:, None, None, None], torch.tensor([0, 1, 1])),
        (torch.tensor([2.0])[:, None, None, None], torch.tensor([0])),
    ]
    assert accuracy(Echo(), batches) == 0.5


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["data=image_folder"], r"data\.root: no value given"),
        (["sparse.epochs=0"], "pruning at least 1"),
        (["export.val_batches=0"], r"export\.val_batches=0"),
        (["threads=0"], "threads=0"),
        (["dense.optimizer.lr=-1"], r"lr is -1"),
        (["distillation.weight=2"], r"distillation\.weight is 2"),
        (
            ["calibration=obs", "sparsity.backward=straight_through", "sparsity.update_until=1"],
            "nothing is left for sparsity.backward=straight_through",
        ),
    ],
)
def test_mistakes_show_before_anything_is_trained(overrides: list[str], message: str) -> None:
    check(configuration())
    with pytest.raises(ValueError, match=message):
        check(configuration(*overrides))


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_missing_gpu_is_said_with_a_way_out() -> None:
    with pytest.raises(ValueError, match=r"sees no GPU here.*trainer\.accelerator=cpu"):
        check(configuration("trainer=gpu"))


def test_constructor_errors_are_not_wrapped() -> None:
    with pytest.raises(ValueError, match=r"^a block needs at least 1 row"):
        build(configuration("sparsity.pattern.rows=0").sparsity)
    with pytest.raises(ValueError, match=r"Digits: .*unexpected keyword argument 'foo'"):
        build(configuration("+data.foo=1").data)


def test_threads_are_given_back() -> None:
    torch.set_num_threads(1)
    with threads(2):
        assert torch.get_num_threads() == 2
    assert torch.get_num_threads() == 1
    with threads(None):
        assert torch.get_num_threads() == 1


def test_the_teacher_comes_back_as_it_was(tmp_path: Path) -> None:
    cfg = configuration("channels_last=true", "sparse.epochs=1")
    data = build_data(cfg)
    teacher = build_network(cfg, data).eval()
    Stage(cfg, "sparse", RunFolder(tmp_path)).fit(copy.deepcopy(teacher), data, teacher=teacher)
    assert not teacher.training
    for name, value in teacher.state_dict().items():
        assert value.device.type == "cpu"
        assert value.is_contiguous(), name


def test_other_checkpoints_keep_their_names(tmp_path: Path) -> None:
    best = (
        "{_target_:lightning.pytorch.callbacks.ModelCheckpoint,monitor:val/accuracy,filename:best}"
    )
    cfg = configuration(f"+callbacks.best={best}")
    data = build_data(cfg)
    Stage(cfg, "dense", RunFolder(tmp_path)).fit(build_network(cfg, data), data)
    names = {path.name for path in (tmp_path / "checkpoints").iterdir()}
    assert names == {"best.ckpt", "last_dense.ckpt"}


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("export.images=0", "export.images=0: at least one image"),
        ("export.block=8", r"export.block=8: give rows and columns, such as \[8,8\]"),
        ("sparse.label_smoothing=1", "label_smoothing is 1"),
        ("compile_steps=true distillation.features=1", "compile_steps=false, or"),
        ("permutation=greedy permutation.passes=0", "permutation.passes=0: at least 1"),
    ],
)
def test_what_would_fail_after_hours_fails_at_once(override: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check(configuration(*override.split()))


def test_configurations_of_older_runs_are_taken() -> None:
    cfg = configuration()
    OmegaConf.set_struct(cfg, False)
    for key in ("calibration", "permutation", "compile_steps", "task"):
        del cfg[key]
    OmegaConf.set_struct(cfg, True)
    check(cfg)
