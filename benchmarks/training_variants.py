"""The variants of a training step that are compared, and its parts."""

from __future__ import annotations

from dataclasses import dataclass

PARTS = (
    "make the batch",
    "teacher's forward",
    "forward and loss",
    "backward",
    "optimizer",
    "masks",
)


@dataclass(frozen=True)
class Variant:
    """One way to take a step.

    Attributes
    ----------
    name : str
        What it is called.
    channels_last : bool
        Networks and images channels innermost, as with ``channels_last=true``.
    autocast : bool
        Convolutions and linear layers in bfloat16, as with ``trainer.precision=bf16-mixed``.
    compiled : bool
        Network and teacher through `torch.compile`; no setting of `train.py` does that.
    from_files : bool
        Images decoded anew for every step, as with ``data.in_memory=false data.num_workers=0``.
    teacher : bool
        Off, as with ``distillation=none``.
    deterministic : bool
        Off, as with ``trainer.deterministic=false``. On, PyTorch fills all memory that it takes.
    """

    name: str
    channels_last: bool = False
    autocast: bool = False
    compiled: bool = False
    from_files: bool = False
    teacher: bool = True
    deterministic: bool = True


BASELINE = Variant("contiguous")
OTHERS = (
    Variant("channels-last", channels_last=True),
    Variant("bf16", autocast=True),
    Variant("compile", compiled=True),
    Variant("decoded-each-time", from_files=True),
    Variant("no-teacher", teacher=False),
    Variant("not-deterministic", deterministic=False),
    Variant("channels-last-bf16", channels_last=True, autocast=True),
    Variant("channels-last-compile", channels_last=True, compiled=True),
)
