"""The command of a run as reports give it: what makes the result, and no path of the machine."""

from __future__ import annotations

import shlex

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from blocksparse.pipeline.command import command_line


def kept(*overrides: str) -> list[str]:
    start, program, *rest = shlex.split(command_line(overrides))
    assert (start, program) == ("python", "train.py")
    return rest


def test_nothing_typed() -> None:
    assert command_line([]) == "python train.py"


@pytest.mark.parametrize(
    "override",
    [
        "experiment=x",
        "seed=1",
        "model.widths=[8,16]",
        "optimizer@dense.optimizer=adam",
        "~distillation",
        "+sparsity.more={a: 1, b: [2, 3]}",
        "name='two words'",
        'name="a,b"',
        "trainer=cpu",
        "trainer.precision=bf16-mixed",
        "trainer.devices=2",
        "+callbacks.average={_target_:a.B}",
        "trainer.limit_train_batches=6",
        "data.root=data/cifar10",
        "threads_of_another_kind=1",
        "resumed=1",
    ],
)
def test_keeps_what_makes_the_result(override: str) -> None:
    assert kept("seed=7", override) == ["seed=7", override]


@pytest.mark.parametrize(
    "override",
    [
        "hydra.run.dir=here",
        "paths=default",
        "paths.runs=elsewhere",
        "resume=runs/a/b",
        "++threads=1",
        "threads=null",
        "report.rounds=3",
        "logger=csv",
        "~logger.tensorboard",
        "trainer.accelerator=cpu",
        "data.num_workers=4",
    ],
)
def test_leaves_out_how_and_where(override: str) -> None:
    assert kept("seed=7", override) == ["seed=7"]


@pytest.mark.parametrize(
    ("override", "short"),
    [
        ("data.root=/somewhere/cifar10", "data.root=cifar10"),
        ("data.root=/somewhere/cifar10/", "data.root=cifar10"),
        ("model.weights='/some where/a b.pt'", "model.weights='a b.pt'"),
        ("+sparsity.allocation.path='~/runs/allocation.yaml'", None),
        ("task.scan=/somewhere/scan", "task.scan=scan"),
    ],
)
def test_of_absolute_paths_the_last_part(override: str, short: str | None) -> None:
    short = short or "+sparsity.allocation.path='allocation.yaml'"
    assert kept(override) == [short]
    OverridesParser.create().parse_overrides([short])  # Hydra can still read it
