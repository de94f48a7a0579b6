"""Which way each convolution is computed: what there is, what is measured, what is kept on disk.

No test depends on which way is the faster one: milliseconds are made by hand, or only compared with
what the engine itself kept.
"""

from __future__ import annotations

import logging
from dataclasses import replace
from threading import Barrier, Thread

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from models import Builder, randoms

from blocksparse.format import BsrWeight
from blocksparse.runtime import algorithms, reference, winograd
from blocksparse.runtime.algorithms import CLOSE, Algorithm, Algorithms, Memory, layer_key, ways
from blocksparse.runtime.compiled import MOST_IMAGES, CompiledEngine
from blocksparse.runtime.kernels import records
from blocksparse.runtime.kernels.target import Target, host

DIRECT, COLUMNS, ROWS, TILES, DENSE, DENSE_COLUMNS, DENSE_ROWS, DENSE_TILES = Algorithm
TARGET = Target("x86_64-unknown-linux-gnu", "generic", "+avx512f", 16, 8, 3, 8)
LOW = ("bsr", (4, 4), 0.5)
LAYOUTS = ["dense", ("bsr", (8, 8), 0.5), LOW, ("bsr", (1, 1), 0.3), ("nm", 2, 4)]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Every layer is worth a measurement, and what is measured is kept here.

    Kernels stay where they are: compiling them once more is not what is tested.
    """
    monkeypatch.setattr(algorithms, "cache_folder", lambda: tmp_path)
    monkeypatch.setattr(algorithms, "MEASURED_FLOPS", 1)
    return tmp_path


def layer(channels=16, image=(12, 10), outputs=16, **options):
    """A model of one convolution."""
    b = Builder((channels, *image))
    b.conv("x", outputs, **options)
    return b.model()


def first(model):
    """Node and weight of its first convolution."""
    node = model.graph.nodes[0]
    return node, model.weights[node.name]


def ways_of(model, target=TARGET, allow_winograd=True):
    return ways(*first(model), target, allow_winograd)


def products(engine):
    return [step for step in engine.steps.steps if step.packed is not None]


def prefer(model, way, allow_winograd=True):
    """Keep on disk that a way is the fastest one of every layer."""
    times = {
        layer_key(node, model.weights[node.name]): {
            str(other): 1.0 if other == way else 2.0
            for other in ways(node, model.weights[node.name], host(), allow_winograd)
        }
        for node in model.graph.nodes
        if node.op == "conv2d"
    }
    Memory(host()).write(times)


ALL = [DIRECT, COLUMNS, TILES, DENSE, DENSE_COLUMNS, DENSE_TILES]


@pytest.mark.parametrize(
    ("options", "expected", "without_winograd"),
    [
        ({}, [DIRECT, COLUMNS, TILES], [DIRECT]),
        ({"layout": ("bsr", (8, 8), 0.5)}, [DIRECT, COLUMNS, TILES], [DIRECT]),
        ({"layout": ("bsr", (16, 1), 0.5)}, [DIRECT, COLUMNS, TILES], [DIRECT]),
        ({"layout": LOW}, ALL, [DIRECT, DENSE]),
        ({"layout": ("bsr", (1, 1), 0.5)}, ALL, [DIRECT, DENSE]),
        ({"layout": ("bsr", (7, 8), 0.5)}, ALL, [DIRECT, DENSE]),
        ({"layout": LOW, "outputs": 4}, [DIRECT, COLUMNS, TILES], [DIRECT]),
        ({"layout": ("bsr", (8, 8), 0.5), "outputs": 5}, [DIRECT, COLUMNS, TILES], [DIRECT]),
        ({"layout": ("nm", 2, 4)}, [DIRECT, DENSE, DENSE_COLUMNS, DENSE_TILES], [DIRECT, DENSE]),
        ({"layout": ("nm", 2, 4), "kernel": (1, 1)}, [DIRECT, DENSE], [DIRECT, DENSE]),
        ({"groups": 2}, [DIRECT, COLUMNS, TILES], [DIRECT]),
        ({"groups": 4}, [DIRECT], [DIRECT]),
        ({"stride": (2, 2)}, [DIRECT], [DIRECT]),
        ({"stride": (2, 2), "layout": LOW}, [DIRECT, DENSE], [DIRECT, DENSE]),
        ({"kernel": (7, 7), "stride": (2, 2)}, [DIRECT, COLUMNS], [DIRECT]),
        ({"kernel": (1, 1)}, [DIRECT], [DIRECT]),
        ({"kernel": (3, 1)}, [DIRECT, COLUMNS], [DIRECT]),
        ({"kernel": (1, 3)}, [DIRECT, ROWS], [DIRECT]),
        ({"kernel": (1, 7), "layout": ("nm", 2, 4)}, [DIRECT, DENSE, DENSE_ROWS], [DIRECT, DENSE]),
        ({"kernel": (1, 5), "layout": LOW}, [DIRECT, ROWS, DENSE, DENSE_ROWS], [DIRECT, DENSE]),
        ({"kernel": (5, 5)}, [DIRECT, COLUMNS], [DIRECT]),
        ({"kernel": (7, 1)}, [DIRECT, COLUMNS], [DIRECT]),
        ({"kernel": (9, 1)}, [DIRECT], [DIRECT]),
        ({"dilation": (1, 2)}, [DIRECT, COLUMNS], [DIRECT]),
        ({"dilation": (2, 2), "layout": LOW}, [DIRECT, DENSE], [DIRECT, DENSE]),
        ({"kernel": (3, 1), "layout": LOW}, [DIRECT, COLUMNS, DENSE, DENSE_COLUMNS],
         [DIRECT, DENSE]),
    ],
)  # fmt: skip
def test_ways_of_a_layer(options, expected, without_winograd):
    model = layer(**options)
    assert ways_of(model) == expected
    assert ways_of(model, allow_winograd=False) == without_winograd


def test_blocks_as_high_as_the_register_tile_are_not_taken_as_dense():
    model = layer(layout=LOW)
    assert ways_of(model, replace(TARGET, rows=4)) == [DIRECT, COLUMNS, TILES]


def test_what_the_names_of_the_ways_say():
    assert [way for way in Algorithm if way.dense] == [
        DENSE, DENSE_COLUMNS, DENSE_ROWS, DENSE_TILES,
    ]  # fmt: skip
    kinds = ["", "columns", "rows", "tiles"]
    assert [way.transforms for way in Algorithm] == kinds * 2


def test_work_is_that_of_the_nonzeros():
    model = layer(channels=8, image=(10, 12), outputs=16, kernel=(3, 1), padding=(1, 0))
    assert algorithms.work(*first(model)) == 2 * 8 * 16 * 3 * 10 * 12
    model = layer(layout=("bsr", (8, 8), 0.5))
    nonzeros = np.count_nonzero(first(model)[1].to_dense())
    assert algorithms.work(*first(model)) == pytest.approx(2 * nonzeros * 12 * 10)


def test_keys_tell_apart_what_speed_depends_on():
    models = [
        layer(), layer(channels=8), layer(outputs=8), layer(image=(12, 11)), layer(image=(13, 10)),
        layer(kernel=(1, 3), padding=(0, 1)), layer(kernel=(3, 1), padding=(1, 0)),
        layer(dilation=(1, 2), padding=(1, 2)), layer(dilation=(2, 1), padding=(2, 1)),
        layer(image=(14, 12), dilation=(2, 2)), layer(image=(14, 12), padding=(0, 0)),
        layer(image=(24, 20), stride=(2, 2)), layer(image=(12, 20), stride=(1, 2)),
        layer(layout=("bsr", (8, 8), 1.0)), layer(layout=("bsr", (8, 8), 0.5)),
        layer(layout=("bsr", (8, 4), 0.5)), layer(layout=("bsr", (4, 8), 0.5)),
        layer(layout=("nm", 2, 4)), layer(layout=("nm", 4, 8)), layer(layout=("nm", 1, 4)),
    ]  # fmt: skip
    keys = [layer_key(*first(model)) for model in models]
    assert len(set(keys)) == len(keys), keys
    # of two masks of one density, that shared by all kernel positions leaves Winograd more zeros
    block = np.ones((8, 8))
    masks = [np.kron(np.eye(2), block), np.kron(1 - np.eye(2), block)]
    patterns = [[masks[0]] * 9, [masks[i % 2] for i in range(9)]]
    one, other = (
        BsrWeight.from_dense(np.stack(p, -1).reshape(16, 16, 3, 3).astype(np.float32), (8, 8))
        for p in patterns
    )
    assert one.density == other.density
    node, _ = first(models[0])
    assert layer_key(node, one) != layer_key(node, other)


def test_keys_are_shared_by_layers_that_cost_the_same():
    b = Builder((16, 12, 10))
    x = b.conv("x", 16, seed=1)
    b.conv(x, 16, seed=2, residual=x, activation="none")
    one, other = (layer_key(node, b.weights[node.name]) for node in b.model().graph.nodes)
    assert one == other


def test_every_way_is_right_for_every_layout(folder):
    """Chosen from disk, without a measurement; two layers, so that padding is read, too."""
    taken = set()
    for layout in LAYOUTS:
        b = Builder((13, 9, 18))
        x = b.conv("x", 21, layout=layout)
        b.conv(x, 12, layout=layout, padding=(2, 1), seed=1, activation="none")
        model = b.model()
        images = randoms(2, 13, 9, 18)
        expected = reference.run(model, images)
        for way in ways(*first(model), host(), True):
            prefer(model, way)
            engine = CompiledEngine(model)
            assert not engine.algorithms.open
            assert {choice.algorithm for choice in engine.algorithms.choices.values()} == {way}
            steps = products(engine)
            direct = records.CONV_NM if layout[0] == "nm" and not way.dense else records.CONV
            ops = {"columns": records.WINOGRAD, "rows": records.LINES_CONV,
                   "tiles": records.TILES_CONV}  # fmt: skip
            op = ops.get(way.transforms, direct)
            assert {step.op for step in steps} == {op}
            for row in engine.choices():
                assert ("dense" in row.kernel) == (way.dense or layout == "dense")
                named = [name for name in ops if f"winograd_{name}" in row.kernel]
                assert named == ([way.transforms] if way.transforms else [])
            if layout != "dense":  # the zeros of a sparse weight are stored where it is dense
                channels, taps = (13, 21), {"columns": 3, "tiles": 1}.get(way.transforms, 9)
                whole = [step.packed.columns * len(step.packed.channels) for step in steps]
                full = [count * taps for count in channels]
                assert way.dense == (whole == full and not steps[0].packed.group)
            scale = np.abs(expected).max()
            got = engine.run(images, 2)
            np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5 * scale)
            taken.add((str(layout), way))
    assert len(taken) == 3 + 3 + 6 + 6 + 4 if host().rows == 8 else taken


@given(st.lists(st.floats(0.5, 2.0), min_size=6, max_size=6))
def test_the_fastest_way_is_chosen_but_for_a_margin(times):
    found = algorithms._best(dict(zip(ALL, times, strict=True)))
    taken = times[ALL.index(found.algorithm)]
    assert min(times) >= CLOSE * taken
    assert found.algorithm == DIRECT or taken < CLOSE * times[0]
    assert found.milliseconds == dict(zip(map(str, ALL), times, strict=True))


@pytest.mark.parametrize(
    ("times", "expected"),
    [
        ({DIRECT: 1.0, COLUMNS: 0.98, TILES: 0.975}, DIRECT),  # within the noise
        ({DIRECT: 1.0, COLUMNS: 0.98, TILES: 0.96}, TILES),
        ({DIRECT: 1.0, COLUMNS: 0.5, TILES: 0.49}, COLUMNS),  # the two are as good
        ({DIRECT: 1.0, COLUMNS: 0.5, TILES: 0.4}, TILES),
        ({DIRECT: 1.0, COLUMNS: 1.5, TILES: 2.0}, DIRECT),
    ],
)
def test_times_are_settled_kept_and_read_again(folder, times, expected):
    model = layer()
    (name,) = (node.name for node in model.graph.nodes)
    found = Algorithms(model, TARGET)
    assert found.open == {name: [DIRECT, COLUMNS, TILES]}
    assert not found.choices
    found.settle({name: times})
    assert not found.open
    again = Algorithms(model, TARGET)
    assert not again.open
    for each in (found, again):
        assert each.choices[name].algorithm == expected
        assert each.choices[name].milliseconds == {str(way): ms for way, ms in times.items()}
    # another processor knows nothing of it
    for change in ({"features": "+avx2"}, {"cpu": "znver4"}, {"rows": 4}):
        assert Algorithms(model, replace(TARGET, **change)).open


def test_layers_of_one_key_are_computed_one_way(folder):
    """Both now and when the next engine finds one entry for the two."""
    b = Builder((16, 12, 10))
    b.conv(b.conv("x", 16, seed=1), 16, seed=2)
    model = b.model()
    found = Algorithms(model, TARGET)
    one, other = found.open
    times = [{DIRECT: 1.0, COLUMNS: ms, TILES: 2.0} for ms in (0.9, 1.08)]
    found.settle({one: times[0], other: times[1]})
    assert found.choices[one] == found.choices[other]
    assert Algorithms(model, TARGET).choices == found.choices


def test_layers_are_measured_by_the_first_call_and_never_again(folder, caplog):
    caplog.set_level(logging.INFO, "blocksparse")
    b = Builder((13, 9, 18))
    b.conv(b.conv("x", 16, layout=LOW), 8, kernel=(1, 1), padding=(0, 0), seed=1)
    model = b.model()
    engine = CompiledEngine(model)
    name, second = (node.name for node in model.graph.nodes)
    assert set(engine.algorithms.open) == {name}, "the other one has one way"
    assert not list(folder.iterdir())
    before = engine.steps
    assert [step.node.name for step in products(engine)] == [name, second]
    images = randoms(2, 13, 9, 18)
    got = engine.run(images, 2)
    assert not engine.algorithms.open
    assert sum("measuring 1 layers" in r.message for r in caplog.records) == 1
    choice = engine.algorithms.choices[name]
    assert list(choice.milliseconds) == [str(w) for w in ways(*first(model), host(), True)]
    assert all(ms > 0 for ms in choice.milliseconds.values())
    assert len(set(choice.milliseconds.values())) > 1, "each way has a time of its own"
    assert all(way in choice.reason for way in choice.milliseconds)
    assert choice.reason in engine.choices()[0].reason
    after = engine.steps
    assert engine.steps is after
    assert products(engine)[0].details["way"] == choice.algorithm
    assert [(s.node, s.source, s.target) for s in after.steps] == [
        (s.node, s.source, s.target) for s in before.steps
    ]
    output, trace = engine.timed_run(images, 1)
    assert trace.steps == after.steps
    for again in (output, engine.run(images, 1), engine.run(images, 3)):
        np.testing.assert_array_equal(again, got)

    (path,) = folder.iterdir()
    kept = path.read_bytes()
    caplog.clear()
    following = CompiledEngine(model)
    assert not following.algorithms.open
    assert following.algorithms.choices == engine.algorithms.choices
    assert [s.op for s in following.steps.steps] == [s.op for s in after.steps]
    np.testing.assert_array_equal(following.run(images, 1), got)
    assert path.read_bytes() == kept
    assert not [r for r in caplog.records if "measuring" in r.message]


def test_more_images_than_a_measurement_takes(folder):
    model = layer(channels=3, outputs=5)
    engine = CompiledEngine(model)
    images = randoms(MOST_IMAGES + 2, *model.input_shape)
    got = engine.run(images, 1)
    assert not engine.algorithms.open
    np.testing.assert_allclose(got, reference.run(model, images), rtol=0, atol=1e-4)


def test_two_first_calls_at_once_measure_once(folder, caplog):
    caplog.set_level(logging.INFO, "blocksparse")
    model = layer(channels=13, image=(9, 18))
    engine = CompiledEngine(model)
    batches = [randoms(n, *model.input_shape, seed=n) for n in (1, 2, 2, 1)]
    barrier, results = Barrier(len(batches)), {}

    def work(number):
        barrier.wait()
        results[number] = engine.run(batches[number], 2)

    threads = [Thread(target=work, args=(number,)) for number in range(len(batches))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sum("measuring" in r.message for r in caplog.records) == 1
    for number, images in enumerate(batches):
        np.testing.assert_array_equal(results[number], engine.run(images, 1))
    assert len(list(folder.iterdir())) == 1


def test_a_partly_filled_file_is_completed(folder):
    model = layer()
    (name,) = (node.name for node in model.graph.nodes)
    key, times = layer_key(*first(model)), {DIRECT: 2.0, COLUMNS: 3.0, TILES: 1.0}
    memory = Memory(TARGET)
    memory.write({"foreign": {"direct": 4.0}, key: {"direct": 2.0, "winograd tiles": 1.0}})
    assert Algorithms(model, TARGET, allow_winograd=False).choices == {}, "there is one way"
    found = Algorithms(model, TARGET)
    assert found.open == {name: list(times)}
    found.settle({name: times})
    # what other ways once took does not count
    memory.write({key: {**memory.read()[key], "long gone": 0.1}})
    found = Algorithms(model, TARGET)
    assert found.choices[name].algorithm == TILES
    assert found.choices[name].milliseconds == {str(way): ms for way, ms in times.items()}
    assert memory.read()["foreign"] == {"direct": 4.0}, "what others kept stays"


def test_a_folder_that_cannot_be_written_only_warns(folder, monkeypatch, caplog):
    (folder / "file").write_text("")
    monkeypatch.setattr(algorithms, "cache_folder", lambda: folder / "file")
    model = layer(channels=3, outputs=5)
    engine = CompiledEngine(model)
    assert engine.algorithms.open
    images = randoms(1, *model.input_shape)
    got = engine.run(images, 1)
    assert "measured layers are not kept" in caplog.text
    assert len(engine.algorithms.choices) == 1
    np.testing.assert_array_equal(engine.run(images, 1), got)
    assert CompiledEngine(model).algorithms.open


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_without_winograd_no_step_is_winograds(folder, monkeypatch, layout):
    """Whatever the rule says, and whatever was measured with it."""
    monkeypatch.setattr(winograd, "pays", lambda *_: True)
    model = layer(channels=13, layout=layout)
    allowed = ways(*first(model), host(), False)
    engines = [CompiledEngine(model, winograd=False)]
    prefer(model, DENSE_TILES if layout[0] == "nm" else TILES)
    engines.append(CompiledEngine(model, winograd=False))
    assert bool(engines[0].algorithms.open) == (len(allowed) > 1)
    assert not engines[1].algorithms.open
    images = randoms(1, *model.input_shape)
    for engine in engines:
        engine.run(images, 1)
        assert not {records.WINOGRAD, records.TILES_CONV} & {s.op for s in products(engine)}
        for choice in engine.algorithms.choices.values():
            assert choice.algorithm in allowed
            assert list(choice.milliseconds) == [str(way) for way in allowed]


@pytest.mark.parametrize("pays", [False, True])
def test_small_layers_follow_the_rule(folder, monkeypatch, pays):
    monkeypatch.setattr(winograd, "pays", lambda *_: pays)
    model = layer(layout=LOW)
    prefer(model, DENSE)
    edge = algorithms.work(*first(model))
    for least, measured in ((edge, True), (edge * 1.001, False)):
        monkeypatch.setattr(algorithms, "MEASURED_FLOPS", least)
        engine = CompiledEngine(model)
        assert bool(engine.algorithms.choices) == measured
        assert not engine.algorithms.open
        (step,) = products(engine)
        assert step.op == (records.WINOGRAD if pays and not measured else records.CONV)
