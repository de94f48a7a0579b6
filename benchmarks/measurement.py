"""One setting measured: engines built, their outputs compared, and then timed in turns."""

from __future__ import annotations

import datetime
from collections.abc import Callable, Sequence
from dataclasses import asdict, fields
from functools import partial

import torch
import torchvision

import blocksparse
from benchmarks import engines
from benchmarks.engines import Engine
from benchmarks.exports import Exports
from benchmarks.figures import Result, Row, Setting, Work
from benchmarks.handover import handover
from benchmarks.stage import say, stage
from blocksparse.perf import describe_machine, interleave, usable_cores

# Seconds. PyTorch's OpenMP threads were seen to spin for 5 to 18 ms after a call, ONNX Runtime's
# for 25 unless told not to, as they are here. With 10 ms the engine behind PyTorch, if it takes a
# few milliseconds, took 1.6 times as long every second round.
SETTLE = 0.02


def build_engines(
    exports: Exports, setting: Setting, without: Sequence[str] = ()
) -> tuple[list[Engine], list[str]]:
    """Build every engine that can run here.

    Parameters
    ----------
    exports : Exports
        What they run.
    setting : Setting
        Batch and threads they are built for.
    without : sequence of str
        Peers that stay out.

    Returns
    -------
    built : list of Engine
        The peers first, then ours in the order of the sparsities.
    left_out : list of str
        One line per peer that stays out or cannot run.
    """
    shape = (setting.batch, *exports.images.shape[1:])
    sources = [(exports.dense, 0.0)]
    if exports.zeros is not None:
        sources.append((exports.zeros, max(setting.sparsities)))
    built, left_out = [], []
    for kind, peer in engines.PEERS.items():
        if kind in without:
            left_out.append(f"{kind} is left out, as asked")
            continue
        try:
            built += [
                Engine(kind, engines.build(kind, source, shape, setting.threads), sparsity)
                for source, sparsity in sources
                if peer.reads_onnx or sparsity == 0
            ]
        except engines.UnavailableError as error:
            left_out.append(f"{kind} is left out: {error}")
    built.sort(key=lambda engine: engine.sparsity)
    built += [
        engines.ours(exports.file(sparsity).network, sparsity, setting.threads)
        for sparsity in setting.sparsities
    ]
    return built, left_out


def measure(
    exports: Exports,
    candidates: Sequence[Engine],
    batch: int,
    rounds: int,
    seconds: float,
    on_round: Callable[[float], None] | None = None,
) -> tuple[Row, ...]:
    """Compare the outputs of all engines with PyTorch's, then time the engines in turns.

    Parameters
    ----------
    exports : Exports
        Images, and PyTorch's outputs for them.
    candidates : sequence of Engine
        What is timed.
    batch : int
        Images per call.
    rounds, seconds : int, float
        The least number of rounds, and how long all timed calls together take at least.
    on_round : callable, optional
        Told the share of the work that is done, 0..1.

    Raises
    ------
    MismatchError
        If one computes something else; nothing is timed then.
    """
    agreements = [exports.check(engine, batch) for engine in candidates]
    images = exports.images[:batch]
    calls = {engine.name: partial(engine.run, images) for engine in candidates}
    timings = interleave(
        calls, rounds=rounds, min_seconds=seconds, settle=SETTLE, on_round=on_round
    )
    return tuple(
        Row(engine.name, engine.kind, engine.sparsity, timings[engine.name], **asdict(agreement))
        for engine, agreement in zip(candidates, agreements, strict=True)
    )


def measure_setting(
    exports: Exports,
    setting: Setting,
    *,
    rounds: int,
    seconds: float,
    seed: int,
    without: Sequence[str] = (),
    exporting: float = 0.0,
) -> Result:
    """Build the engines of one setting, check and time them.

    Parameters
    ----------
    exports, setting, rounds, seconds, without
        As above.
    seed : int
        That the exports were made with.
    exporting : float
        Seconds the exports took, for the record.
    """
    with stage(f"{setting}: building engines, torch.compile takes longest", steps=False) as built:
        candidates, left_out = build_engines(exports, setting, without)
    for line in left_out:
        say(f"  {line}")
    handovers: list[float] = []

    def on_round(done: float) -> None:
        if min(setting.threads, usable_cores()) > 1:
            handovers.append(handover())
        timed.step(done)

    with stage(f"{setting}: comparing outputs and measuring") as timed:
        rows = measure(exports, candidates, setting.batch, rounds, seconds, on_round)
    machine = describe_machine(
        torch=torch.__version__,
        torchvision=torchvision.__version__,
        blocksparse=blocksparse.__version__,
        **{row.kind: engines.version(row.kind) for row in rows if row.kind in engines.BY_ONNX},
    )
    words = [
        f"python -m benchmarks.compare --model {setting.model} --image {setting.image}",
        f"--sparsity {' '.join(f'{share:g}' for share in setting.sparsities)}",
        f"--pattern {setting.pattern} --batch {setting.batch} --threads {setting.threads}",
        f"--rounds {rounds} --seconds {seconds:g} --seed {seed}",
        *(["--zeros"] if exports.zeros is not None else []),
        *([f"--without {' '.join(without)}"] if without else []),
    ]
    return Result(
        setting=setting,
        date=datetime.date.today().isoformat(),
        machine=str(machine),
        command=" ".join(words),
        rows=rows,
        work=tuple(
            Work(**{name: getattr(exports.file(share), name) for name in _WORK})
            for share in setting.sparsities
        ),
        left_out=tuple(left_out),
        seconds={
            "exports": exporting,
            "engines": built.seconds,
            "measuring": timed.seconds,
        },
        handovers=tuple(handovers),
    )


_WORK = [part.name for part in fields(Work)]
