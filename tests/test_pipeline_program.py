"""A program that is interrupted, before a run began or in it."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
from hydra.core.hydra_config import HydraConfig

from blocksparse.pipeline.program import call, importing


@pytest.fixture
def folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Return the folder that Hydra made for a run."""
    made = tmp_path / "runs" / "name" / "time"
    (made / ".hydra").mkdir(parents=True)
    (made / "run.log").touch()
    hydra = SimpleNamespace(runtime=SimpleNamespace(output_dir=str(made)))
    monkeypatch.setattr(HydraConfig, "get", lambda: hydra)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "0")  # which `call` sets
    monkeypatch.chdir(tmp_path)
    return made


def interrupted_import() -> None:
    with importing():
        raise KeyboardInterrupt


def test_interrupted_while_it_imports_leaves_nothing(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as left:
        call(interrupted_import)
    assert left.value.code == 130
    assert not list(tmp_path.iterdir())


def test_a_run_that_goes_on_stays(folder: Path) -> None:
    (folder / "config.yaml").write_text("seed: 0\n")
    with pytest.raises(KeyboardInterrupt):
        interrupted_import()
    assert {entry.name for entry in folder.iterdir()} == {".hydra", "run.log", "config.yaml"}


def test_other_runs_stay(folder: Path) -> None:
    other = folder.parent / "before"
    other.mkdir()
    with pytest.raises(KeyboardInterrupt):
        interrupted_import()
    assert list(folder.parent.iterdir()) == [other]
