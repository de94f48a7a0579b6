from __future__ import annotations

import ctypes
import json
import logging
import threading
from dataclasses import asdict
from functools import partial

import llvmlite.binding as llvm
import numpy as np
import pytest

from blocksparse.perf import measure, probes
from blocksparse.perf.ceilings import MEMORY, Ceiling, Ceilings
from blocksparse.runtime.caches import Cache, system_caches, usual_caches
from blocksparse.runtime.helpers import Helpers
from blocksparse.runtime.kernels.objects import compile_text
from blocksparse.runtime.kernels.target import Target, host, tile_for

KIB, MIB = 1024, 1024**2
CACHES = (Cache(1, 32 * KIB, 1), Cache(2, MIB, 1), Cache(3, 32 * MIB, 4))
quick = partial(measure.measure, rounds=2, run_seconds=1e-4, memory_bytes=MIB)


def ceilings(**changes):
    facts = {
        "processor": "paper",
        "cores": 8,
        "caches": CACHES,
        "compute": (Ceiling("f32", "GFLOP/s", 100, 600, 99, 590),),
        "reading": (
            Ceiling("L1", "GB/s", 200, 1600, 190, 1500, 16 * KIB, 16 * KIB),
            Ceiling("L2", "GB/s", 100, 800, 90, 700, 181 * KIB, 181 * KIB),
            Ceiling("L3", "GB/s", 40, 200, 40, 200, 6 * MIB, 3 * MIB),
            Ceiling(MEMORY, "GB/s", 10, 30, 10, 30, MIB, MIB),
        ),
        "notes": ("a note",),
    }
    return Ceilings(**{**facts, **changes})


# what is known


def test_a_ceiling_rises_with_threads_until_all_reach_no_more():
    assert [ceilings().peak("f32", n) for n in (1, 2, 6, 7, 8, 20)] == [
        100, 200, 600, 600, 600, 600,
    ]  # fmt: skip
    assert [ceilings().bandwidth(MEMORY, n) for n in (1, 2, 4)] == [10, 20, 30]


def test_a_precision_that_was_not_measured_is_named():
    with pytest.raises(ValueError, match=r"'fp8'.*only for f32"):
        ceilings().peak("fp8", 1)


@pytest.mark.parametrize(
    ("count", "threads", "level"),
    [
        (32 * KIB, 1, "L1"),
        (32 * KIB + 1, 1, "L2"),
        (64 * KIB, 2, "L1"),  # each thread has a core, and each core an L1
        (MIB + 1, 1, "L3"),
        (32 * MIB, 4, "L3"),
        (32 * MIB + 1, 4, MEMORY),  # four threads share one L3
        (64 * MIB, 8, "L3"),
        (64 * MIB, 99, "L3"),  # more threads than cores have no more caches
        (64 * MIB + 1, 99, MEMORY),
        (0, 1, "L1"),
    ],
)
def test_level_is_the_nearest_that_holds_the_bytes(count, threads, level):
    assert ceilings().level_of(count, threads) == level


def test_what_was_not_measured_on_all_cores_rises_with_each_thread():
    row = Ceiling("L3", "GB/s", 40, None, 39, None, MIB, 0)
    assert [row.at(n, 8) for n in (1, 2, 8, 9)] == [40, 80, 320, 320]
    assert row.or_better(row) == row


def test_a_level_that_was_not_measured_is_taken_for_the_nearer_one():
    rows = tuple(row for row in ceilings().reading if row.name != "L3")
    left_out = ceilings(reading=rows)
    assert left_out.level_of(2 * MIB, 1) == "L2"
    assert left_out.level_of(33 * MIB, 1) == MEMORY


# caches


def cache_folder(root, cpu, *rows):
    for index, values in enumerate(rows):
        folder = root / f"cpu{cpu}" / "cache" / f"index{index}"
        folder.mkdir(parents=True)
        for name, value in zip(
            ("level", "type", "size", "shared_cpu_list"), values, strict=True
        ):  # fmt: skip
            (folder / name).write_text(value + "\n")


def test_caches_are_read_as_linux_lists_them(tmp_path):
    cache_folder(
        tmp_path, 2, ("1", "Data", "48K", "2,66"), ("1", "Instruction", "32K", "2,66"),
        ("2", "Unified", "2M", "2,66"), ("3", "Unified", "491520K", "0-3,64-67"),
    )  # fmt: skip
    assert system_caches({2, 3, 66, 100}, tmp_path) == (
        Cache(1, 48 * KIB, 2), Cache(2, 2 * MIB, 2), Cache(3, 480 * MIB, 3),
    )  # fmt: skip


def test_a_cache_that_is_not_described_is_left_out(tmp_path):
    cache_folder(tmp_path, 0, ("1", "Data", "?", "0"), ("2", "Unified", "1024K", ""))
    assert system_caches({0}, tmp_path) == (Cache(2, MIB, 1),)
    assert system_caches({5}, tmp_path) == ()


@pytest.mark.parametrize("caches", [CACHES, usual_caches(4), CACHES[:1]])
@pytest.mark.parametrize("threads", [1, 3, 8])
def test_working_sets_fit_their_level_and_no_nearer_one(caches, threads):
    sizes = measure.working_sets(caches, threads, 8, 10**10, host())
    assert list(sizes) == [cache.name for cache in caches] + [MEMORY]
    for size in sizes.values():
        assert size % probes.read_bytes(host()) == 0
    before = 0
    for cache in caches:
        assert before < sizes[cache.name] * min(threads, cache.cores) < cache.bytes
        before = cache.bytes
    assert sizes[MEMORY] * threads > 1.9 * caches[-1].bytes


SERVERS = {  # cores, caches, what can be told apart when all cores read
    "Sapphire Rapids": (56, (48 * KIB, 2 * MIB, 105 * MIB), ["L1", "L2"]),
    "64 cores": (64, (64 * KIB, MIB, 32 * MIB), ["L1", "L2"]),
    "barely": (8, (32 * KIB, MIB, 16 * MIB), ["L1", "L2", "L3"]),
    "Zen 4": (8, (32 * KIB, MIB, 32 * MIB), ["L1", "L2", "L3"]),
}


@pytest.mark.parametrize(("cores", "sizes", "apart"), SERVERS.values(), ids=SERVERS)
def test_no_nearer_cache_holds_a_working_set_when_all_cores_read(cores, sizes, apart):
    caches = tuple(
        Cache(level, size, cores if level == 3 else 1) for level, size in enumerate(sizes, 1)
    )
    sets = measure.working_sets(caches, cores, cores, 10**12, host())
    assert list(sets) == [*apart, MEMORY]
    turn, nearer = probes.read_bytes(host()), 0
    for cache in caches:
        share = cache.bytes // cache.cores
        if cache.name in sets:
            assert 1.5 * nearer - turn <= sets[cache.name] < 0.8 * share
        nearer = max(nearer, share)
    assert (sets[MEMORY] + turn) * cores >= 2 * sum(c.within_reach(cores) for c in caches)
    alone = measure.working_sets(caches, 1, cores, 10**12, host())
    assert list(alone) == ["L1", "L2", "L3", MEMORY]


def test_working_set_of_memory_keeps_the_limit():
    assert measure.working_sets(CACHES, 2, 8, MIB, host())[MEMORY] == MIB // 2


# the probes


def run_probe(name, text, *arguments):
    address = compile_text(name, text, host())
    ctypes.CFUNCTYPE(None, *[ctypes.c_int64] * 3)(address)(*map(int, arguments))


def test_multiply_probe_adds_the_product_once_a_turn():
    target = host()
    precision = probes.precisions(target)[0]
    assert precision.name == "f32"
    vectors = probes.chains(target)
    values = np.arange((2 + vectors) * target.lanes, dtype=np.float32)
    a, b, sums = np.split(values.copy(), [target.lanes, 2 * target.lanes])
    at = values.ctypes.data
    name, text = probes.write_multiply(precision, target)
    run_probe(name, text, at, at + 8 * target.lanes, 5)
    np.testing.assert_array_equal(
        values[2 * target.lanes :], sums + np.tile(5 * a * b, vectors)
    )  # fmt: skip
    assert precision.operations(target) == 2 * vectors * target.lanes


@pytest.mark.parametrize("place", [0, 1, 100, -1])
def test_read_probe_reads_every_byte(place):
    target = host()
    size = 3 * probes.read_bytes(target)
    memory = np.zeros(size + 4 * target.lanes, np.uint8)
    memory[:size][place] = 64
    for turns, seen in ((3, True), (7, True), (0, False)):
        memory[size:] = 1
        run_probe(
            *probes.write_read(target), memory.ctypes.data, memory.ctypes.data + size, turns
        )  # fmt: skip
        assert memory[size:].max() == (64 if seen else 0)


@pytest.mark.parametrize(
    ("triple", "cpu", "features", "instructions"),
    [
        ("x86_64-unknown-linux-gnu", "znver4", "+avx512f,+avx512bf16,+avx512vnni,+avx2,+fma",
         {"f32": "vfmadd", "bf16": "vdpbf16ps", "int8": "vpdpbusd"}),
        ("x86_64-unknown-linux-gnu", "alderlake", "+avx2,+fma,+avxvnni",
         {"f32": "vfmadd", "int8": "vpdpbusd"}),
        ("x86_64-unknown-linux-gnu", "x86-64-v3", "+avx2,+fma", {"f32": "vfmadd"}),
        ("aarch64-unknown-linux-gnu", "generic", "+neon,+dotprod", {"f32": "fmla", "int8": "sdot"}),
    ],
    ids=["avx512", "avxvnni", "avx2", "neon"],
)  # fmt: skip
def test_multiply_probes_stay_in_registers_everywhere(triple, cpu, features, instructions):
    llvm.initialize_all_targets()
    llvm.initialize_all_asmprinters()
    target = Target(triple, cpu, features, **tile_for(triple, features))
    assert {p.name for p in probes.precisions(target)} == set(instructions)
    machine = llvm.Target.from_triple(triple).create_target_machine(
        cpu=cpu, features=features, opt=3
    )
    for precision in probes.precisions(target):
        module = llvm.parse_assembly(probes.write_multiply(precision, target)[1])
        module.verify()
        lines = machine.emit_assembly(module).splitlines()
        used = [i for i, line in enumerate(lines) if instructions[precision.name] in line]
        assert len(used) == probes.chains(target)
        between = lines[used[0] : used[-1]]
        assert not [line for line in between if "(%" in line or "[" in line], "memory is used"


def test_threads_read_parts_of_their_own_and_their_work_adds_up():
    target, turn = host(), probes.read_bytes(host())
    helpers = Helpers()
    runs = measure._runs({1: {"L1": 8 * turn}, 2: {"L1": 4 * turn}}, target, helpers)
    one, two = runs["L1 on 1"], runs["L1 on 2"]
    two()
    helpers.close()
    assert one.work == two.work == 8 * turn
    assert runs["f32 on 2"].work == 2 * probes.precisions(target)[0].operations(target)
    (start, end, _), (next_start, next_end, _) = two.arguments
    assert end - start == next_end - next_start == 4 * turn
    assert next_start > end


def test_helpers_end_after_an_interruption_before_all_have_started():
    class Interrupted(Helpers):
        def start(self, work, numbers):
            super().start(work, numbers)
            raise KeyboardInterrupt

    turn, helpers = probes.read_bytes(host()), Interrupted()
    run = measure._runs({2: {"L1": turn}}, host(), helpers)["L1 on 2"]
    with pytest.raises(KeyboardInterrupt):
        run()
    closing = threading.Thread(target=helpers.close, daemon=True)
    closing.start()
    closing.join(20)
    assert not closing.is_alive(), "a helper waits for a caller that is gone"


# measuring and keeping


def test_measured_ceilings_are_in_order():
    found = quick(cores=2)
    assert [row.name for row in found.compute] == [p.name for p in probes.precisions(host())]
    assert [row.name for row in found.reading] == [c.name for c in found.caches] + [MEMORY]
    for row in (*found.compute, *found.reading):
        assert 0 < row.median_one <= row.one
        assert 0 < row.median_all <= row.all
    assert Ceilings.from_dict(asdict(found)) == found


def test_what_could_not_be_told_apart_is_said():
    assert any("1 MiB at most" in note for note in quick(cores=1).notes)


def test_a_cache_that_all_cores_cannot_tell_apart_is_noted(monkeypatch):
    caches = (Cache(1, 16 * KIB, 1), Cache(2, 128 * KIB, 1), Cache(3, 300 * KIB, 2))
    monkeypatch.setattr(measure, "system_caches", lambda cpus: caches)
    found = quick(cores=2)
    assert [row.name for row in found.reading] == ["L1", "L2", "L3", MEMORY]
    assert found.reading[2].all is found.reading[2].median_all is None
    assert found.bandwidth("L3", 2) == 2 * found.reading[2].one
    (note,) = (note for note in found.notes if "told apart" in note)
    assert "L3 is not measured on all cores" in note
    assert Ceilings.from_dict(json.loads(json.dumps(asdict(found)))) == found


def test_ceilings_are_measured_once_and_a_damaged_file_is_replaced(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv("BLOCKSPARSE_CACHE", str(tmp_path / "kept"))
    monkeypatch.setattr(measure, "measure", quick)
    shares = []
    first = measure.machine_ceilings(on_share=shares.append)
    assert shares[-1] == 1
    assert measure.machine_ceilings() == first
    (path,) = (tmp_path / "kept").glob("*.json")
    for damage in ("{", "{}", "[]", '{"processor": 1}'):
        path.write_text(damage)
        caplog.clear()
        again = measure.machine_ceilings()
        assert str(path) in caplog.text
        assert measure.machine_ceilings() == again


def test_measuring_again_keeps_the_better_of_each_figure(tmp_path, monkeypatch):
    monkeypatch.setenv("BLOCKSPARSE_CACHE", str(tmp_path))
    series = [
        ceilings(compute=(Ceiling("f32", "GFLOP/s", *figures),), notes=(note,))
        for figures, note in (((100, 600, 99, 590), "quiet"), ((110, 300, 90, 200), "busy"))
    ]
    left = [*series, series[1]]
    monkeypatch.setattr(measure, "measure", lambda **_: left.pop(0))
    assert measure.machine_ceilings() == series[0]
    better = measure.machine_ceilings(again=True)
    assert better.compute == (Ceiling("f32", "GFLOP/s", 110, 600, 90, 590),)
    assert better.reading == series[0].reading
    assert better.notes == ("busy",)
    assert measure.machine_ceilings() == better
    measure.ceilings_file().unlink()
    assert measure.machine_ceilings(again=True) == series[1]


def test_other_caches_have_ceilings_of_their_own(tmp_path, monkeypatch):
    monkeypatch.setenv("BLOCKSPARSE_CACHE", str(tmp_path))
    last = [(32 * MIB, 4), (16 * MIB, 4), (32 * MIB, 2)]  # such as another size of virtual machine
    files = set()
    for size, cores in (*last, last[0]):
        caches = (*CACHES[:2], Cache(3, size, cores))
        monkeypatch.setattr(measure, "system_caches", lambda cpus, caches=caches: caches)
        files.add(measure.ceilings_file())
    assert len(files) == len(last)


def test_figures_of_other_working_sets_are_not_compared():
    few, many = (Ceiling(MEMORY, "GB/s", rate, rate, 1, 1, size, size)
                 for rate, size in ((90, MIB), (10, 64 * MIB)))  # fmt: skip
    assert many.or_better(few) == many


def test_ceilings_that_cannot_be_kept_only_warn(tmp_path, monkeypatch, caplog):
    (tmp_path / "file").write_text("")
    caplog.set_level(logging.WARNING, "blocksparse")
    measure._keep(tmp_path / "file" / "ceilings.json", ceilings())
    assert "not kept" in caplog.text
