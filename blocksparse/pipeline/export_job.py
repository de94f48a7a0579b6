"""One run of ``export.py``: from a run or a checkpoint to a verified file, and what was done."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig
from rich.table import Table
from torch import Tensor

from blocksparse.export import ExportReport, export_file
from blocksparse.pipeline.console import console, key_values, say
from blocksparse.pipeline.setup import check_export, export_block
from blocksparse.pipeline.source import Source, find
from blocksparse.pipeline.values import EXPORT_KINDS, check_added, check_values
from blocksparse.sparsity import Pattern, checkpoint_patterns
from blocksparse.training.weights import read_content

__all__ = ["run"]


def run(cfg: DictConfig) -> ExportReport:
    """Export what `cfg` names.

    Parameters
    ----------
    cfg : DictConfig
        See ``configs/export.yaml``.

    Returns
    -------
    ExportReport
        The report, which was printed.

    Raises
    ------
    FileNotFoundError
        There is no such run, checkpoint or data.
    ValueError
        The configuration, the weights or the network cannot be used; the text says why.
    """
    check_values(cfg, EXPORT_KINDS)
    if HydraConfig.initialized():
        check_added(cfg, HydraConfig.get().overrides.task, EXPORT_KINDS)
    check_export(cfg)
    block = export_block(cfg)
    source = find(cfg)
    data = source.data
    images, origin = _images(source, cfg.export.images, cfg.seed)
    say(f"{source.checkpoint}: exporting, and comparing with PyTorch on {origin}")
    report = export_file(
        source.network,
        cfg.output or source.output,
        images,
        val_loader=islice(data.val_dataloader(), cfg.export.val_batches) if data else None,
        patterns=_patterns(source.checkpoint),
        block=block,
        classes=data.classes if data else None,
        preprocessing=data.preprocessing if data else None,
        provenance={"checkpoint": source.checkpoint.name, "config": source.config},
        report_path=cfg.report,
    )
    _print(report, origin)
    return report


def _images(source: Source, count: int, seed: int) -> tuple[Tensor, str]:
    """Return images to compare on, and in words where they are from."""
    if source.data is not None:
        images, _ = next(iter(source.data.val_dataloader()))
        return images[:count], f"{len(images[:count])} validation images"
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(count, *source.input_shape, generator=generator)
    return images, f"{count} random images, as no data was named (data=...)"


def _patterns(checkpoint: Path) -> dict[str, Pattern]:
    """Return what the checkpoint says its weights were pruned to, maybe nothing."""
    if checkpoint.suffix == ".safetensors":
        return {}
    return checkpoint_patterns(read_content(checkpoint))


def _print(report: ExportReport, origin: str) -> None:
    rows = report.table()
    table = Table(box=None, header_style="bold", pad_edge=False)
    for title in rows[0]:
        number = title in ("density", "bytes")
        table.add_column(title, justify="right" if number else "left", overflow="fold")
    for row in rows:
        table.add_row(*row.values())
    console.print(table)
    check = report.verification
    facts = {
        "verified on": origin,
        "logits": f"within {check.max_error:.2g} of PyTorch's, {check.tolerance:.2g} allowed, at a "
        f"largest logit of {check.max_logit:.3g}",
        "top class": f"the same for {check.same_argmax} of {check.images} images",
        "run by": check.engine,
    }
    if check.accuracy_torch is not None and check.accuracy_runtime is not None:
        facts["accuracy"] = (
            f"{check.accuracy_torch:.2%} in PyTorch, {check.accuracy_runtime:.2%} of the file, on "
            f"{check.val_images:,} validation images"
        )
    if report.flushed:
        facts["flushed"] = f"{report.flushed:,} values below the smallest normal number, to zero"
    key_values(f"Written to {report.path}", facts.items())
