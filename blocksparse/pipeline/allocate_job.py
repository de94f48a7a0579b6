"""``task=allocate``: the sparsity of every layer that keeps the most within a budget of time."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import lightning.pytorch as pl
import torch
from omegaconf import DictConfig
from rich import box
from rich.progress import Progress
from rich.table import Table

from blocksparse.export import export_model
from blocksparse.format import Model
from blocksparse.perf import Timing, cost, describe_machine
from blocksparse.pipeline.choices import (
    Choices,
    CostLimit,
    at_least,
    counted_sparsities,
    matched,
    save_allocation,
)
from blocksparse.pipeline.console import console, key_values, quieten, say
from blocksparse.pipeline.folders import RunFolder
from blocksparse.pipeline.layer_times import LayerTimes, measure_times
from blocksparse.pipeline.scan_job import Subject, prepare, scanned
from blocksparse.pipeline.setup import check, threads
from blocksparse.pipeline.trials import Trial, timed_together, try_out
from blocksparse.sparsity import ERK, Allocation, Global, Uniform
from blocksparse.sparsity.knapsack import Infeasible, Solution
from blocksparse.whole_file import write_whole

__all__ = ["run"]

OURS = "latency-aware"
RULES: dict[str, Allocation] = {
    "uniform": Uniform(),
    "global magnitude": Global(),
    "ERK": ERK(),
}
DENSE = "dense"
SAME = 1e-3
"""How much more milliseconds, as a share, count as equal: a rule has steps of a block."""


@dataclass(frozen=True)
class Line:
    """One allocation in the table that compares them.

    Parameters
    ----------
    sparsity
        Of the prunable weights, 0..1.
    flops
        Share of the network's multiply-adds that is left, 0..1.
    predicted_ms, measured_ms, q1_ms, q3_ms, best_ms
        Of one call with one image: the sum over layers, and the whole network's median, quartiles
        and fastest call.
    predicted_loss
        Nats that the layers add one by one, summed.
    loss, accuracy
        All layers pruned at once, no training: nats, and 0..1.
    """

    sparsity: float
    flops: float
    predicted_ms: float
    measured_ms: float
    q1_ms: float
    q3_ms: float
    best_ms: float
    predicted_loss: float
    loss: float
    accuracy: float


def run(cfg: DictConfig, folder: RunFolder) -> float:
    """Scan, time, choose, compare, and write what was chosen.

    Parameters
    ----------
    cfg
        The configuration; see ``configs/task/allocate.yaml``.
    folder
        Where everything goes.

    Returns
    -------
    float
        Accuracy of the chosen network, all layers pruned at once and not trained, on training
        images, 0..1.

    Raises
    ------
    ValueError, FileNotFoundError
        For whatever is wrong with the configuration, the data, the weights, or the budget.
    """
    quieten()
    check(cfg)
    if not cfg.sparsity.keep_channels:
        raise ValueError(
            "sparsity.keep_channels=false: task=allocate times each layer with masks that keep "
            "something of every block row and column; leave sparsity.keep_channels at true"
        )
    _check_limits(cfg.task)
    with threads(cfg.threads):
        pl.seed_everything(cfg.seed, workers=True, verbose=False)
        subject = prepare(cfg, folder)
        rows = scanned(cfg, subject, folder)
        job = _Job(cfg, subject, Choices.of(subject.network, subject.plan, cfg.task.levels, rows))
        chosen, solution = job.choose()
        path = folder.path / "allocation.yaml"
        job.save_choice(path, chosen, solution)
        console.print(job.layers_table(chosen))
        key_values("Chosen", job.facts(solution).items())
        lines = job.compare(chosen)
    console.print(_table(lines))
    job.save_comparison(folder.path / "allocation.json", solution, lines)
    written = {
        path.name: "train with: sparsity/allocation=file "
        f"sparsity.allocation.path={RunFolder(path)}",
        "allocation.json": "the tables above, and the machine",
        "layer_times.csv": "milliseconds per layer and sparsity",
        "sensitivity.csv": "loss and accuracy per layer and sparsity",
    }
    key_values(f"Written to {folder}", written.items())
    return lines[OURS].accuracy


class _Job:
    """What the steps share: what is pruned, the times of its layers, and the budget."""

    def __init__(self, cfg: DictConfig, subject: Subject, choices: Choices) -> None:
        self.cfg = cfg
        self.subject = subject
        self.plan = subject.plan
        self.choices = choices
        self.shape = subject.data.input_shape
        self.dense: Model = export_model(subject.network, self.shape)
        self.timing = {
            "threads": cfg.report.threads or torch.get_num_threads(),
            "rounds": cfg.report.rounds,
            "min_seconds": cfg.report.min_seconds,
        }
        nodes = {node.name: node for node in cost(self.dense)}
        self.flops = {layer.name: nodes[layer.name].flops_dense for layer in self.plan.pruned}
        self.all_flops = sum(node.flops_dense for node in nodes.values())
        self.times: LayerTimes = self._time_layers()
        self.budget, self.origin = self._budget()

    def choose(self) -> tuple[dict[str, float], Solution]:
        """Return the sparsity of each layer that is predicted to cost the least loss.

        Raises
        ------
        ValueError
            If nothing keeps within the budget and the least sparsity; says what would.
        """
        task = self.cfg.task
        limits = [CostLimit("milliseconds", self.times.constant_ms, self.times.layer, self.budget)]
        if task.min_sparsity is not None:
            limits.append(at_least(task.min_sparsity, self.plan))
        if task.min_flops_cut is not None:
            limits.append(
                CostLimit(
                    "multiply-adds",
                    self.all_flops - sum(self.flops.values()),
                    lambda name, sparsity: self.flops[name] * (1 - sparsity),
                    (1 - task.min_flops_cut) * self.all_flops,
                )
            )
        try:
            return self.choices.cheapest(limits)
        except Infeasible as error:
            raise ValueError(
                f"the budget of {self.budget:.4g} ms ({self.origin}) and the other limits cannot "
                f"be kept: {error}. Allow more time (task.milliseconds, task.speedup), lower "
                "task.min_sparsity or task.min_flops_cut, or add higher task.levels"
            ) from error

    def compare(self, chosen: Mapping[str, float]) -> dict[str, Line]:
        """Bring the usual rules to the same predicted milliseconds, and try all of them out."""
        subject, plan = self.subject, self.plan
        most = self.times.network(chosen) * (1 + SAME)
        found = {DENSE: dict.fromkeys(chosen, 0.0), OURS: dict(chosen)}
        for name, rule in RULES.items():
            say(f"{name}: looking for the target that takes {most:.4g} ms")
            same = matched(subject.network, plan, rule, self.times.network, most)
            if same is None:
                say(f"{name}: its floors do not let it be that fast, so it is left out")
            else:
                found[name] = same
        say("pruning, evaluating and exporting each")
        trials = {
            name: try_out(subject.network, plan, each, subject.evaluate, self.shape)
            for name, each in found.items()
        }
        say("timing each")
        models = {name: trial.model for name, trial in trials.items()}
        timings = timed_together(models, **self.timing)
        return {name: self._line(found[name], trials[name], timings[name]) for name in found}

    def facts(self, solution: Solution) -> dict[str, str]:
        """Return what was asked for and what was found, in words."""
        errors = [abs(error) for error in self.times.errors]
        return {
            "budget": f"{self.budget:.4g} ms per image, {self.origin}",
            "predicted loss": f"{solution.loss:.4f} nats added, and no choice has less than "
            f"{solution.bound:.4f}",
            "times": f"layers, plus {self.times.constant_ms:.4g} ms for the rest; off by "
            f"{median(errors):.1%} (median) for {len(errors)} networks timed whole",
            "threads": str(self.times.threads),
            "machine": str(describe_machine()),
        }

    def layers_table(self, chosen: Mapping[str, float]) -> Table:
        """Return what was chosen, layer by layer."""
        table = Table(title="Allocation", title_justify="left", box=box.HORIZONTALS)
        table.add_column("layer", no_wrap=True)
        for title in ("weights", "sparsity", "dense, ms", "so, ms", "loss added, nats"):
            table.add_column(title, justify="right")
        for layer in self.plan.pruned:
            sparsity = chosen[layer.name]
            table.add_row(
                layer.name,
                f"{layer.size:,}",
                f"{100 * sparsity:.1f} %",
                f"{self.times.dense_ms[layer.name]:.4f}",
                f"{self.times.layer(layer.name, sparsity):.4f}",
                f"{self.choices.curves[layer.name].at(sparsity):.4f}",
            )
        return table

    def save_choice(self, path: Path, chosen: Mapping[str, float], solution: Solution) -> None:
        """Write the allocation, and the times it rests on beside it."""
        facts = {"network": self.cfg.model.name, **self.facts(solution)}
        save_allocation(path, self.plan, chosen, facts)
        write_whole(path.with_name("layer_times.csv"), self.times.to_csv())

    def save_comparison(self, path: Path, solution: Solution, lines: Mapping[str, Line]) -> None:
        """Write what was asked for, found and compared, as JSON."""
        content = {
            **self.facts(solution),
            "budget_ms": self.budget,
            "constant_ms": self.times.constant_ms,
            "time_errors": list(self.times.errors),
            "predicted_loss": solution.loss,
            "bound": solution.bound,
            "compared": {name: asdict(line) for name, line in lines.items()},
        }
        write_whole(path, json.dumps(content, indent=2) + "\n")

    def _time_layers(self) -> LayerTimes:
        with Progress(console=console, disable=not console.is_terminal, transient=True) as bar:
            task = bar.add_task("timing layers", total=1.0)
            if not console.is_terminal:
                say("timing layers, dense and at every level")
            return measure_times(
                self.dense,
                self.plan,
                list(self.cfg.task.levels),
                **self.timing,
                on_progress=lambda what, share: bar.update(task, description=what, completed=share),
            )

    def _budget(self) -> tuple[float, str]:
        """Return the milliseconds there are, and in words where they are from."""
        task = self.cfg.task
        if task.milliseconds is not None:
            return float(task.milliseconds), "as given"
        dense = self.times.network(dict.fromkeys(self.flops, 0.0))
        if task.speedup is not None:
            return dense / task.speedup, f"{task.speedup:g}x as fast as dense, {dense:.4g} ms"
        target = self.plan.target
        network, plan = self.subject.network, self.plan
        uniform = counted_sparsities(network, plan, Uniform(), target)
        return self.times.network(uniform), f"what {100 * target:g} % in every layer takes"

    def _line(self, sparsities: Mapping[str, float], trial: Trial, timing: Timing) -> Line:
        sizes = {layer.name: layer.size for layer in self.plan.pruned}
        zeros = sum(sizes[name] * sparsity for name, sparsity in sparsities.items())
        saved = sum(self.flops[name] * sparsity for name, sparsity in sparsities.items())
        return Line(
            sparsity=zeros / self.plan.prunable,
            flops=1 - saved / self.all_flops,
            predicted_ms=self.times.network(sparsities),
            measured_ms=timing.median_ms,
            q1_ms=timing.q1_ms,
            q3_ms=timing.q3_ms,
            best_ms=timing.best_ms,
            predicted_loss=self.choices.loss(sparsities),
            loss=trial.loss,
            accuracy=trial.accuracy,
        )


def _check_limits(task: DictConfig) -> None:
    """Refuse limits that no network could keep, before anything is done."""
    if task.milliseconds is not None and task.speedup is not None:
        raise ValueError(
            f"task.milliseconds={task.milliseconds} and task.speedup={task.speedup} both set the "
            "budget: give one of them"
        )
    for key in ("milliseconds", "speedup"):
        if task[key] is not None and task[key] <= 0:
            raise ValueError(f"task.{key}={task[key]}: must be above 0, such as 2")
    for key in ("min_sparsity", "min_flops_cut"):
        if task[key] is not None and not 0 <= task[key] <= 1:
            raise ValueError(f"task.{key}={task[key]}: is a share in 0..1, such as 0.5")


def _table(lines: Mapping[str, Line]) -> Table:
    table = Table(
        title="At equal milliseconds, all layers pruned at once, no training, on training images",
        title_justify="left",
        box=box.HORIZONTALS,
    )
    table.add_column("allocation", no_wrap=True)
    for title in (
        "sparsity",
        "multiply-adds left",
        "ms, predicted",
        "ms, measured",
        "quartiles",
        "fastest",
        "loss added, predicted",
        "loss",
        "accuracy",
    ):
        table.add_column(title, justify="right")
    for name, line in lines.items():
        table.add_row(
            name,
            f"{100 * line.sparsity:.1f} %",
            f"{100 * line.flops:.1f} %",
            f"{line.predicted_ms:.3f}",
            f"{line.measured_ms:.3f}",
            f"{line.q1_ms:.3f} to {line.q3_ms:.3f}",
            f"{line.best_ms:.3f}",
            f"{line.predicted_loss:.3f}",
            f"{line.loss:.3f}",
            f"{100 * line.accuracy:.1f} %",
        )
    return table
