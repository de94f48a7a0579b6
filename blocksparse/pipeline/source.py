"""What ``export.py`` exports: a run, or a checkpoint from anywhere."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf
from torch import nn

from blocksparse.pipeline.folders import RunFolder
from blocksparse.pipeline.setup import build, build_data, build_network, is_set
from blocksparse.training import ImageData, load_weights, read_weights
from blocksparse.training.weights import SUFFIXES

__all__ = ["Source", "find"]


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


def find(cfg: DictConfig) -> Source:
    """Find what a configuration of ``export.py`` names, and load its weights.

    Parameters
    ----------
    cfg : DictConfig
        See ``configs/export.yaml``.

    Raises
    ------
    FileNotFoundError
        There is no such run, checkpoint or data.
    ValueError
        The configuration or the weights cannot be used; the text says why.
    """
    return _run_source(cfg) if _is_run(cfg) else _checkpoint_source(cfg)


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
    config = folder.read_config()
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
