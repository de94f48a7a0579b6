"""Training steps: the variants that are compared, their parts, and what comes out."""

from __future__ import annotations

from dataclasses import dataclass

from blocksparse.perf import Timing

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
        Network and teacher through `torch.compile`, as with ``compile_steps=true``.
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
    Variant("channels-last-bf16-compile", channels_last=True, autocast=True, compiled=True),
)


@dataclass(frozen=True)
class Row:
    """What one variant took.

    Attributes
    ----------
    name : str
        Of the variant.
    timing : Timing
        Milliseconds per step.
    cpu : Timing
        Milliseconds that all threads computed, which other programs hardly change.
    parts : mapping of str to Timing
        Milliseconds of each of `PARTS`.
    """

    name: str
    timing: Timing
    cpu: Timing
    parts: dict[str, Timing]


@dataclass(frozen=True)
class Result:
    """Everything the page says.

    Attributes
    ----------
    model, image, side, batch, threads
        What was measured: network, height and width of its input and of the image files in pixels,
        images of a step, threads of PyTorch.
    date, machine, command : str
        When, where, and the command line that does it again.
    rows : tuple of Row
        One per variant, the one that all are compared with first.
    decoding : Timing
        Milliseconds to decode the files of one batch, and nothing else.
    left_out : tuple of str
        One line per variant that did not take part.
    """

    model: str
    image: int
    side: int
    batch: int
    threads: int
    date: str
    machine: str
    command: str
    rows: tuple[Row, ...]
    decoding: Timing
    left_out: tuple[str, ...]

    @property
    def name(self) -> str:
        """File name of the results; the same on every machine."""
        parts = (f"training-{self.model}", f"image{self.image}", f"batch{self.batch}")
        return "-".join([*parts, f"threads{self.threads}"])

    def ratio(self, row: Row) -> float:
        """Return how many times as fast as the first variant a row is, by the medians."""
        return self.rows[0].timing.median_ms / row.timing.median_ms
