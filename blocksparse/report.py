"""The closing report of a run: what pruning cost in accuracy, and what it gained.

Figures go in as frozen dataclasses, with the unit in the name of each field; the same rows come out
as a table for the terminal and as Markdown, and the figures themselves as JSON.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from blocksparse.whole_file import write_whole

__all__ = [
    "BUSY",
    "DENSE_RUNTIME",
    "SPARSE_RUNTIME",
    "Accuracy",
    "Cost",
    "Latency",
    "Report",
    "Row",
    "Sizes",
    "Sparsity",
]

# Names of engines, and words of a remark, by which reports are read again.
DENSE_RUNTIME = "dense, blocksparse"
SPARSE_RUNTIME = "sparse, blocksparse"
BUSY = "kept the machine busy"


@dataclass(frozen=True)
class Accuracy:
    """Share of validation images classified correctly, each in 0..1.

    Parameters
    ----------
    dense, sparse
        The network before and after pruning, run by PyTorch.
    runtime
        The exported file, run by the blocksparse runtime on the same images.
    images
        How many validation images there were.
    """

    dense: float
    sparse: float
    runtime: float
    images: int


@dataclass(frozen=True)
class Sparsity:
    """What was pruned: shares in 0..1 of the prunable weights, not of all parameters.

    Parameters
    ----------
    pattern
        Which entries are zero together, such as ``"block 8x8 shared"``.
    target, reached
        The sparsity asked for, and the share of prunable weights that are zero.
    layers
        How many layers were pruned.
    """

    pattern: str
    target: float
    reached: float
    layers: int


@dataclass(frozen=True)
class Sizes:
    """Bytes on disk.

    Parameters
    ----------
    dense_checkpoint
        The checkpoint of the dense network, weights only: no optimizer state.
    exported_file
        The exported file, whole.
    values, indices
        Its stored weights, biases and scales, and the positions of the stored blocks.
    """

    dense_checkpoint: int
    exported_file: int
    values: int
    indices: int

    def __post_init__(self) -> None:
        if self.metadata < 0:
            raise ValueError(
                f"values ({self.values} bytes) and indices ({self.indices} bytes) add up to more "
                f"than the exported file ({self.exported_file} bytes)"
            )

    @property
    def metadata(self) -> int:
        """Bytes of the exported file that are neither values nor indices: header and graph."""
        return self.exported_file - self.values - self.indices


@dataclass(frozen=True)
class Cost:
    """Work per image, of the whole network, batch norm folded into the convolutions.

    Parameters
    ----------
    parameters, parameters_kept
        Weights and biases of the dense network, and those the sparse one stores.
    flops, flops_kept
        Floating-point operations per image, two for each multiply-add.
    """

    parameters: int
    parameters_kept: int
    flops: int
    flops_kept: int


@dataclass(frozen=True)
class Latency:
    """Milliseconds for one image at batch 1, all engines measured in turn in one run.

    Parameters
    ----------
    engine
        What ran, such as ``"sparse, blocksparse"``.
    median_ms, q1_ms, q3_ms
        Median and quartiles over the rounds.
    rounds
        How many times every engine had its turn.
    """

    engine: str
    median_ms: float
    q1_ms: float
    q3_ms: float
    rounds: int


@dataclass(frozen=True)
class Row:
    """One line of the closing table; a row without a value opens a section."""

    name: str
    value: str = ""
    note: str = ""

    @property
    def is_heading(self) -> bool:
        """Whether this row opens a section."""
        return not self.value


@dataclass(frozen=True)
class Report:
    """Everything a run has to say at its end.

    Parameters
    ----------
    name
        The experiment.
    command
        What was typed, without what says only where things are; empty where it was not recorded.
    seed
        Of everything drawn at random.
    folder
        Where everything was written.
    files
        What lies there: path relative to `folder` -> a few words on it.
    latencies
        The first one is what the others are compared with.
    threads
        Threads each engine was given.
    machine
        Processor and library versions.
    cores
        Cores this process may use.
    load
        Load average of the minute before times were taken: processes that wanted a core. None where
        the operating system does not count them.
    seconds
        Wall time of the run, in seconds.
    """

    name: str
    command: str
    seed: int
    sparsity: Sparsity
    accuracy: Accuracy
    sizes: Sizes
    cost: Cost
    latencies: tuple[Latency, ...]
    threads: int
    machine: str
    cores: int
    load: float | None
    seconds: float
    folder: str
    files: Mapping[str, str] = field(default_factory=dict)

    def rows(self) -> Iterator[Row]:
        """Yield the lines of the closing table, sections opened by headings."""
        yield from self._accuracy_rows()
        yield from self._size_rows()
        yield from self._cost_rows()
        yield from self._latency_rows()

    def _accuracy_rows(self) -> Iterator[Row]:
        accuracy = self.accuracy
        yield Row("Accuracy", note=f"{accuracy.images:,} validation images")
        yield Row("dense, PyTorch", _percent(accuracy.dense))
        for name, value in (
            ("sparse, PyTorch", accuracy.sparse),
            ("sparse, blocksparse", accuracy.runtime),
        ):
            change = f"{100 * (value - accuracy.dense):+.2f} points"
            yield Row(name, _percent(value), change)

    def _size_rows(self) -> Iterator[Row]:
        sizes = self.sizes
        ratio = sizes.dense_checkpoint / sizes.exported_file
        yield Row("Size", note="bytes on disk")
        yield Row("dense checkpoint", _bytes(sizes.dense_checkpoint), "weights only")
        yield Row("exported file", _bytes(sizes.exported_file), f"{_times(ratio)} smaller")
        for name, value in (
            ("values", sizes.values),
            ("indices", sizes.indices),
            ("metadata", sizes.metadata),
        ):
            share = f"{_percent(value / sizes.exported_file, 1)} of the file"
            yield Row(f"  {name}", _bytes(value), share)

    def _cost_rows(self) -> Iterator[Row]:
        cost, sparsity = self.cost, self.sparsity
        yield Row("Kept", note=f"{sparsity.pattern}, {sparsity.layers} layers pruned")
        yield Row(
            "prunable weights",
            _percent(1 - sparsity.reached, 1),
            f"sparsity {_percent(sparsity.reached, 1)}",
        )
        for name, kept, whole, unit in (
            ("all parameters", cost.parameters_kept, cost.parameters, "parameters"),
            ("FLOPs per image", cost.flops_kept, cost.flops, "FLOPs"),
        ):
            note = f"{_count(kept)} of {_count(whole)} {unit}"
            yield Row(name, _percent(kept / whole, 1), note)

    def _latency_rows(self) -> Iterator[Row]:
        first = self.latencies[0]
        threads = f"{self.threads} thread{'s' if self.threads != 1 else ''}"
        yield Row("Time per image", note=f"batch 1, {threads}, median [quartiles]")
        for latency in self.latencies:
            note = f"[{_ms(latency.q1_ms)} to {_ms(latency.q3_ms)} ms]"
            if latency is not first:
                note += f"  {_times(first.median_ms / latency.median_ms)} as fast"
            yield Row(latency.engine, f"{_ms(latency.median_ms)} ms", note)

    def remarks(self) -> list[str]:
        """Return what a reader of the figures should know besides them."""
        if self.load is None or self.load <= self.cores + 0.5:
            return []
        return [
            f"Other programs {BUSY} (load {self.load:.1f} on {self.cores} "
            f"core{'s' if self.cores != 1 else ''}): do not trust the times above."
        ]

    def table(self) -> Table:
        """Return the closing table for a terminal, one screen of it."""
        table = Table(
            title=f"{self.name}, seed {self.seed}, {self.seconds:.0f} s in all",
            title_justify="left",
            title_style="bold",
            box=box.HORIZONTALS,
            show_header=False,
            pad_edge=False,
        )
        table.add_column(no_wrap=True)
        table.add_column(justify="right", no_wrap=True)
        table.add_column(style="dim", overflow="fold")
        for row in self.rows():
            if row.is_heading:
                table.add_section()
            style = "bold not dim" if row.is_heading else ""
            table.add_row(Text(row.name, style), Text(row.value), Text(row.note))
        return table

    def to_markdown(self) -> str:
        """Return the report as a Markdown page that ends in a newline."""
        lines = [f"# {self.name}", "", "| | | |", "|:--|--:|:--|"]
        for row in self.rows():
            if row.is_heading:
                lines.append(f"| **{row.name}** | | {row.note} |")
            else:
                indent = "&nbsp;&nbsp;" * ((len(row.name) - len(row.name.lstrip())) // 2)
                lines.append(f"| {indent}{row.name.strip()} | {row.value} | {row.note} |")
        for remark in self.remarks():
            lines += ["", remark]
        if self.command:
            lines += ["", f"Command: `{self.command}`"]
        lines += ["", f"Seed {self.seed}, {self.seconds:.0f} s on {self.machine}.", ""]
        lines += [f"Written to `{self.folder}`:", ""]
        lines += [f"- `{path}`: {what}" for path, what in self.files.items()]
        return "\n".join(lines) + "\n"

    def to_dict(self) -> dict[str, Any]:
        """Return every figure under a name that carries its unit, ready for JSON."""
        sizes = {f"{key}_bytes": value for key, value in asdict(self.sizes).items()}
        return {
            "name": self.name,
            "command": self.command,
            "seed": self.seed,
            "sparsity": asdict(self.sparsity),
            "accuracy": asdict(self.accuracy),
            "sizes": sizes | {"metadata_bytes": self.sizes.metadata},
            "cost": asdict(self.cost),
            "latency": {
                "batch": 1,
                "threads": self.threads,
                "engines": [asdict(latency) for latency in self.latencies],
            },
            "machine": self.machine,
            "cores": self.cores,
            "load": self.load,
            "remarks": self.remarks(),
            "seconds": self.seconds,
            "folder": self.folder,
            "files": dict(self.files),
        }

    def save(self, folder: Path) -> None:
        """Write ``report.md`` and ``report.json`` into `folder`, each whole or not at all."""
        write_whole(folder / "report.md", self.to_markdown())
        write_whole(folder / "report.json", json.dumps(self.to_dict(), indent=2) + "\n")


def _percent(share: float, digits: int = 2) -> str:
    return f"{100 * share:.{digits}f} %"


def _bytes(count: int) -> str:
    return f"{count:,} bytes"


def _times(ratio: float) -> str:
    return f"{ratio:.2f}x" if ratio < 10 else f"{ratio:.0f}x"


def _ms(milliseconds: float) -> str:
    """Three significant digits, without an exponent."""
    digits = 3 if milliseconds < 1 else 2 if milliseconds < 10 else 1
    return f"{milliseconds:.{digits}f}"


def _count(number: int) -> str:
    """Return a count a person can read: 812, 78,042, 4.11 million, 3.86 billion."""
    for unit, size in (("billion", 10**9), ("million", 10**6)):
        if number >= size:
            return f"{number / size:.2f} {unit}"
    return f"{number:,}"
