"""Networks by name: torchvision's classification models and the CIFAR ResNets."""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torchvision
from torch import Tensor, nn

from blocksparse.training.resnet_cifar import ResNetCifar
from blocksparse.training.weights import SUFFIXES, WeightsError, load_weights, read_weights

# : Blocks per stage of the CIFAR ResNets by name. (torchvision's resnet18, 34, 50, 101 and 152 are
# the ImageNet ones.)
CIFAR_RESNETS = {
    "resnet8": 1,
    "resnet14": 2,
    "resnet20": 3,
    "resnet32": 5,
    "resnet44": 7,
    "resnet56": 9,
    "resnet110": 18,
}


def model_names() -> list[str]:
    """List the names `build_model` knows."""
    return sorted([*CIFAR_RESNETS, *torchvision.models.list_models(module=torchvision.models)])


def build_model(
    name: str,
    *,
    num_classes: int,
    input_shape: tuple[int, int, int] = (3, 224, 224),
    weights: str | Path | None = None,
    new_classifier: bool = False,
    widths: Sequence[int] | None = None,
    options: Mapping[str, Any] | None = None,
) -> nn.Module:
    """Build a network, and load its weights if asked.

    Parameters
    ----------
    name : str
        One of `model_names()`.
    num_classes : int
        Number of logits.
    input_shape : (C, H, W)
        Shape of one image.
    weights : str or path, optional
        A `.pth`, `.pt`, `.ckpt` or `.safetensors` file (see `read_weights`), or the name of one of
        torchvision's pretrained weights such as `IMAGENET1K_V2` or
        `ResNet50_Weights.IMAGENET1K_V2`, which are downloaded. None: random weights.
    new_classifier : bool
        Leave out the weights of layers that end in the classes where the file has another number of
        classes.
    widths : three ints, optional
        Channels of a CIFAR ResNet's stages, if not 16, 32, 64.
    options : mapping, optional
        Further keyword arguments of torchvision's model function, such as `dropout`.

    Returns
    -------
    nn.Module
        In training mode. Inception V3 and GoogLeNet return their auxiliary logits too in that mode,
        as in torchvision.

    Raises
    ------
    ValueError
        The name is unknown, or the network cannot take such images.
    WeightsError
        The weights cannot be had or do not fit.
    FileNotFoundError
        The weights file is not there.
    """
    if name in CIFAR_RESNETS:
        if options:
            raise ValueError(f"{name} takes no model.options; its knob is model.widths")
        model: nn.Module = ResNetCifar(
            CIFAR_RESNETS[name], num_classes, input_shape[0], widths or (16, 32, 64)
        )
    else:
        _check_torchvision(name, input_shape, widths)
        options = dict(options or {})
        if weights is not None and not _is_file(weights):
            return _pretrained(name, num_classes, str(weights), new_classifier, options)
        if weights is not None and "init_weights" in _parameters(name):
            options.setdefault("init_weights", False)  # they are about to be overwritten
        model = torchvision.models.get_model(name, num_classes=num_classes, **options)
    if weights is not None:
        if not _is_file(weights):
            raise WeightsError(
                f"model.weights={weights}: {name} is not torchvision's, so it has no weights to "
                f"download; give a file named {', '.join(SUFFIXES)}"
            )
        state = read_weights(weights)
        if new_classifier:
            state = _keep_classifier(state, model, num_classes)
        load_weights(model, state, source=str(weights))
    return model


def _is_file(weights: str | Path) -> bool:
    # Enum names have no suffix but may have a dot: "ResNet50_Weights.DEFAULT".
    return isinstance(weights, Path) or Path(weights).suffix in SUFFIXES or "/" in weights


def _check_torchvision(
    name: str, input_shape: tuple[int, int, int], widths: Sequence[int] | None
) -> None:
    if name not in torchvision.models.list_models(module=torchvision.models):
        near = difflib.get_close_matches(name, model_names(), n=4, cutoff=0.5)
        hint = f"did you mean {', '.join(near)}?" if near else "see torchvision's documentation"
        raise ValueError(
            f"model.name={name} is no classification model of torchvision and no CIFAR ResNet "
            f"({', '.join(CIFAR_RESNETS)}): {hint}"
        )
    if widths is not None:
        raise ValueError(f"{name} has fixed widths; model.widths is for {', '.join(CIFAR_RESNETS)}")
    if input_shape[0] != 3:
        raise ValueError(
            f"{name} takes images of 3 channels, the data has {input_shape[0]}: choose one of "
            f"{', '.join(CIFAR_RESNETS)}, or set data.channels=3 where the data has that key"
        )


def _parameters(name: str) -> Mapping[str, inspect.Parameter]:
    """Return the parameters of the class behind torchvision's model function, where it has one."""
    module = inspect.getmodule(torchvision.models.get_model_builder(name))
    classes = [c for c in vars(module).values() if inspect.isclass(c) and issubclass(c, nn.Module)]
    found: dict[str, inspect.Parameter] = {}
    for cls in classes:
        found.update(inspect.signature(cls).parameters)
    return found


def _pretrained(
    name: str, num_classes: int, weights: str, new_classifier: bool, options: dict[str, Any]
) -> nn.Module:
    known = torchvision.models.get_model_weights(name)
    member = weights.rsplit(".", 1)[-1]
    if member not in known.__members__:
        raise WeightsError(
            f"model.weights={weights}: {name} has {', '.join(known.__members__)}; or give a file "
            f"named {', '.join(SUFFIXES)}"
        )
    enum = known[member]
    try:
        model = torchvision.models.get_model(name, weights=enum, progress=False, **options)
    except (OSError, RuntimeError) as error:
        raise WeightsError(
            f"model.weights={weights}: downloading {enum.url} failed ({error}). Fetch that file "
            "where there is a network, and set model.weights to its path"
        ) from error
    trained_for = len(enum.meta["categories"])
    if num_classes == trained_for:
        return model.train()
    # The two networks with auxiliary heads differ in these when they come with weights.
    for key in ("transform_input", "aux_logits"):
        if hasattr(model, key):
            options.setdefault(key, getattr(model, key))
    fresh = torchvision.models.get_model(name, num_classes=num_classes, **options)
    state = model.state_dict()
    if new_classifier:
        state = _keep_classifier(state, fresh, num_classes)
    load_weights(fresh, state, source=f"{enum}")
    return fresh


def _keep_classifier(
    state: Mapping[str, Tensor], model: nn.Module, num_classes: int
) -> dict[str, Tensor]:
    """Replace entries that differ from the model's in the number of classes alone."""
    own = model.state_dict()
    kept = dict(state)
    for name, value in state.items():
        mine = own.get(name)
        if (
            mine is not None
            and mine.shape != value.shape
            and mine.shape[:1] == (num_classes,)
            and mine.shape[1:] == value.shape[1:]
        ):
            kept[name] = mine
    return kept
