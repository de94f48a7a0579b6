"""Which folder a run writes to, and which one a resumed run goes on in."""

from __future__ import annotations

from pathlib import Path

import pytest
from omegaconf import OmegaConf

from blocksparse.pipeline.folders import RunFolder, register_resolvers, resume_point


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    made = RunFolder(tmp_path / "runs" / "name" / "time")
    made.checkpoints.mkdir(parents=True)
    made.config.write_text("seed: 0\n")
    for path in (made.checkpoint("dense"), made.last("dense"), made.last("sparse")):
        path.touch()
    return made


def test_resume_by_folder(folder: RunFolder) -> None:
    assert resume_point(folder.path) == (folder, None)


@pytest.mark.parametrize("name", ["dense.ckpt", "last_dense.ckpt", "last_sparse.ckpt"])
def test_resume_by_checkpoint(folder: RunFolder, name: str) -> None:
    path = folder.checkpoints / name
    assert resume_point(path) == (folder, path)


def test_resume_needs_something_there(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"resume=.*nowhere: no such file or folder"):
        resume_point(tmp_path / "nowhere")


def test_resume_needs_a_run(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"has no config\.yaml"):
        resume_point(tmp_path)


def test_resume_refuses_other_checkpoints(folder: RunFolder) -> None:
    other = folder.checkpoints / "epoch=3.ckpt"
    other.touch()
    with pytest.raises(FileNotFoundError, match=r"those are .*last_dense\.ckpt"):
        resume_point(other)


def test_logs_of_an_earlier_attempt_are_kept(folder: RunFolder) -> None:
    assert folder.log_version("sparse") == "sparse"
    (folder.path / "logs" / "sparse").mkdir(parents=True)
    assert folder.log_version("sparse") == "sparse_2"
    (folder.path / "logs" / "sparse_2").mkdir()
    assert folder.log_version("sparse") == "sparse_3"


def test_run_folder_of_a_new_and_of_a_resumed_run(folder: RunFolder) -> None:
    register_resolvers()
    text = "${run_folder:${resume},runs,digits,now}"
    assert OmegaConf.create({"resume": None, "dir": text}).dir == "runs/digits/now"
    resumed = OmegaConf.create({"resume": str(folder.last("sparse")), "dir": text})
    assert resumed.dir == str(folder.path)
    # Nothing to go on from: the error comes later, in words, from a folder of its own.
    assert OmegaConf.create({"resume": "nowhere", "dir": text}).dir == "runs/digits/now"


@pytest.mark.parametrize("text", ["", "{a: [", "- 1\n", "a: ${", "\x00"])
def test_a_damaged_configuration_is_named(folder: RunFolder, text: str) -> None:
    folder.config.write_text(text)
    with pytest.raises(ValueError, match=r"time/config\.yaml: is damaged"):
        folder.read_config()


def test_shown_as_typed(folder: RunFolder, monkeypatch: pytest.MonkeyPatch) -> None:
    assert str(folder) == str(folder.path)
    monkeypatch.chdir(folder.path.parents[2])
    assert str(folder) == "runs/name/time"
