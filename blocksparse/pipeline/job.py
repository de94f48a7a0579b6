"""One run of the main job, from its configuration to its report."""

from __future__ import annotations

import copy
import logging
import os
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import lightning.pytorch as pl
import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor, nn

from blocksparse.export import ExportReport, export_file, export_model
from blocksparse.format import read
from blocksparse.perf import describe_machine, usable_cores
from blocksparse.pipeline import measure
from blocksparse.pipeline.console import console, key_values, quieten, say
from blocksparse.pipeline.folders import RunFolder
from blocksparse.pipeline.one_shot import prune_one_shot
from blocksparse.pipeline.setup import (
    build,
    build_data,
    build_network,
    build_teachers,
    check,
    export_block,
    is_first_process,
    is_set,
    threads,
)
from blocksparse.pipeline.stages import Stage, save_weights
from blocksparse.report import Report
from blocksparse.sparsity import Plan, checkpoint_plan
from blocksparse.sparsity.state import STATE_KEY
from blocksparse.training import Ensemble, load_weights, read_weights
from blocksparse.training.sparsity_callback import SparsityCallback
from blocksparse.training.weights import read_content
from blocksparse.whole_file import write_whole

__all__ = ["run"]

_log = logging.getLogger(__name__)


def run(
    cfg: DictConfig,
    folder: RunFolder,
    checkpoint: Path | None = None,
    command: str | None = None,
) -> Report | None:
    """Train, prune, export, verify and measure.

    What `folder` holds already, from a run that was interrupted, is not done again.

    Parameters
    ----------
    cfg
        The configuration; see ``configs/train.yaml``.
    folder
        Where everything goes.
    checkpoint
        The checkpoint in `folder` to go on from; by default the last one of the stage under way.
    command
        What was typed, for the report. None for a run that goes on: that of its beginning, which
        lies in its folder, counts.

    Returns
    -------
    Report or None
        The closing report, which was printed and saved. None in a process that only helps the first
        one with its trainings, see `is_first_process`.

    Raises
    ------
    ValueError, FileNotFoundError
        For whatever is wrong with the configuration, the data or the weights.
    """
    started = time.perf_counter()
    quieten()
    check(cfg)
    with threads(cfg.threads):
        pl.seed_everything(cfg.seed, workers=True, verbose=False)
        job = _Job(cfg, folder, checkpoint)
        if is_first_process():
            job.forget_later()
            job.announce(command)
        dense = job.train_dense()
        sparse, plan = job.prune(dense)
        if not is_first_process():
            return None
        export = job.export(sparse, plan)
        report = job.report(dense, sparse, plan, export, started)
    report.save(folder.path)
    console.print(report.table())
    for remark in report.remarks():
        say(remark)
    key_values(f"Written to {folder}", report.files.items())
    return report


class _Job:
    """What the steps of a run share: configuration, folder, data and the untrained network."""

    def __init__(self, cfg: DictConfig, folder: RunFolder, checkpoint: Path | None) -> None:
        self.cfg = cfg
        self.folder = folder
        self.checkpoint = checkpoint.resolve() if checkpoint else None
        self.data = build_data(cfg)
        self.network = build_network(cfg, self.data, trained=not self._finished("dense"))
        self.pruning: SparsityCallback = build(cfg.sparsity, save_dir=str(folder.path))
        # Now, so that a mistake shows before the dense training.
        self.target = self.pruning.plan_for(self.network).target
        self.teachers = [] if self._finished("sparse") else build_teachers(cfg, self.data)

    def forget_later(self) -> None:
        """Remove what stages left that are gone through again, as a checkpoint before was named.

        An interrupted run would otherwise take it for its own.
        """
        if self.checkpoint is None:
            return
        after = [self.folder.last("dense"), self.folder.checkpoint("dense")]
        after += [self.folder.last("sparse"), self.folder.checkpoint("sparse")]
        for path in after[[path.resolve() for path in after].index(self.checkpoint) + 1 :]:
            path.unlink(missing_ok=True)

    def announce(self, command: str | None) -> None:
        """Print what was decided, and save the command, where it is new, and configuration."""
        cfg, data, folder = self.cfg, self.data, self.folder
        folder.path.mkdir(parents=True, exist_ok=True)
        if command is not None:  # before the configuration, without which nothing goes on
            write_whole(folder.command, command + "\n")
        write_whole(folder.config, OmegaConf.to_yaml(cfg, resolve=True))
        images = [len(loader.source) for loader in (data.train_dataloader(), data.val_dataloader())]
        shape = "x".join(map(str, data.input_shape))
        weights = sum(parameter.numel() for parameter in self.network.parameters())
        pruning = f"to {100 * self.target:.4g} % sparsity in {_epochs(cfg.sparse.epochs)}"
        if is_set(cfg.get("calibration")):
            after = f"then {_epochs(cfg.sparse.epochs)}" if cfg.sparse.epochs else "no training"
            pruning = f"to {100 * self.target:.4g} % sparsity in one shot, {after}"
        if is_set(cfg.get("permutation")):
            pruning += ", channels permuted before"
        if is_set(cfg.distillation) and cfg.sparse.epochs > 0:
            pruning += ", with distillation"
            if self.teachers:
                pruning += f" from {1 + len(self.teachers)} networks"
        rows = {
            "data": f"{type(data).__name__}, {images[0]:,} + {images[1]:,} validation images, "
            f"{shape}, {data.num_classes} classes",
            "network": f"{cfg.model.name}, {weights:,} parameters",
            "dense training": self._dense_source() or _epochs(cfg.dense.epochs),
            "pruning": pruning,
            "seed": str(cfg.seed),
            "folder": str(folder),
        }
        key_values(cfg.name, rows.items())
        _log.info("configuration:\n%s", OmegaConf.to_yaml(cfg, resolve=True))

    def train_dense(self) -> nn.Module:
        """Return the dense network, trained now or before."""
        target = self.folder.checkpoint("dense")
        network = self.network
        if self._finished("dense"):
            load_weights(network, read_weights(target), source=str(target))
            return network.eval()
        if not self._dense_source():
            resume = self._last("dense")
            Stage(self.cfg, "dense", self.folder).fit(network, self.data, resume=resume)
        if is_first_process():
            save_weights(network, target)
        return network.eval()

    def prune(self, dense: nn.Module) -> tuple[nn.Module, Plan]:
        """Return the sparse network, pruned now or before, and what was pruned in it."""
        target = self.folder.checkpoint("sparse")
        network = copy.deepcopy(dense)
        teacher = Ensemble([dense, *self.teachers]) if self.teachers else dense
        if self._finished("sparse"):
            load_weights(network, read_weights(target), source=str(target))
            plan = checkpoint_plan(read_content(target))
            assert plan is not None  # written below, together with the weights
            return network.eval(), plan
        if is_set(self.cfg.get("permutation")):
            self._permute(network)  # a resumed fit puts its own weights over these, in this order
            if is_set(self.cfg.distillation) and self.cfg.distillation.get("features"):
                teacher = copy.deepcopy(network)  # features are compared channel by channel
        callback, resume = self.pruning, self._last("sparse")
        if is_set(self.cfg.get("calibration")) and resume is None and is_first_process():
            # The others are sent masks and weights when the training begins.
            prune_one_shot(self.cfg, network, self.data, callback, self.folder)
        callbacks: list[pl.Callback] = [callback]
        if is_set(self.cfg.batchnorm):
            callbacks.append(build(self.cfg.batchnorm))
        if self.cfg.sparse.epochs > 0:
            Stage(self.cfg, "sparse", self.folder).fit(
                network, self.data, teacher=teacher, callbacks=callbacks, resume=resume
            )
        assert callback.plan is not None  # settled by now
        if is_first_process():
            # The masks and the plan lie where Lightning would put them, for `checkpoint_plan`.
            save_weights(network, target, callbacks={STATE_KEY: callback.state_dict()})
        return network.eval(), callback.plan

    def _permute(self, network: nn.Module) -> None:
        """Reorder the channels of the network for what will be pruned; print and save the gain."""
        if is_first_process():
            say("permuting channels")
        plan = self.pruning.plan_for(network)
        report = build(self.cfg.permutation)(network, plan, self.data.input_shape)
        if is_first_process():
            console.print(report.table())
            report.save(self.folder.path)

    def export(self, sparse: nn.Module, plan: Plan) -> ExportReport:
        """Write the compact file, verified on the validation set."""
        say("exporting, and comparing the file with PyTorch on the validation images")
        images, _ = next(iter(self.data.val_dataloader()))
        return export_file(
            sparse,
            self.folder.model,
            images[: self.cfg.export.images],
            val_loader=self._validation(),
            patterns=plan.patterns(),
            block=export_block(self.cfg),
            classes=self.data.classes,
            preprocessing=self.data.preprocessing,
            provenance={"config": OmegaConf.to_container(self.cfg, resolve=True)},
        )

    def report(
        self,
        dense: nn.Module,
        sparse: nn.Module,
        plan: Plan,
        export: ExportReport,
        started: float,
    ) -> Report:
        """Measure, and put together the closing report."""
        say("measuring")
        cfg, folder = self.cfg, self.folder
        count = cfg.report.threads or torch.get_num_threads()
        images, _ = next(iter(self.data.val_dataloader()))
        sparse_model = read(folder.model)
        load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
        latencies = measure.latencies(
            dense,
            export_model(dense, self.data.input_shape),
            sparse_model,
            images[:1],
            threads=count,
            rounds=cfg.report.rounds,
            min_seconds=cfg.report.min_seconds,
        )
        return Report(
            name=cfg.name,
            command=folder.command.read_text("utf-8").strip() if folder.command.exists() else "",
            seed=cfg.seed,
            sparsity=measure.sparsity_of(plan, sparse),
            accuracy=measure.accuracies(measure.accuracy(dense, self._validation()), export),
            sizes=measure.sizes(folder.checkpoint("dense"), export),
            cost=measure.work(sparse_model),
            latencies=latencies,
            threads=count,
            machine=str(describe_machine(torch=torch.__version__)),
            cores=usable_cores(),
            load=load,
            seconds=time.perf_counter() - started,
            folder=str(folder),
            files=folder.contents(),
        )

    def _validation(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Return the validation batches that count for the report."""
        return islice(self.data.val_dataloader(), self.cfg.export.val_batches)

    def _dense_source(self) -> str | None:
        """Say why there is no dense training, if there is none."""
        if self.cfg.model.weights is not None:
            return f"none, weights from {self.cfg.model.weights}"
        if self.cfg.dense.epochs == 0:
            return "none (dense.epochs=0), random weights"
        return None

    def _finished(self, stage: str) -> bool:
        """Say whether a stage was finished before, and was not asked to be gone through again."""
        wanted = self.folder.checkpoint(stage)
        if self.checkpoint is None:
            return wanted.exists()
        # A checkpoint was named: stages before its own are done, its own and later ones are not.
        return stage == "dense" and self.checkpoint != self.folder.last("dense").resolve()

    def _last(self, stage: str) -> Path | None:
        """Return the checkpoint that a stage goes on from, if there is one."""
        last = self.folder.last(stage)
        if self.checkpoint is None:
            return last if last.exists() else None
        return last if self.checkpoint == last.resolve() else None


def _epochs(count: int) -> str:
    return f"{count} epoch{'' if count == 1 else 's'}"
