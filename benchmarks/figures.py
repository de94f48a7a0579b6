"""What is measured and what comes out: a setting, one row per engine, and what they add up to."""

from __future__ import annotations

from dataclasses import dataclass

from blocksparse.perf import Timing

OURS = "blocksparse"
PEERS = ("onnxruntime", "openvino", "torch-eager", "torch-compile", "deepsparse")
SPARSITIES = (0.0, 0.5, 0.75, 0.9)


@dataclass(frozen=True)
class Setting:
    """One setting; all its engines and sparsities take turns.

    Attributes
    ----------
    model : str
        Name of the network.
    image : int
        Height and width of images, in pixels.
    sparsities : tuple of float
        Of the prunable weights, each in 0..1.
    pattern : str
        ``shared`` (one block over all kernel positions) or ``per-position``.
    batch : int
        Images per call.
    threads : int
        Of each engine.
    """

    model: str
    image: int
    sparsities: tuple[float, ...]
    pattern: str
    batch: int
    threads: int

    def __str__(self) -> str:
        return (
            f"{self.model}, {self.image}x{self.image} images, 8x8 blocks "
            f"{self.pattern.replace('-', ' ')}, batch {self.batch}, "
            f"{self.threads} thread{'' if self.threads == 1 else 's'}"
        )

    @property
    def name(self) -> str:
        """File name of the results; the same on every machine."""
        parts = [self.model, f"image{self.image}", "8x8", self.pattern]
        if self.sparsities != SPARSITIES:
            parts += ["sparsity", *(f"{100 * s:g}".replace(".", "_") for s in self.sparsities)]
        return "-".join([*parts, f"batch{self.batch}", f"threads{self.threads}"])


@dataclass(frozen=True)
class Row:
    """What one engine did.

    Attributes
    ----------
    name, kind : str
        What it is called, and the engine.
    sparsity : float
        Of the prunable weights, 0..1.
    timing : Timing
        Milliseconds per batch.
    max_error, allowed : float
        Largest difference from PyTorch's logits, and what float32 rounding explains.
    """

    name: str
    kind: str
    sparsity: float
    timing: Timing
    max_error: float
    allowed: float


@dataclass(frozen=True)
class Work:
    """One file: its bytes, parameters and FLOPs per image, kept and of the dense network."""

    sparsity: float
    bytes: int
    parameters: int
    parameters_kept: int
    flops: int
    flops_kept: int


@dataclass(frozen=True)
class Result:
    """Everything a page says.

    Attributes
    ----------
    setting : Setting
        What was measured.
    date, machine, command : str
        When, where, and the command line that does it again.
    rows : tuple of Row
        One per engine and sparsity.
    work : tuple of Work
        One per file.
    left_out : tuple of str
        One line per engine that did not take part.
    seconds : mapping of str to float
        What the parts of the measurement took.
    handovers : tuple of float
        Nanoseconds that a line of memory took from one core to another, after each round; none
        for one thread. See `handover`.
    """

    setting: Setting
    date: str
    machine: str
    command: str
    rows: tuple[Row, ...]
    work: tuple[Work, ...]
    left_out: tuple[str, ...]
    seconds: dict[str, float]
    handovers: tuple[float, ...] = ()

    @property
    def fastest_peer(self) -> Row | None:
        """The fastest engine that is not ours on the dense network, by its median."""
        peers = [row for row in self.rows if row.kind != OURS and row.sparsity == 0]
        return min(peers, key=lambda row: row.timing.median_ms, default=None)

    def ratio(self, row: Row) -> float | None:
        """Return how many times as fast as the fastest peer a row is; None without any peer."""
        peer = self.fastest_peer
        return peer.timing.median_ms / row.timing.median_ms if peer else None
