"""Measure how much faster a block-sparse network is than its dense self.

    python benchmarks/sparse_vs_dense.py
    python benchmarks/sparse_vs_dense.py --model resnet18 --sparsity 0.9 --batch 4 --threads 1

A torchvision network with random weights is pruned, exported dense and sparse, compared with
PyTorch on random images, and timed: PyTorch eager (default memory format, channels last, and the
pruned network, zeros and all) against both files in our runtime, interleaved in one process with
the same number of threads. Figures go to benchmarks/results/ as Markdown and JSON.
"""

# N images, C H W image

from __future__ import annotations

import argparse
import copy
import datetime
import json
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
import torchvision
from rich.console import Console
from rich.progress import Progress
from torch import nn

import blocksparse
from blocksparse.export import export_file
from blocksparse.perf import Timing, cost, describe_machine, interleave, total, usable_cores
from blocksparse.runtime import Network
from blocksparse.sparsity import Block, plan_masks, resolve

RESULTS = Path(__file__).parent / "results"
BASELINE = "dense, PyTorch eager"
SPARSE = "sparse, blocksparse"
QUIET = 1.2  # third over first quartile that a quiet machine stays below
console = Console(stderr=True, highlight=False)


@dataclass(frozen=True)
class Setting:
    """What is measured."""

    model: str
    image: int
    block: tuple[int, int]
    sparsity: float
    batch: int
    threads: int
    rounds: int
    seed: int

    def __str__(self) -> str:
        rows, columns = self.block
        return (
            f"{self.model}, {self.sparsity:.0%} sparse in {rows}x{columns} blocks shared over "
            f"kernel positions, batch {self.batch}, "
            f"{self.threads} thread{'' if self.threads == 1 else 's'}"
        )

    @property
    def name(self) -> str:
        """File name of the results."""
        rows, columns = self.block
        share = f"{100 * self.sparsity:g}".replace(".", "_")
        return f"{self.model}-{rows}x{columns}-{share}-batch{self.batch}-threads{self.threads}"


@dataclass(frozen=True)
class File:
    """One exported file: its size, its work, and how far its outputs are from PyTorch's."""

    bytes: int
    parameters_kept: int
    parameters: int
    flops_kept: int
    flops: int
    max_error: float
    tolerance: float


def parse(arguments: list[str] | None = None) -> tuple[Setting, Path]:
    """Read the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--model", default="resnet50", help="a torchvision classification model (resnet50)")
    add("--image", type=int, default=224, help="height and width of an image (224)")
    add("--block", type=int, nargs=2, default=(8, 8), help="output and input channels (8 8)")
    add("--sparsity", type=float, default=0.75, help="of the prunable weights, 0..1 (0.75)")
    add("--batch", type=int, default=1, help="images per call (1)")
    add("--threads", type=int, default=usable_cores(), help="threads of each engine (all cores)")
    add("--rounds", type=int, default=30, help="timed calls of each candidate (30)")
    add("--seed", type=int, default=0, help="seed of weights and images (0)")
    add("--output", type=Path, default=RESULTS, help="folder of the results")
    chosen = vars(parser.parse_args(arguments))
    output = chosen.pop("output")
    return Setting(**{**chosen, "block": tuple(chosen["block"])}), output


def dense_network(setting: Setting, images: torch.Tensor) -> nn.Module:
    """Return a network with random weights."""
    torch.manual_seed(setting.seed)
    network = torchvision.models.get_model(setting.model, weights=None)
    if setting.model == "inception_v3":
        network.aux_logits, network.AuxLogits = False, None
    return fit_batch_norms(network, images)


def pruned_network(setting: Setting, network: nn.Module, images: torch.Tensor) -> nn.Module:
    """Return a copy in which the blocks with the least weight are zero."""
    network = copy.deepcopy(network)
    plan = resolve(network, target=setting.sparsity, pattern=Block(*setting.block, shared=True))
    weights = plan.weights(network)
    with torch.no_grad():
        for name, mask in plan_masks(plan, weights, share=1.0).items():
            weights[name].mul_(mask)
    return fit_batch_norms(network, images)


def fit_batch_norms(network: nn.Module, images: torch.Tensor) -> nn.Module:
    """Give every batch norm the statistics of the images; return the network ready to run.

    Without that, the signal grows or dies from layer to layer, and comparing outputs says little.
    """
    network.eval()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.reset_running_stats()
            module.momentum = None  # a plain mean, here of one batch
            module.train()
    with torch.no_grad():
        network(images)
    return network.eval()


def exported(
    network: nn.Module, images: torch.Tensor, path: Path, setting: Setting
) -> tuple[Network, File]:
    """Export a network, have the file compared with PyTorch, and load it."""
    report = export_file(network, path, images)
    runtime = blocksparse.load(path, threads=setting.threads)
    runtime.warmup(setting.batch)
    work = total(cost(runtime.model))
    return runtime, File(
        bytes=report.file_bytes,
        parameters_kept=work.parameters_kept,
        parameters=work.parameters_dense,
        flops_kept=work.flops_kept,
        flops=work.flops_dense,
        max_error=report.verification.max_error,
        tolerance=report.verification.tolerance,
    )


def candidates(
    setting: Setting, folder: Path
) -> tuple[dict[str, Callable[[], object]], dict[str, File]]:
    """Build everything that is timed, outputs compared."""
    shape = (setting.batch, 3, setting.image, setting.image)
    images = torch.randn(shape, generator=torch.Generator().manual_seed(setting.seed))
    several = torch.randn(
        (max(4, setting.batch), *shape[1:]), generator=torch.Generator().manual_seed(1)
    )
    dense = dense_network(setting, several)
    pruned = pruned_network(setting, dense, several)
    runs, files = {}, {}
    for name, network in (("dense", dense), ("sparse", pruned)):
        runs[name], files[name] = exported(network, images, folder / f"{name}.st", setting)
    last = copy.deepcopy(dense).to(memory_format=torch.channels_last)
    images_last = images.to(memory_format=torch.channels_last)
    array = np.ascontiguousarray(images.numpy())
    return {
        BASELINE: lambda: dense(images),
        "dense, PyTorch eager, channels last": lambda: last(images_last),
        "sparse (zeros kept), PyTorch eager": lambda: pruned(images),
        "dense, blocksparse": lambda: runs["dense"](array),
        SPARSE: lambda: runs["sparse"](array),
    }, files


def markdown(setting: Setting, facts: dict, timings: dict[str, Timing], files: dict) -> str:
    """Return the results as a page."""
    first = timings[BASELINE].median_ms
    lines = [
        f"# {setting}",
        "",
        f"{facts['date']}, {facts['machine']}.",
        f"Random weights, {setting.image}x{setting.image} images, median and quartiles of "
        f"{setting.rounds} interleaved rounds.",
        "",
        "| engine | ms per batch | quartiles | images/s | against dense PyTorch eager |",
        "|:--|--:|--:|--:|--:|",
    ]
    for name, t in timings.items():
        speed = 1e3 * setting.batch / t.median_ms
        lines.append(
            f"| {name} | {t.median_ms:.2f} | {t.q1_ms:.2f} to {t.q3_ms:.2f} | {speed:.1f} "
            f"| {first / t.median_ms:.2f}x |"
        )
    lines += [
        "",
        "| file | bytes | parameters | GFLOPs per image | largest difference from PyTorch |",
        "|:--|--:|--:|--:|--:|",
    ]
    lines += [
        f"| {name} | {f.bytes:,} | {f.parameters_kept:,} of {f.parameters:,} "
        f"| {f.flops_kept / 1e9:.2f} of {f.flops / 1e9:.2f} "
        f"| {f.max_error:.1e} ({f.tolerance:.1e} allowed) |"
        for name, f in files.items()
    ]
    noisy = [name for name, t in timings.items() if t.q3_ms > QUIET * t.q1_ms]
    if noisy:
        lines += [
            "",
            f"**Not to be quoted.** The machine was busy: the quartiles of {', '.join(noisy)} lie "
            f"more than {QUIET - 1:.0%} apart. Measure again when nothing else runs.",
        ]
    return "\n".join(lines) + "\n"


def main(arguments: list[str] | None = None) -> None:
    """Measure and save."""
    setting, output = parse(arguments)
    torch.set_num_threads(setting.threads)
    with tempfile.TemporaryDirectory() as folder:
        console.print(f"{setting}: exporting and checking")
        calls, files = candidates(setting, Path(folder))
        with torch.inference_mode(), Progress(console=console, transient=True) as progress:
            task = progress.add_task("measuring", total=1.0)
            timings = interleave(
                calls,
                rounds=setting.rounds,
                on_round=lambda share: progress.update(task, completed=share),
            )
    machine = describe_machine(
        torch=torch.__version__,
        torchvision=torchvision.__version__,
        blocksparse=blocksparse.__version__,
    )
    facts = {
        "date": datetime.date.today().isoformat(),
        "machine": str(machine),
        "setting": asdict(setting),
        "files": {name: asdict(file) for name, file in files.items()},
        "timings": {name: asdict(timing) for name, timing in timings.items()},
        "speedup": timings[BASELINE].median_ms / timings[SPARSE].median_ms,
    }
    page = markdown(setting, facts, timings, files)
    output.mkdir(parents=True, exist_ok=True)
    (output / f"{setting.name}.json").write_text(json.dumps(facts, indent=2) + "\n")
    (output / f"{setting.name}.md").write_text(page)
    sys.stdout.write(page)


if __name__ == "__main__":
    main()
