"""Whether each value of a configuration is of the kind that what reads it takes.

What a group describes by ``_target_`` says so itself, in the type hints of its constructor; the
kinds of all other keys are listed here.
"""

from __future__ import annotations

import inspect
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.utils import get_object
from omegaconf import DictConfig, OmegaConf

__all__ = ["EXPORT_KINDS", "check_added", "check_values"]

TARGET = "_target_"
# By full key: what no constructor takes, or what may be left out here.
KINDS: Mapping[str, Any] = {
    "name": str,
    "seed": int,
    "threads": int | None,
    "resume": str | None,
    "channels_last": bool,
    "compile_steps": bool,
    **{f"{stage}.epochs": int for stage in ("dense", "sparse")},
    **{f"{stage}.label_smoothing": float for stage in ("dense", "sparse")},
    "export.block": Any,  # what reads it says more
    "export.images": int,
    "export.val_batches": int | None,
    "report.threads": int | None,
    "report.rounds": int,
    "report.min_seconds": float,
    "paths.runs": str,
    "task.name": str,
    "task.levels": Sequence[float],
    "task.images": int,
    "task.batchnorm_batches": int,
    "task.scan": str | None,
    "task.milliseconds": float | None,
    "task.speedup": float | None,
    "task.min_sparsity": float | None,
    "task.min_flops_cut": float | None,
}
# Those of ``configs/export.yaml``, where ``report`` is a file.
EXPORT_KINDS: Mapping[str, Any] = {
    "run": str | None,
    "checkpoint": str | None,
    "output": str | None,
    "report": str | None,
    "input_shape": Any,
    "num_classes": int,
    "seed": int,
    "model.name": str | None,
    **{key: kind for key, kind in KINDS.items() if key.startswith(("export.", "paths."))},
}
WORDS = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "a text",
    Path: "a text",
    NoneType: "null",
}


def check_values(cfg: DictConfig, kinds: Mapping[str, Any] = KINDS) -> None:
    """Refuse values of another kind than what reads them takes, such as ``seed=abc``.

    Parameters
    ----------
    cfg
        The whole configuration, no value of it missing. Keys that nothing reads pass: a
        configuration may have some for others to refer to.
    kinds
        Types of the keys that belong to no ``_target_``.

    Raises
    ------
    ValueError
        At such a value, naming its key and what is expected.
    """
    wrong = [
        (key, value, kind)
        for key, value, kind in _leaves(cfg, kinds)
        if kind is not None and not _takes(kind, value)
    ]
    if wrong:
        # What was typed, not what refers to it: ``seed``, not ``data.seed``.
        key, value, kind = min(wrong, key=lambda each: each[0].count("."))
        shown = json.dumps(value) if isinstance(value, bool | None) else value
        raise ValueError(f"{key}={shown}: {_words(kind)} is expected")


def check_added(
    cfg: DictConfig, overrides: Sequence[str], kinds: Mapping[str, Any] = KINDS
) -> None:
    """Refuse keys that the command line adds (``+key=value``) and nothing reads.

    Parameters
    ----------
    cfg
        The whole configuration.
    overrides
        What was typed.
    kinds
        Types of the keys that belong to no ``_target_``.

    Raises
    ------
    ValueError
        Naming the first of them.
    """
    unread = [key for key, _, kind in _leaves(cfg, kinds) if kind is None]
    for override in OverridesParser.create().parse_overrides(list(overrides)):
        if not (override.is_add() or override.is_force_add()):
            continue
        key = override.key_or_group
        if any(name == key or name.startswith(f"{key}.") for name in unread):
            raise ValueError(
                f"{override.input_line}: nothing reads {key}. Mend its name: --cfg job prints all "
                "keys there are"
            )


def _leaves(cfg: DictConfig, kinds: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """Return each key with its value and the type that is wanted, None where nothing reads it."""
    plain = OmegaConf.to_container(cfg, resolve=True)
    assert isinstance(plain, dict)
    return list(_walk(plain, kinds))


def _walk(
    node: Mapping[Any, Any], kinds: Mapping[str, Any], prefix: str = "", other: Any = None
) -> Iterator[tuple[str, Any, Any]]:
    """Yield what `_leaves` returns; ``other`` is the type of keys that are not known."""
    hints: Mapping[str, Any] = {}
    if TARGET in node:
        hints, other = _hints(node[TARGET]), Any  # from here on down, all keys are its business
    for name, value in node.items():
        key = f"{prefix}{name}"
        if isinstance(value, dict):
            yield from _walk(value, kinds, f"{key}.", other)
        else:
            yield key, value, kinds.get(key, hints.get(name, other))


def _hints(target: str) -> dict[str, Any]:
    """Return the types of the arguments of what ``target`` names; none if that is not known."""
    try:
        described = get_object(target)
        return get_type_hints(described.__init__ if inspect.isclass(described) else described)
    except (ImportError, AttributeError, TypeError, NameError, ValueError):
        return {}  # building it says what is wrong


def _takes(kind: Any, value: Any) -> bool:
    """Say whether a value of YAML may be given where ``kind`` is wanted."""
    origin, inner = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        return any(_takes(each, value) for each in inner)
    if origin is Literal:
        return value in inner
    if origin in (Sequence, list):
        return isinstance(value, list) and all(_takes(inner[0], each) for each in value)
    if kind in (int, float):
        number = isinstance(value, (int, kind)) and not isinstance(value, bool)
        return number and math.isfinite(value)
    if kind is Path:
        return isinstance(value, str)
    return isinstance(value, kind) if kind in WORDS else True


def _words(kind: Any) -> str:
    """Return a type in words."""
    origin, inner = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        choices = [
            value for each in inner if get_origin(each) is Literal for value in get_args(each)
        ]
        others = [each for each in inner if get_origin(each) is not Literal]
        words = [f"one of {', '.join(dict.fromkeys(map(str, choices)))}"] if choices else []
        words += map(_words, sorted(others, key=lambda each: each is NoneType))
        return " or ".join(dict.fromkeys(words))
    if origin is Literal:
        return f"one of {', '.join(map(str, inner))}"
    if origin is not None:
        return f"a list, each {_words(inner[0])}," if inner else "a list"
    return WORDS.get(kind, getattr(kind, "__name__", str(kind)))
