"""``task=sensitivity``: what pruning each layer alone costs, as files, a picture and a table."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
from omegaconf import DictConfig, OmegaConf
from rich import box
from rich.table import Table
from torch import nn

from blocksparse.pipeline.choices import Choices, at_least, save_allocation
from blocksparse.pipeline.console import console, key_values, quieten, say
from blocksparse.pipeline.evaluation import CalibrationLoss
from blocksparse.pipeline.folders import RunFolder
from blocksparse.pipeline.progress import Steps
from blocksparse.pipeline.scan_files import ScanFiles, fingerprint
from blocksparse.pipeline.scan_plot import save_plot
from blocksparse.pipeline.setup import build, build_data, build_network, check, threads
from blocksparse.sparsity import Plan, Uniform, pattern_to_json
from blocksparse.sparsity.knapsack import Infeasible
from blocksparse.sparsity.sensitivity import Row, points, scan
from blocksparse.training import ImageData, SparsityCallback
from blocksparse.whole_file import write_whole

__all__ = ["Subject", "prepare", "run", "scanned"]

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Subject:
    """What is scanned: a trained network, what may be pruned in it, and how it is evaluated.

    Parameters
    ----------
    data
        Its training images are evaluated on, its shapes exported with.
    network
        On the CPU, in evaluation mode.
    plan
        Pattern, score, floors, and which layers; its target is ``sparsity.target``.
    evaluate
        Loss and accuracy.
    """

    data: ImageData
    network: nn.Module
    plan: Plan
    evaluate: CalibrationLoss


def run(cfg: DictConfig, folder: RunFolder) -> float:
    """Scan a network, and write what was found.

    Rows that an interrupted scan left in `folder` are not evaluated again.

    Parameters
    ----------
    cfg
        The configuration; see ``configs/task/sensitivity.yaml``.
    folder
        Where everything goes.

    Returns
    -------
    float
        Accuracy of the dense network on the training images looked at, 0..1.

    Raises
    ------
    ValueError, FileNotFoundError
        For whatever is wrong with the configuration, the data or the weights.
    """
    quieten()
    check(cfg)
    with threads(cfg.threads):
        pl.seed_everything(cfg.seed, workers=True, verbose=False)
        subject = prepare(cfg, folder)
        rows = scanned(cfg, subject, folder)
        chosen = _choose(cfg, subject, rows)
    save_plot(rows, str(subject.plan.pattern), cfg.name, folder.path / "sensitivity.png")
    console.print(_table(rows, chosen))
    written = {
        "sensitivity.csv": "loss and accuracy per layer and sparsity",
        "sensitivity.json": "what was evaluated, and how",
        "sensitivity.png": "the same as a picture",
    }
    if chosen:
        path = folder.path / "allocation.yaml"
        facts = {
            "network": cfg.model.name,
            "chosen for": f"the least predicted loss at {subject.plan.target:g} sparsity in all",
        }
        save_allocation(path, subject.plan, chosen, facts)
        written[path.name] = (
            "the choices in the last column; train with sparsity/allocation=file "
            f"sparsity.allocation.path={RunFolder(path)}"
        )
    key_values(f"Written to {folder}", written.items())
    return rows[0].accuracy


def prepare(cfg: DictConfig, folder: RunFolder) -> Subject:
    """Build what is scanned, print what was decided, and save the configuration.

    Raises
    ------
    ValueError
        If there are no trained weights, or the configuration cannot be used.
    """
    if cfg.model.weights is None:
        raise ValueError(
            f"task={cfg.task.name} looks at a trained network, and model.weights names none: set "
            "model.weights=FILE, such as runs/<name>/<time>/checkpoints/dense.ckpt of a training"
        )
    data = build_data(cfg)
    network = build_network(cfg, data).eval()
    pruning: SparsityCallback = build(cfg.sparsity)
    # Every layer that may be pruned, also those that the configured allocation would leave dense.
    pruning.allocation = Uniform()
    plan = pruning.plan_for(network)
    if not plan.pruned:
        raise ValueError(
            f"sparsity.target={cfg.sparsity.target:g} leaves every layer dense, so there is "
            "nothing to scan: set it above 0"
        )
    evaluate = CalibrationLoss(
        data, cfg.task.images, cfg.task.batchnorm_batches, channels_last=cfg.channels_last
    )
    write_whole(folder.config, OmegaConf.to_yaml(cfg, resolve=True))
    count = evaluate.images
    rows = {
        "network": f"{cfg.model.name}, weights from {cfg.model.weights}",
        "evaluated on": f"{count:,} training images of {type(data).__name__}, not augmented; "
        "validation images stay unseen",
        "batch norm": f"re-estimated on {len(evaluate.for_batchnorm)} other batches of "
        f"{data.batch_size}",
        "pruned": f"{len(plan.pruned)} of {len(plan.layers)} layers, {plan.pattern}, score "
        f"{plan.score.name}",
        "folder": str(folder),
    }
    key_values(cfg.name, rows.items())
    _log.info("configuration:\n%s", OmegaConf.to_yaml(cfg, resolve=True))
    return Subject(data, network, plan, evaluate)


def scanned(cfg: DictConfig, subject: Subject, folder: RunFolder) -> list[Row]:
    """Return the rows of a finished scan, made now, gone on with, or read from another run."""
    settings = _settings(cfg, subject)
    key = fingerprint(settings, subject.network, subject.evaluate.batches)
    todo = points(subject.network, subject.plan, list(cfg.task.levels))
    source = OmegaConf.select(cfg, "task.scan")
    if source is not None:
        known = ScanFiles(Path(source)).read(settings, key)
    else:
        known = ScanFiles(folder.path).start(settings, key)
    files = ScanFiles(folder.path)
    done = {row.key for row in known}
    count = sum((point.layer, round(point.sparsity, 6)) in done for point in todo)
    if source is not None and count < len(todo):
        raise ValueError(
            f"task.scan={source}: that scan has {count} of the {len(todo)} rows that "
            f"task.levels={list(cfg.task.levels)} take. Finish it with python train.py "
            f"resume={source}, or give the levels it was made with"
        )
    rows: list[Row] = []
    with Steps("scanning", len(todo), done=count) as bar:
        for row in scan(subject.network, subject.plan, todo, subject.evaluate, known):
            rows.append(row)
            if row.key not in done:
                files.write([*rows, *_later(known, rows)])
                bar.step(f"{row.layer} {100 * row.sparsity:.0f} %  loss {row.loss:.3f}")
    files.write(rows)
    return rows


def _choose(cfg: DictConfig, subject: Subject, rows: list[Row]) -> dict[str, float] | None:
    """Return the sparsities that add the least loss at ``sparsity.target`` in all, if any do."""
    choices = Choices.of(subject.network, subject.plan, list(cfg.task.levels), rows)
    try:
        return choices.cheapest([at_least(subject.plan.target, subject.plan)])[0]
    except Infeasible as error:
        say(
            f"no allocation is written: task.levels={list(cfg.task.levels)} do not come to "
            f"sparsity.target={subject.plan.target:g} in all; add higher ones ({error})"
        )
        return None


def _table(rows: list[Row], chosen: dict[str, float] | None) -> Table:
    """Return the scan as a table: the loss each layer adds at each level, and what was chosen."""
    dense = rows[0]
    layers: dict[str, list[Row]] = {}
    for row in rows[1:]:
        layers.setdefault(row.layer, []).append(row)
    table = Table(
        title=f"One layer pruned at a time; dense: loss {dense.loss:.4f} nats, accuracy "
        f"{dense.accuracy:.2%}",
        title_justify="left",
        box=box.HORIZONTALS,
    )
    table.add_column("layer", no_wrap=True)
    table.add_column("weights", justify="right")
    table.add_column("sparsity: loss added, nats", overflow="fold")
    if chosen:
        table.add_column("chosen", justify="right")
    for name, found in layers.items():
        cells = [f"{100 * row.sparsity:.0f} %: {row.loss - dense.loss:+.3f}" for row in found]
        line = [name or "(the network itself)", f"{found[0].weights:,}", "  ".join(cells)]
        table.add_row(*line, *([f"{100 * chosen[name]:.0f} %"] if chosen else []))
    return table


def _settings(cfg: DictConfig, subject: Subject) -> dict[str, Any]:
    """Return what a scan depends on, beside weights and images."""
    plan, evaluate = subject.plan, subject.evaluate
    return {
        "network": cfg.model.name,
        "pattern": pattern_to_json(plan.pattern),
        "score": plan.score.name,
        "floors": {
            "min_density": plan.floors.min_density,
            "keep_channels": plan.floors.keep_channels,
        },
        "layers": [layer.name for layer in plan.pruned],
        "images": evaluate.images,
        "batchnorm_images": sum(len(labels) for _, labels in evaluate.for_batchnorm),
    }


def _later(known: list[Row], rows: list[Row]) -> list[Row]:
    """Return the known rows that are not among ``rows`` yet: they stay in the file."""
    there = {row.key for row in rows}
    return [row for row in known if row.key not in there]
