"""Export a run, or any dense-with-zeros checkpoint, to one compact file, verified.

``python export.py --help`` lists what can be set; ``configs/export.yaml`` is where it starts.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import hydra
from omegaconf import DictConfig, ListConfig, OmegaConf
from rich.table import Table
from rich.text import Text

from blocksparse.pipeline.console import console, key_values, say
from blocksparse.pipeline.folders import RunFolder

if TYPE_CHECKING:
    from torch import Tensor, nn

    from blocksparse.export import ExportReport
    from blocksparse.sparsity import Pattern
    from blocksparse.training import ImageData


@dataclass(frozen=True)
class Source:
    """What is exported.

    Attributes
    ----------
    network : nn.Module
        With its weights.
    input_shape : tuple of int
        ``(C, H, W)``.
    data : ImageData or None
        Real images, where they are known.
    checkpoint : Path
        Where the weights came from.
    output : Path
        Where the file goes by default.
    config : dict
        How the network was made, for the file's provenance.
    """

    network: nn.Module
    input_shape: tuple[int, int, int]
    data: ImageData | None
    checkpoint: Path
    output: Path
    config: dict[str, Any]


@hydra.main(version_base="1.3", config_path="configs", config_name="export")
def main(cfg: DictConfig) -> None:
    """Export what `cfg` names, and print what was done."""
    try:
        run(cfg)
    except (ValueError, OSError) as error:
        console.print(Text.assemble(("error: ", "bold red"), str(error)), soft_wrap=True)
        sys.exit(1)


def run(cfg: DictConfig) -> ExportReport:
    """Export what `cfg` names.

    Parameters
    ----------
    cfg : DictConfig
        See ``configs/export.yaml``.

    Returns
    -------
    ExportReport

    Raises
    ------
    FileNotFoundError
        There is no such run, checkpoint or data.
    ValueError
        The configuration, the weights or the network cannot be used; the text says why.
    """
    from blocksparse.export import export_file

    block = None if cfg.export.block is None else _block(cfg.export.block)
    if cfg.export.images < 1:
        raise ValueError(
            f"export.images={cfg.export.images}: at least one image is needed to verify the file"
        )
    source = _run_source(cfg) if _is_run(cfg) else _checkpoint_source(cfg)
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


def _is_run(cfg: DictConfig) -> bool:
    """Say whether a run is named, by its folder, a checkpoint in it, or by default."""
    if cfg.run is not None or cfg.checkpoint is None:
        return True
    return cfg.model.name is None and _folder_of(Path(cfg.checkpoint)).config.is_file()


def _folder_of(checkpoint: Path) -> RunFolder:
    return RunFolder(checkpoint.resolve().parent.parent)


def _same(path: Path, other: Path) -> bool:
    return path.resolve() == other.resolve()


def _beside(checkpoint: Path) -> Path:
    return checkpoint.with_suffix(".bsr.safetensors")


def _run_source(cfg: DictConfig) -> Source:
    from blocksparse.pipeline.setup import build_data, build_network
    from blocksparse.training import load_weights, read_weights
    from blocksparse.training.weights import SUFFIXES

    if cfg.run is not None:
        folder = RunFolder(Path(cfg.run))
    elif cfg.checkpoint is not None:
        folder = _folder_of(Path(cfg.checkpoint))
    else:
        folder = _latest(Path(cfg.paths.runs))
    pruned = folder.checkpoint("sparse")
    checkpoint = Path(cfg.checkpoint) if cfg.checkpoint else pruned
    if not folder.path.is_dir():
        raise FileNotFoundError(
            f"run={folder.path}: there is no such folder. Name the folder of a finished run, "
            f"{cfg.paths.runs}/NAME/TIME"
        )
    if not folder.config.is_file():
        raise FileNotFoundError(
            f"run={folder.path}: its configuration config.yaml is not there"
            + _listing(folder.path, "that folder holds")
            + f". Name the folder of a finished run, {cfg.paths.runs}/NAME/TIME"
        )
    if cfg.checkpoint is None and not pruned.is_file():
        raise FileNotFoundError(
            f"run={folder.path}: its pruned network {pruned.name} is not there"
            + _listing(pruned.parent, "that folder holds")
            + ". Name the folder of a finished run, or go on with this one: "
            f"python train.py resume={folder.path}"
        )
    config = OmegaConf.load(folder.config)
    assert isinstance(config, DictConfig)
    data = build_data(config)
    # The weights it started from are not needed, and a file may be gone. The name of weights of
    # torchvision stays: with it, two networks transform their input.
    if config.model.weights is not None and Path(config.model.weights).suffix in SUFFIXES:
        config.model.weights = None
    network = build_network(config, data)
    state = read_weights(checkpoint, key="checkpoint")
    load_weights(
        network,
        state,
        source=str(checkpoint),
        other_classes=f"name a checkpoint of the run {folder.path}, or leave out run= and give "
        "model.name and num_classes={theirs}",
    )
    return Source(
        network=network,
        input_shape=data.input_shape,
        data=data,
        checkpoint=checkpoint,
        # The run's file is its pruned network; another of its checkpoints gets a file of its own.
        output=folder.model if _same(checkpoint, pruned) else _beside(checkpoint),
        config=_plain(config),
    )


def _latest(runs: Path) -> RunFolder:
    """Return the run below `runs` whose pruning was finished last."""
    finished = [path for path in runs.rglob("sparse.ckpt") if _folder_of(path).config.is_file()]
    if not finished:
        raise FileNotFoundError(
            f"{runs}: no finished run below this folder"
            + _listing(runs, "it holds")
            + ". Train one (python train.py), name one (run=FOLDER), or export weights from "
            "elsewhere (checkpoint=FILE model.name=NAME)"
        )
    return RunFolder(max(finished, key=lambda path: path.stat().st_mtime).parent.parent)


def _listing(folder: Path, verb: str) -> str:
    if not folder.is_dir():
        return f" ({folder} does not exist)"
    names = sorted(entry.name for entry in folder.iterdir())
    shown = ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
    return f" ({verb} {shown or 'nothing'})"


def _checkpoint_source(cfg: DictConfig) -> Source:
    from blocksparse.pipeline.setup import build, build_data, is_set
    from blocksparse.training import load_weights, read_weights

    checkpoint = Path(cfg.checkpoint)
    if not checkpoint.is_file():
        raise FileNotFoundError(f"checkpoint={checkpoint}: there is no such file")
    if cfg.model.name is None:
        raise ValueError(
            f"checkpoint={checkpoint}: say which network it belongs to, such as "
            "model.name=resnet50 (and num_classes=N, input_shape=[3,H,W] where they are not 1000 "
            "and [3,224,224])"
        )
    state = read_weights(checkpoint, key="checkpoint")
    data = build_data(cfg) if is_set(cfg.get("data")) else None
    shape = data.input_shape if data else _shape(cfg.input_shape)
    classes = data.num_classes if data else cfg.num_classes
    network = build(cfg.model, num_classes=classes, input_shape=shape, weights=None)
    load_weights(
        network,
        state,
        source=str(checkpoint),
        other_classes="choose the data it was trained with, or none"
        if data
        else "set num_classes={theirs}",
    )
    return Source(
        network=network,
        input_shape=shape,
        data=data,
        checkpoint=checkpoint,
        output=_beside(checkpoint),
        config={"model": _plain(cfg.model), "input_shape": list(shape), "num_classes": classes},
    )


def _plain(cfg: DictConfig) -> dict[str, Any]:
    plain = OmegaConf.to_container(cfg, resolve=True)
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items()}


def _images(source: Source, count: int, seed: int) -> tuple[Tensor, str]:
    """Return images to compare on, and in words where they are from."""
    import torch

    if source.data is not None:
        images, _ = next(iter(source.data.val_dataloader()))
        return images[:count], f"{len(images[:count])} validation images"
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(count, *source.input_shape, generator=generator)
    return images, f"{count} random images, as no data was named (data=...)"


def _patterns(checkpoint: Path) -> dict[str, Pattern]:
    """Return what the checkpoint says its weights were pruned to, maybe nothing."""
    import torch

    from blocksparse.sparsity import checkpoint_patterns

    if checkpoint.suffix == ".safetensors":
        return {}
    content = torch.load(checkpoint, map_location="cpu", weights_only=True)
    return checkpoint_patterns(content)


def _shape(sides: Any) -> tuple[int, int, int]:
    if (
        not isinstance(sides, ListConfig)
        or len(sides) != 3
        or not all(isinstance(side, int) and side > 0 for side in sides)
    ):
        raise ValueError(
            f"input_shape={sides}: must be [C,H,W], channels, height and width of one image, such "
            "as [3,224,224]"
        )
    return (sides[0], sides[1], sides[2])


def _block(sides: Any) -> tuple[int, int]:
    if (
        not isinstance(sides, ListConfig)
        or len(sides) != 2
        or not all(isinstance(side, int) and side > 0 for side in sides)
    ):
        raise ValueError(f"export.block={sides}: give rows and columns, such as [8,8]")
    return (sides[0], sides[1])


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


if __name__ == "__main__":
    main()
