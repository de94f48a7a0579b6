"""From configuration to objects, with errors that say what to change."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig, ListConfig, OmegaConf
from torch import nn

from blocksparse.pipeline.values import check_values
from blocksparse.training import Classifier, ImageData, build_model

__all__ = [
    "build",
    "build_data",
    "build_network",
    "build_teachers",
    "check",
    "check_export",
    "export_block",
    "is_first_process",
    "is_set",
    "threads",
]


def is_set(node: Any) -> bool:
    """Say whether a group was chosen: its ``none`` option leaves it empty."""
    return isinstance(node, DictConfig) and "_target_" in node


def build(node: DictConfig, **arguments: Any) -> Any:
    """Instantiate what a group describes.

    Hydra wraps every error of a constructor into its own, whose text is a page long; the error
    itself is what a user needs.
    """
    try:
        return instantiate(node, _convert_="all", **arguments)
    except InstantiationException as error:
        cause = error.__cause__
        if isinstance(cause, TypeError):  # an argument it does not have, or of another kind
            raise ValueError(f"configuration of {node._target_}: {cause}") from error
        if isinstance(cause, Exception):
            raise cause from error
        raise


def build_data(cfg: DictConfig) -> ImageData:
    """Return the data module, its data read, so that a missing folder shows before training."""
    data: ImageData = build(cfg.data)
    data.prepare_data()
    data.setup()
    return data


def build_network(cfg: DictConfig, data: ImageData, trained: bool = True) -> nn.Module:
    """Return the network for this data, with the weights that the configuration names.

    Parameters
    ----------
    cfg
        The whole configuration.
    data
        Gives the shape of an image and the number of classes.
    trained
        Whether weights from a file are wanted; else it need not be there.

    Raises
    ------
    ValueError
        The network cannot be trained on images of this size.
    """
    model = cfg.model
    if not trained:
        model = OmegaConf.merge(model, {"weights": None})
    network: nn.Module = build(model, num_classes=data.num_classes, input_shape=data.input_shape)
    _try_images(network, cfg, data.input_shape)
    return network


def build_teachers(cfg: DictConfig, data: ImageData) -> list[nn.Module]:
    """Return the trained networks that are followed besides the dense one.

    Raises
    ------
    ValueError, FileNotFoundError
        One of them cannot be built, its weights cannot be read, or it cannot take these images.
    """
    described = build(cfg.distillation).teachers if is_set(cfg.distillation) else ()
    teachers = []
    for place, options in enumerate(described):
        try:
            teacher = build_model(
                num_classes=data.num_classes, input_shape=data.input_shape, **options
            )
            with torch.no_grad():
                teacher.eval()(torch.zeros(1, *data.input_shape))
        except (FileNotFoundError, RuntimeError, TypeError, ValueError) as error:
            key = f"distillation.teachers[{place}]"
            reason = str(error).strip().split("\n")[0].replace("model.", f"{key}.")
            kind = FileNotFoundError if isinstance(error, FileNotFoundError) else ValueError
            raise kind(reason if key in reason else f"{key}: {reason}") from error
        teachers.append(teacher)
    return teachers


def _try_images(network: nn.Module, cfg: DictConfig, shape: tuple[int, int, int]) -> None:
    """Raise ValueError if a step of training would fail because of the size of the images.

    A copy is tried, as a step changes batch norm; in training mode, where auxiliary classifiers run
    as well.
    """
    trial = copy.deepcopy(network).train()
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[]):
            trial(torch.zeros(2, *shape))
    except (RuntimeError, ValueError, AssertionError) as error:
        size = "x".join(map(str, shape))
        keys = [f"data.{key}" for key in ("size", "input_shape") if key in cfg.data]
        mend = f"Set {keys[0]} to the size of its images" if keys else "Choose data of another size"
        reason = str(error).strip().split("\n")[0]
        raise ValueError(
            f"model.name={cfg.model.name} cannot take images of {size}: {reason}. {mend}, or "
            "choose another model.name"
        ) from error


def is_first_process() -> bool:
    """Say whether this process is the one that reports, of those that train together.

    With ``trainer.devices`` above 1 Lightning starts the same command again for each further
    device, and each takes part in the trainings; the first alone writes and prints.
    """
    return getattr(rank_zero_only, "rank", 0) == 0


def check_export(cfg: DictConfig) -> None:
    """Refuse what the export is bound to fail at.

    Raises
    ------
    ValueError
        If no image is left to verify on, or the block is none.
    """
    if cfg.export.images < 1:
        raise ValueError(
            f"export.images={cfg.export.images}: at least one image is needed to verify the file"
        )
    export_block(cfg)


def export_block(cfg: DictConfig) -> tuple[int, int] | None:
    """Return the block shape that ``export.block`` asks for, None for that of the pruning.

    Raises
    ------
    ValueError
        If it is not two positive numbers.
    """
    sides = cfg.export.block
    if sides is None:
        return None
    if (
        not isinstance(sides, ListConfig)
        or len(sides) != 2
        or not all(isinstance(side, int) and side > 0 for side in sides)
    ):
        raise ValueError(f"export.block={sides}: give rows and columns, such as [8,8]")
    return (sides[0], sides[1])


@contextmanager
def threads(count: int | None) -> Iterator[None]:
    """Give PyTorch `count` CPU threads for a while; None: as many as it has."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)  # a sweep goes on in this process


def check(cfg: DictConfig) -> None:
    """Refuse what is bound to fail later, before anything is written.

    Raises
    ------
    ValueError
        For a missing value, one that cannot be, or an accelerator that is not there.
    """
    missing = sorted(OmegaConf.missing_keys(cfg))
    if missing:
        raise ValueError(
            f"{', '.join(missing)}: no value given. Set it on the command line, "
            f"such as {missing[0]}=VALUE"
        )
    check_values(cfg)
    if not str(cfg.name).strip():
        raise ValueError("name=: give the run a name, the folder below runs/ that it goes to")
    if not 0 <= cfg.seed < 2**32:
        raise ValueError(f"seed={cfg.seed}: 0 to {2**32 - 1}")
    accelerator = cfg.trainer.accelerator
    if accelerator in ("gpu", "cuda") and not torch.cuda.is_available():
        raise ValueError(
            f"trainer.accelerator={accelerator}, but PyTorch {torch.__version__} sees no GPU here. "
            "Drop trainer=gpu (or set trainer.accelerator=cpu), or install a build of PyTorch for "
            "your GPU: https://pytorch.org/get-started"
        )
    if accelerator == "mps" and not torch.backends.mps.is_available():
        raise ValueError(
            "trainer.accelerator=mps, but this machine has none; set trainer.accelerator=cpu"
        )
    if cfg.threads is not None and cfg.threads < 1:
        raise ValueError(f"threads={cfg.threads}: at least 1, or null for one per core")
    if cfg.dense.epochs < 0 or cfg.sparse.epochs < (0 if is_set(cfg.get("calibration")) else 1):
        raise ValueError(
            f"dense.epochs={cfg.dense.epochs}, sparse.epochs={cfg.sparse.epochs}: dense training "
            "takes 0 epochs or more, pruning at least 1, or 0 in one shot (calibration=obs)"
        )
    if cfg.export.val_batches is not None and cfg.export.val_batches < 1:
        raise ValueError(
            f"export.val_batches={cfg.export.val_batches}: the report needs the accuracy on at "
            "least 1 batch; null takes all"
        )
    if is_set(cfg.get("calibration")) and cfg.sparsity.backward == "straight_through":
        raise ValueError(
            "calibration makes masks that are final before the training, so nothing is left for "
            "sparsity.backward=straight_through to learn: leave one of the two"
        )
    check_export(cfg)
    passes = OmegaConf.select(cfg, "permutation.passes")
    if passes is not None and passes < 1:
        raise ValueError(f"permutation.passes={passes}: at least 1")
    # Their constructors know what may be set.
    for name in ("dense.optimizer", "sparse.optimizer", "batchnorm", "calibration"):
        node = OmegaConf.select(cfg, name)
        if is_set(node):
            build(node)
    distillation = build(cfg.distillation) if is_set(cfg.distillation) else None
    for stage in ("dense", "sparse"):
        Classifier(
            nn.Identity(),
            label_smoothing=cfg[stage].label_smoothing,
            distillation=distillation,
            teacher=nn.Identity(),
            compile_steps=cfg.get("compile_steps", False),
        )
