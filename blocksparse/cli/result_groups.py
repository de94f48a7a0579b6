"""Finished runs, read from their reports, and grouped where they differ only in their seed."""

from __future__ import annotations

import json
import re
import shlex
import statistics
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from blocksparse.cli.console import CommandError, UsageError
from blocksparse.report import BUSY, DENSE_RUNTIME, SPARSE_RUNTIME

__all__ = ["Found", "Group", "Network", "Run", "find_runs", "group_runs", "labels", "without_seed"]

SOURCE = re.compile(r"^ +(?:root|weights|path): (.+)$", re.MULTILINE)
SEED = re.compile(r"(\+{0,2})seed=(.*)")
TRAINING_TASK = "train"  # the only one that ends with a closing report


@dataclass(frozen=True)
class Network:
    """A dense network and what it was validated on: runs that share it share its point in a plot.

    Parameters
    ----------
    model, data
        Names of the network and of its images, empty where the configuration is not there.
    parameters, flops
        Of the dense network; floating-point operations are per image.
    images
        How many validation images there were.
    """

    model: str
    data: str
    parameters: int
    flops: int
    images: int


@dataclass(frozen=True)
class Run:
    """The figures of one report.

    Parameters
    ----------
    folder
        Where the report lies.
    name
        The experiment.
    command, seed
        What was typed, empty where it was not recorded, and None for a seed that was not.
    sources
        Paths of data, weights and allocation, whole: the command has only their last part.
    network, pattern
        What was pruned, and which of its weights are zero together.
    sparsity, flops_gone, dense, top1
        Shares in 0..1: prunable weights and FLOPs that are gone, images classified correctly by
        the dense network and by the exported file.
    dense_bytes, file_bytes
        Of the dense checkpoint and of the exported file.
    dense_ms, ms
        Median milliseconds per image of both networks in the runtime of this package.
    busy
        Whether other programs kept the machine busy while times were taken.
    machine, threads
        What the times were taken on.
    """

    folder: Path
    name: str
    command: str
    seed: int | None
    sources: tuple[str, ...]
    network: Network
    pattern: str
    sparsity: float
    flops_gone: float
    dense: float
    top1: float
    dense_bytes: int
    file_bytes: int
    dense_ms: float
    ms: float
    busy: bool
    machine: str
    threads: int

    @property
    def loss(self) -> float:
        """What pruning cost in accuracy, in points."""
        return 100 * (self.dense - self.top1)


@dataclass(frozen=True)
class Group:
    """Runs that differ in their seed alone, or a single run."""

    runs: tuple[Run, ...]

    @property
    def first(self) -> Run:
        """The run that stands for what all of them share: name, pattern, network."""
        return self.runs[0]

    @property
    def command(self) -> str:
        """What makes all of these runs, empty where it was not recorded."""
        command = self.first.command
        if len(self.runs) == 1 or not command:
            return command
        start, rest = shlex.split(command)[:2], shlex.split(without_seed(command))[2:]
        seeds = ",".join(str(run.seed) for run in self.runs)
        return shlex.join([*start, "-m", *rest, f"seed={seeds}"])

    def mean(self, figure: Callable[[Run], float]) -> float:
        """Return the mean of a figure over the runs."""
        return statistics.fmean(map(figure, self.runs))

    def deviation(self, figure: Callable[[Run], float]) -> float | None:
        """Return the sample standard deviation of a figure, None for a single run."""
        return statistics.stdev(map(figure, self.runs)) if len(self.runs) > 1 else None

    def span(self, figure: Callable[[Run], float]) -> tuple[float, float]:
        """Return the lowest and the highest value of a figure."""
        values = [figure(run) for run in self.runs]
        return min(values), max(values)

    @property
    def busy(self) -> bool:
        """Whether no run of the group had the machine to itself while times were taken."""
        return all(run.busy for run in self.runs)

    def time(self, figure: Callable[[Run], float]) -> float:
        """Return the median of a figure that is a time, over the runs whose times can be trusted.

        Where none can be, it is over all of them; see `busy`. Of several machines, the one that
        most of them were timed on counts.
        """
        timed = [run for run in self.runs if self.busy or not run.busy]
        machine = Counter(run.machine for run in timed).most_common(1)[0][0]
        return statistics.median(figure(run) for run in timed if run.machine == machine)


@dataclass(frozen=True)
class Found:
    """What lies at or below some folders.

    Parameters
    ----------
    runs
        Finished ones, in the order of their folders.
    unfinished
        Folders with a configuration and no report.
    other
        Folder and name of tasks that end with no report, such as ``sensitivity``.
    """

    runs: list[Run]
    unfinished: list[Path]
    other: list[tuple[Path, str]]


def find_runs(folders: Iterable[Path]) -> Found:
    """Read every ``report.json`` at or below `folders`.

    Raises
    ------
    UsageError
        If a folder is not there.
    CommandError
        If a report cannot be read.
    """
    found = Found([], [], [])
    seen = set()
    for folder in folders:
        if not folder.is_dir():
            what = "is not a folder" if folder.exists() else "does not exist"
            raise UsageError(f"{folder} {what}; name the folder of a run, or one above several")
        paths = [*folder.rglob("report.json"), *folder.rglob("config.yaml")]
        for path in sorted({path.parent for path in paths if not _hidden(path, folder)}):
            if path.resolve() in seen:
                continue
            seen.add(path.resolve())
            config = _text(path / "config.yaml")
            if (path / "report.json").exists():
                found.runs.append(_read(path / "report.json", config))
            elif (task := _setting(config, "task", "name") or TRAINING_TASK) != TRAINING_TASK:
                found.other.append((path, task))
            else:
                found.unfinished.append(path)
    return found


def group_runs(runs: Iterable[Run]) -> tuple[list[Group], list[tuple[Run, Run]]]:
    """Group runs that differ only in their seed.

    Parameters
    ----------
    runs
        The later one here counts where two have the same command and seed: it is no other draw.

    Returns
    -------
    list of Group
        Sorted by name, then sparsity.
    list of (Run, Run)
        Each run that does not count, and the one that counts instead.
    """
    groups: dict[tuple[object, ...], dict[object, Run]] = {}
    replaced = []
    for run in runs:
        recorded = bool(run.command)
        # Accuracies of any machine compare; times of different numbers of threads do not.
        what = (run.network, run.pattern, run.sources)
        key = (without_seed(run.command), *what, run.threads) if recorded else (run.folder,)
        members = groups.setdefault(key, {})
        if run.seed in members:
            replaced.append((members[run.seed], run))
        members[run.seed] = run
    made = [
        Group(tuple(sorted(members.values(), key=lambda run: -1 if run.seed is None else run.seed)))
        for members in groups.values()
    ]
    made.sort(key=lambda group: (group.first.name, _rounded(group), group.first.pattern))
    return made, replaced


def _rounded(group: Group) -> float:
    return round(group.mean(lambda run: run.sparsity), 4)


def without_seed(command: str) -> str:
    """Return a command without its ``seed=``."""
    return shlex.join(part for part in shlex.split(command) if not SEED.fullmatch(part))


def _hidden(path: Path, folder: Path) -> bool:
    """Say whether a path lies in a hidden folder, such as Hydra's own."""
    return any(part.startswith(".") for part in path.relative_to(folder).parts)


def _text(path: Path) -> str:
    return path.read_text(encoding="utf-8") if path.is_file() else ""


def _setting(config: str, group: str, key: str) -> str:
    """Return a key of a group from the text of a run's ``config.yaml``, empty if not there.

    A YAML reader is not among what the command line needs, and OmegaConf writes one key on a line.
    """
    block = re.search(rf"^{group}:\n((?:[ ].*\n?)*)", config, flags=re.MULTILINE)
    line = re.search(rf"^  {key}: (.+)$", block[1], flags=re.MULTILINE) if block else None
    value = line[1].strip("'\" ") if line else ""
    return "" if value == "null" else value


def _read(path: Path, config: str) -> Run:
    """Read one report."""
    try:
        return _run(path.parent, json.loads(path.read_text(encoding="utf-8")), config)
    except (ValueError, KeyError, TypeError, ZeroDivisionError) as error:
        what = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        raise CommandError(
            f"{path} is not a whole closing report of train.py ({what}). Write it anew with "
            f"`python train.py resume={shlex.quote(str(path.parent))}`, which trains nothing again "
            "if the run was finished, or move the file elsewhere"
        ) from error


def _run(folder: Path, report: Any, config: str) -> Run:
    if not isinstance(report, dict):
        raise ValueError("it holds no object")
    accuracy, cost, sizes = report["accuracy"], report["cost"], report["sizes"]
    latency = report["latency"]
    ms = {engine["engine"]: float(engine["median_ms"]) for engine in latency["engines"]}
    root = _setting(config, "data", "root")
    source = _setting(config, "data", "_target_").rpartition(".")[2]
    return Run(
        folder=folder,
        name=str(report["name"]),
        command=str(report.get("command", "")),  # reports of earlier versions have neither
        seed=int(report["seed"]) if "seed" in report else None,
        sources=tuple(SOURCE.findall(config)),
        network=Network(
            model=_setting(config, "model", "name"),
            data=Path(root).name or source,
            parameters=int(cost["parameters"]),
            flops=int(cost["flops"]),
            images=int(accuracy["images"]),
        ),
        pattern=str(report["sparsity"]["pattern"]),
        sparsity=float(report["sparsity"]["reached"]),
        flops_gone=1 - cost["flops_kept"] / cost["flops"],
        dense=float(accuracy["dense"]),
        top1=float(accuracy["runtime"]),
        dense_bytes=int(sizes["dense_checkpoint_bytes"]),
        file_bytes=int(sizes["exported_file_bytes"]),
        dense_ms=ms[DENSE_RUNTIME],
        ms=ms[SPARSE_RUNTIME],
        busy=any(BUSY in str(remark) for remark in report["remarks"]),
        machine=str(report["machine"]),
        threads=int(latency["threads"]),
    )


def labels(networks: Sequence[Network]) -> dict[Network, str]:
    """Return a name for each dense network: the shortest kind that tells them apart."""
    candidates: tuple[Callable[[Network], str], ...] = (
        lambda network: network.model,
        lambda network: f"{network.model}, {network.data}",
        lambda network: f"{network.model}, {network.parameters:,} parameters",
    )
    unique = list(dict.fromkeys(networks))
    for name in candidates:
        found = {network: name(network) for network in unique}
        if all(found.values()) and len(set(found.values())) == len(unique):
            return found
    return {
        network: f"{network.model or 'network'}, {network.data or 'unknown data'}, "
        f"{network.parameters:,} parameters, {network.images:,} images"
        for network in unique
    }
