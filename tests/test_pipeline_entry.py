"""What Hydra calls: overrides of a resumed run, errors, and sweeps in which a job fails."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import pytest
from hydra.types import RunMode
from omegaconf import OmegaConf
from torch.utils.data import DataLoader, Dataset

from blocksparse.pipeline import entry
from blocksparse.pipeline.entry import resumed_config
from blocksparse.pipeline.folders import RunFolder

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def folder(tmp_path: Path) -> RunFolder:
    made = RunFolder(tmp_path)
    saved = {
        "seed": 3,
        "trainer": {"accelerator": "gpu", "precision": "32-true", "limit_val_batches": 1.0},
        "callbacks": {"progress": {"_target_": "a.B"}},
        "data": {"root": "/there"},
    }
    OmegaConf.save(OmegaConf.create(saved), made.config)
    return made


def test_resumed_run_keeps_its_configuration(folder: RunFolder) -> None:
    cfg = resumed_config(folder, ["resume=here"], {"data"})
    assert OmegaConf.to_container(cfg) == OmegaConf.to_container(OmegaConf.load(folder.config))


def test_resumed_run_may_move_to_another_machine(folder: RunFolder) -> None:
    overrides = ["trainer.accelerator=cpu", "data.root=/here", "+callbacks.more._target_=c.D"]
    cfg = resumed_config(folder, [*overrides, "callbacks.progress=null"], {"data"})
    assert cfg.trainer.accelerator == "cpu"
    assert cfg.callbacks == {"progress": None, "more": {"_target_": "c.D"}}
    assert cfg.data.root == "/here"
    assert cfg.seed == 3


@pytest.mark.parametrize(
    "override",
    [
        "seed=4",
        "data=digits",
        "sparse.epochs=9",
        "trainer.precision=bf16-mixed",
        "trainer=gpu",
        "trainer.limt=3",
        "callbacksy.x=1",
        "data.root_folder=x",
        "trainer.limit_val_batches_=2",
        "+trainer.limit_train_batches=3",
        "+trainer.gradient_clip_val=1",
    ],
)
def test_resumed_run_cannot_become_another(folder: RunFolder, override: str) -> None:
    with pytest.raises(ValueError, match=rf"^{re.escape(override)}: a run that goes on keeps"):
        resumed_config(folder, ["resume=here", override], {"data", "model", "trainer"})


def test_resumed_run_takes_new_keys_with_a_plus_only(folder: RunFolder) -> None:
    with pytest.raises(ValueError, match=r"^callbacks\.lst=null: .*config\.yaml has no such key"):
        resumed_config(folder, ["callbacks.lst=null"], {"data"})


class Hydra(NamedTuple):
    """What `run_job` asks Hydra for."""

    mode: RunMode
    overrides: SimpleNamespace
    runtime: SimpleNamespace


class BadImages(Dataset[int]):
    """Images of which none can be read."""

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int) -> int:
        raise ValueError("a.png is not a readable image")


def test_an_error_of_a_process_that_loads_data_is_one_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def job(*arguments: object) -> None:
        next(iter(DataLoader(BadImages(), num_workers=1)))

    runtime = SimpleNamespace(output_dir=str(tmp_path / "0"), choices={})
    hydra = Hydra(RunMode.RUN, SimpleNamespace(task=[]), runtime)
    monkeypatch.setattr(entry.HydraConfig, "get", lambda: hydra)
    monkeypatch.setattr(entry, "run", job)
    with pytest.raises(SystemExit):
        entry.run_job(OmegaConf.create({"resume": None}))
    assert capsys.readouterr().out.splitlines()[0] == "error: a.png is not a readable image"


@pytest.fixture
def given(monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str | None]]:
    """Call `run_job` with overrides and return the commands that jobs were given."""
    commands: list[str | None] = []

    def job(cfg: object, folder: RunFolder, checkpoint: object, command: str | None) -> object:
        commands.append(command)
        return SimpleNamespace(accuracy=SimpleNamespace(runtime=0.5))

    def call(mode: RunMode, path: Path, overrides: list[str], resume: Path | None = None) -> list:
        runtime = SimpleNamespace(output_dir=str(path), choices={})
        hydra = Hydra(mode, SimpleNamespace(task=overrides), runtime)
        monkeypatch.setattr(entry.HydraConfig, "get", lambda: hydra)
        cfg = OmegaConf.create({"resume": resume and str(resume), "task": {"name": "train"}})
        assert entry.run_job(cfg) == 0.5
        return commands

    monkeypatch.setattr(entry, "run", job)
    return call


@pytest.mark.parametrize("mode", [RunMode.RUN, RunMode.MULTIRUN])
def test_job_is_given_its_own_command(
    mode: RunMode, given: Callable[..., list[str | None]], tmp_path: Path
) -> None:
    assert given(mode, tmp_path / "0", ["data=digits", "seed=2", "threads=1"]) == [
        "python train.py data=digits seed=2"
    ]


@pytest.mark.parametrize("devices", [2, [0, 1]])
def test_a_sweep_on_several_devices_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, devices: object
) -> None:
    runtime = SimpleNamespace(output_dir=str(tmp_path / "0"), choices={})
    hydra = Hydra(RunMode.MULTIRUN, SimpleNamespace(task=[]), runtime)
    monkeypatch.setattr(entry.HydraConfig, "get", lambda: hydra)
    cfg = OmegaConf.create({"resume": None, "trainer": {"devices": devices}})
    with pytest.raises(ValueError, match=r"a sweep \(-m, --multirun\) trains on one device"):
        entry.run_job(cfg)


def test_a_run_that_is_there_is_left_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """It may have begun a moment ago, in another process, and hold nothing but what was asked."""
    folder = RunFolder(tmp_path / "0")
    folder.path.mkdir()
    folder.config.write_text("seed: 3\n")
    runtime = SimpleNamespace(output_dir=str(folder.path), choices={})
    hydra = Hydra(RunMode.RUN, SimpleNamespace(task=[]), runtime)
    monkeypatch.setattr(entry.HydraConfig, "get", lambda: hydra)
    with pytest.raises(SystemExit):
        entry.run_job(OmegaConf.create({"resume": None}))
    assert folder.config.read_text() == "seed: 3\n"


def test_resumed_job_keeps_the_command_of_its_beginning(
    given: Callable[..., list[str | None]], folder: RunFolder
) -> None:
    overrides = [f"resume={folder.path}", "data.root=/here"]
    assert given(RunMode.RUN, folder.path, overrides, resume=folder.path) == [None]


def train(*overrides: str, cwd: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, str(ROOT / "train.py"), *overrides],
        capture_output=True,
        text=True,
        cwd=cwd,
        env=os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "100"},
        check=False,
    )


MISTAKES = [
    "model.name=resnet21",
    "resume=/nope",
    "data=image_folder",
    "paths.runs=elsewhere",
    "report.rounds=many",
    "+foo=1",
    "name=",
    "seed=-1",
]

# Runs train.py once per line of arguments, each time in a folder of its own and a process of its
# own, forked after the imports, which take longer than all the rest.
MANY = """
import os, runpy, sys
import blocksparse.pipeline.entry
for number, line in enumerate(sys.argv[2:]):
    if (child := os.fork()) == 0:
        os.chdir(str(number))
        for stream, name in ((1, "out"), (2, "err")):
            os.dup2(os.open(f"../{name}{number}", os.O_WRONLY | os.O_CREAT), stream)
        sys.argv[:] = [sys.argv[1], *line.split()]
        runpy.run_path(sys.argv[0], run_name="__main__")
        os._exit(0)
    _, status = os.waitpid(child, 0)
    open(f"status{number}", "w").write(str(os.waitstatus_to_exitcode(status)))
"""


class Mistaken(NamedTuple):
    """What a run with a mistake in it leaves: exit status, output, its folder."""

    status: int
    out: str
    err: str
    folder: Path


@pytest.fixture(scope="module")
def mistaken(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Mistaken]:
    if not hasattr(os, "fork"):
        pytest.skip("processes cannot be forked here")
    base = tmp_path_factory.mktemp("mistakes")
    lines = {mistake: f"{mistake} dense.epochs=-1" for mistake in MISTAKES}
    lines["seed=4"] = "resume=runs/a/b seed=4"
    for other in ("data.batch_size=0", "paths.runs=/dev/null", "sparsity.targe=0.5"):
        lines[other] = f"experiment=smoke {other}"
    for number in range(len(lines)):
        (base / str(number)).mkdir()
    run = base / str(len(MISTAKES)) / "runs" / "a" / "b"
    run.mkdir(parents=True)
    OmegaConf.save(OmegaConf.create({"seed": 3}), run / "config.yaml")
    subprocess.run(
        [sys.executable, "-c", MANY, str(ROOT / "train.py"), *lines.values()],
        cwd=base,
        env=os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "100"},
        check=True,
        timeout=240,
    )
    return {
        mistake: Mistaken(
            int((base / f"status{number}").read_text()),
            (base / f"out{number}").read_text(),
            (base / f"err{number}").read_text(),
            base / str(number),
        )
        for number, mistake in enumerate(lines)
    }


@pytest.mark.slow
@pytest.mark.parametrize("override", MISTAKES)
def test_mistake_is_one_line_and_leaves_nothing_behind(
    mistaken: dict[str, Mistaken], override: str
) -> None:
    done = mistaken[override]
    assert done.status == 1
    assert done.out.startswith("error: ")
    assert "run.log" not in done.out
    assert "writing to" not in done.out  # it is of what was typed, not of the disk
    assert "Traceback" not in done.out + done.err
    assert not list(done.folder.iterdir())


@pytest.mark.slow
def test_a_run_that_cannot_start_leaves_nothing(mistaken: dict[str, Mistaken]) -> None:
    done = mistaken["data.batch_size=0"]
    assert done.out.startswith("error: batch_size is 0")
    assert not list(done.folder.iterdir())


@pytest.mark.slow
def test_a_folder_that_cannot_be_made_is_one_line(mistaken: dict[str, Mistaken]) -> None:
    done = mistaken["paths.runs=/dev/null"]
    assert done.status == 1
    assert "Not a directory" in done.out
    assert "Traceback" not in done.out + done.err


@pytest.mark.slow
def test_a_key_that_is_not_there_is_not_to_be_added(mistaken: dict[str, Mistaken]) -> None:
    done = mistaken["sparsity.targe=0.5"]
    assert done.status == 1
    assert done.out.startswith("error: Could not override 'sparsity.targe'")
    assert "+sparsity.targe" not in done.out + done.err
    assert "--help lists what can be set" in done.out


@pytest.mark.slow
def test_mistake_leaves_the_folder_of_a_run_alone(mistaken: dict[str, Mistaken]) -> None:
    done = mistaken["seed=4"]
    assert done.status == 1
    assert done.out.startswith("error: seed=4: a run that goes on keeps")
    assert "The traceback is in runs/a/b/run.log" in done.out
    folder = done.folder / "runs" / "a" / "b"
    assert "Traceback" in (folder / "run.log").read_text()
    assert (folder / "config.yaml").is_file()


@pytest.mark.long
def test_first_command_prints_only_its_own(tmp_path: Path) -> None:
    done = train("experiment=smoke", cwd=tmp_path)
    assert done.returncode == 0, done.stdout
    assert not done.stderr
    assert "Warning" not in done.stdout
    assert "lightning" not in done.stdout.lower()
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]
    (report,) = tmp_path.glob("runs/smoke/*/report.json")
    assert json.loads(report.read_text())["command"] == "python train.py experiment=smoke"


@pytest.mark.long
def test_failing_job_leaves_the_rest_of_a_sweep_alone(tmp_path: Path) -> None:
    done = train("-m", "experiment=smoke", "sparsity.target=0.5,0.999,0.75", cwd=tmp_path)
    assert done.returncode != 0
    assert "sparsity target 0.999 cannot be reached" in done.stdout
    (sweep,) = tmp_path.glob("runs/smoke/*")
    made = sorted(path.parent.name for path in sweep.glob("*/report.json"))
    assert made == ["0", "2"]
    third = json.loads((sweep / "2" / "report.json").read_text())
    assert third["command"] == "python train.py experiment=smoke sparsity.target=0.75"
    assert not (sweep / "1" / "model.bsr.safetensors").exists()
