"""Values of a wrong kind, and keys that nothing reads, are refused by their names."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from hydra import compose, initialize_config_dir
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import DictConfig, OmegaConf

from blocksparse.pipeline.values import EXPORT_KINDS, KINDS, check_added, check_values

CONFIGS = Path(__file__).resolve().parents[1] / "configs"
EXPERIMENTS = sorted(path.stem for path in (CONFIGS / "experiment").glob("*.yaml"))
TASKS = ("train", "sensitivity", "allocate")


def composed(*overrides: str, config: str = "train") -> DictConfig:
    with initialize_config_dir(str(CONFIGS), version_base="1.3"):
        return compose(config, list(overrides))


def keys(node: Mapping[Any, Any], prefix: str = "") -> Iterator[str]:
    for name, value in node.items():
        if isinstance(value, dict):
            yield from keys(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def plain(cfg: DictConfig) -> dict[Any, Any]:
    found = OmegaConf.to_container(cfg)
    assert isinstance(found, dict)
    return found


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("seed=abc", "seed=abc: a whole number"),  # data.seed refers to it
        ("seed=true", "seed=true: a whole number"),
        ("seed=1.5", "seed=1.5: a whole number"),
        ("threads=two", "threads=two: a whole number or null"),
        ("name=3", "name=3: a text"),
        ("channels_last=1", "channels_last=1: true or false"),
        ("sparse.epochs=null", "sparse.epochs=null: a whole number"),
        ("sparse.optimizer.lr=fast", "sparse.optimizer.lr=fast: a number"),
        ("sparse.optimizer.lr=nan", "sparse.optimizer.lr=nan: a number"),
        ("dense.optimizer.shape=round", "dense.optimizer.shape=round: one of cosine, linear"),
        ("dense.optimizer.optimizer.momentum=x", "dense.optimizer.optimizer.momentum=x: a number"),
        ("sparsity.target=half", "sparsity.target=half: a number"),
        ("sparsity.pattern.rows=8.5", "sparsity.pattern.rows=8.5: a whole number"),
        ("sparsity.update_until=x", "sparsity.update_until=x: a number or null"),
        ("data.mean=0.5", "data.mean=0.5: a list, each a number,"),
        ("data.mean=[x]", r"data.mean=\['x'\]: a list, each a number,"),
        ("model.weights=3", "model.weights=3: a text or null"),
        ("report.rounds=many", "report.rounds=many: a whole number"),
        ("model.widths=8", "model.widths=8: a list, each a whole number, or null"),
        ("trainer.precision=99", "trainer.precision=99: one of 64, 32, 16, .* or null"),
    ],
)
def test_wrong_kind_is_refused_by_its_key(override: str, expected: str) -> None:
    with pytest.raises(ValueError, match=rf"^{expected} is expected$"):
        check_values(composed(override))


def test_levels_and_budget_of_tasks() -> None:
    with pytest.raises(ValueError, match=r"task.levels=\[0.5, 'x'\]: a list, each a number"):
        check_values(composed("task=sensitivity", "task.levels=[0.5,x]"))
    with pytest.raises(ValueError, match=r"task.milliseconds=soon: a number or null"):
        check_values(composed("task=allocate", "task.milliseconds=soon"))


def test_export_has_kinds_of_its_own() -> None:
    cfg = composed("report=layers.json", config="export")  # a file here; model.name is not given
    check_values(cfg, EXPORT_KINDS)
    cfg.num_classes = "ten"
    with pytest.raises(ValueError, match="num_classes=ten: a whole number"):
        check_values(cfg, EXPORT_KINDS)


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_all_that_experiments_say_passes(name: str) -> None:
    for task in TASKS if name == "smoke" else ("train",):
        cfg = composed(f"experiment={name}", f"task={task}")
        if OmegaConf.is_missing(cfg.model, "weights"):
            cfg.model.weights = "weights.pth"
        check_values(cfg)
        check_added(cfg, [f"+{key}=1" for key in keys(plain(cfg))])  # each is read


def test_every_kind_belongs_to_a_key() -> None:
    there = {key for task in TASKS for key in keys(plain(composed(f"task={task}")))}
    assert set(KINDS) <= there
    assert set(EXPORT_KINDS) <= set(keys(plain(composed(config="export"))))


@pytest.mark.parametrize("override", ["+foo=1", "++foo.bar=1", "+dense.epoch=3", "+report.x={a:1}"])
def test_added_key_that_nothing_reads_is_refused(override: str) -> None:
    cfg = composed(override)
    with pytest.raises(ValueError, match=f"nothing reads {override.strip('+').split('=')[0]}"):
        check_added(cfg, [override])


@pytest.mark.parametrize(
    "override",
    ["+model.options.transform_input=true", "++seed=3", "+callbacks.mine._target_=a.B", "seed=3"],
)
def test_added_key_that_something_reads_is_taken(override: str) -> None:
    check_added(composed(override), [override])


def test_configurations_may_have_keys_for_others_to_refer_to() -> None:
    cfg = composed("+mine=3", "seed=${mine}")
    check_values(cfg)
    check_added(cfg, ["seed=${mine}"])  # said in a file


VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text("ab1.", max_size=3)
)


@given(st.sampled_from(sorted(KINDS)), st.one_of(VALUES, st.lists(VALUES, max_size=2)))
def test_a_value_passes_or_is_named(key: str, value: Any) -> None:
    cfg = OmegaConf.create({})
    OmegaConf.update(cfg, key, value)
    try:
        check_values(cfg)
    except ValueError as error:
        said = str(error)
    else:
        return
    assert said.startswith(f"{key}={value}" if isinstance(value, str) else f"{key}=")
