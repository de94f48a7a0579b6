"""One image in halves: what is cut, what one half reads of the other, and that nothing changes."""

from __future__ import annotations

import time

import numpy as np
import pytest
from bare import Helpers, engine_of, run_over, shuffled
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from models import POOL, Builder, randoms

from blocksparse.runtime import halves, pieces, reference
from blocksparse.runtime.algorithms import Algorithm, ways
from blocksparse.runtime.kernels import records
from blocksparse.runtime.plan import bind
from blocksparse.runtime.steps import lower
from blocksparse.runtime.tolerance import tolerance


@pytest.fixture(autouse=True)
def _small_values_are_cut(monkeypatch):
    monkeypatch.setattr(halves, "LEAST_ROWS", 2)


def in_one_piece(engine):
    """The same engine, which does not cut images in halves."""
    engine._bound = lambda steps, batch, threads: bind(engine.model, steps, engine.target, batch)
    return engine


def cut(engine):
    """The steps of an engine in halves."""
    return halves.halve(engine.model, engine.steps)


def names_cut(engine):
    return {name.removesuffix(".upper") for name in cut(engine).halves if name.endswith(".upper")}


# that nothing changes


def extend(b, draw, x):
    """Add one node of any kind behind a feature map; a window may not fit, and then nothing."""
    one = st.integers(1, 3)
    pair = st.tuples(one, one)
    kind = draw(st.sampled_from(KINDS))
    if kind == "conv":
        kernel = draw(st.tuples(st.sampled_from([1, 2, 3, 5, 7]), st.sampled_from([1, 3])))
        return b.conv(
            x, draw(st.sampled_from([3, 8])), kernel, draw(st.sampled_from(LAYOUTS)),
            draw(pair), draw(st.tuples(st.integers(0, 3), st.integers(0, 1))), draw(pair),
            activation=draw(st.sampled_from(["none", "relu", "silu"])),
        )  # fmt: skip
    if kind.endswith("pool2d"):
        kernel = draw(st.tuples(st.integers(1, 6), one))
        extra = (
            {"dilation": draw(pair)}
            if kind == "max_pool2d"
            else {"count_include_pad": draw(st.booleans())}
        )
        return b.node(
            kind, x, kernel=kernel, stride=draw(pair), ceil_mode=draw(st.booleans()),
            padding=(draw(st.integers(0, kernel[0] // 2)), kernel[1] // 2), **extra,
        )  # fmt: skip
    if kind == "add":
        return b.node("add", x, b.conv(x, b.shapes[x][0]), activation="relu6")
    if kind == "residual":
        alike = [name for name, shape in b.shapes.items() if shape[1:] == b.shapes[x][1:]]
        size = draw(st.sampled_from([1, 3]))
        return b.conv(
            draw(st.sampled_from(alike)), b.shapes[x][0], (size, size),
            draw(st.sampled_from(LAYOUTS)), padding=(size // 2, size // 2), residual=x,
        )  # fmt: skip
    if kind == "concat":
        return b.node("concat", b.conv(x, 3), x, b.conv(x, 2, (5, 1), padding=(2, 0)))
    if kind == "slice":
        channels, height, width = b.shapes[x]
        return b.node("slice", x, start=(0, height // 3, 0), stop=(channels, height, width),
                      step=(1, draw(one), 1))  # fmt: skip
    if kind == "part":
        channels, height, width = b.shapes[x]
        return b.node("slice", x, start=(channels // 2, 0, 0), stop=(channels, height, width),
                      step=(1, 1, 1))  # fmt: skip
    if kind == "pad":
        return b.node("pad", x, before=(0, draw(one), 1), after=(0, 0, 0))
    if kind == "gate":
        gate = b.node("adaptive_avg_pool2d", x, output_size=(1, 1))
        return b.node("mul", x, b.node("activation", gate, activation="sigmoid"))
    if kind == "affine":
        return b.node("affine", x, activation="relu")
    return b.node("activation", x, activation="silu")


KINDS = [
    "conv", "max_pool2d", "avg_pool2d", "add", "concat", "slice", "pad", "gate", "affine", "silu",
    "residual", "part",
]  # fmt: skip
LAYOUTS = ["dense", ("bsr", (8, 8), 0.5), ("nm", 2, 4)]


@st.composite
def networks(draw):
    """A network of a few nodes, and the way each convolution is computed."""
    b = Builder((draw(st.sampled_from([3, 8])), draw(st.integers(1, 26)), draw(st.integers(1, 20))))
    x = "x"
    for _ in range(draw(st.integers(1, 5))):
        try:
            x = extend(b, draw, draw(st.sampled_from([x, *b.shapes])))
        except ValueError:  # the window is larger than the image
            continue
    end = draw(st.sampled_from(["map", "average", "flat"]))
    if end == "average" or not b.nodes:
        x = b.node("adaptive_avg_pool2d", x, output_size=draw(st.sampled_from([(1, 1), (2, 3)])))
    if end == "flat":
        b.node("flatten", x)
    return b.model(), draw(st.integers(0, 2**31 - 1))


def with_ways(model, lanes, seed):
    """An engine whose convolutions go some way each, the same for the same seed."""
    engine, rng = engine_of(model, lanes), np.random.default_rng(seed)
    chosen = {}
    for node in model.graph.nodes:
        if node.op == "conv2d":
            found = list(ways(node, model.weights[node.name], engine.target, True))
            chosen[node.name] = found[rng.integers(len(found))]
    engine._pieces = pieces.cut(lower(model, engine.target, chosen))
    return engine


def adds_otherwise(plan):
    """Whether some sums depend on where an image is cut: Winograd's tiles, and pixels of a tail."""
    winograd = {records.WINOGRAD, records.TILES_CONV, records.LINES_CONV}
    return any(
        record[records.OP] in winograd
        or (record[records.OP] == records.CONV and record[records.TAIL])
        or (record[records.OP] == records.ADAPTIVE_POOL and record[records.JOINED])
        for record in plan.records
    )


@pytest.mark.parametrize("lanes", [4, 16])
@settings(deadline=None)
@given(networks(), st.integers(2, 4))
def test_halves_compute_what_the_whole_does(lanes, network, threads):
    """Over memory full of NaN; to the last bit where all adds up in the same order."""
    model, seed = network
    x = randoms(1, *model.input_shape, seed=seed % 99)
    whole, in_whole, _ = run_over(in_one_piece(with_ways(model, lanes, seed)), x, np.nan)
    output, in_halves, _ = run_over(with_ways(model, lanes, seed), x, np.nan, threads)
    if not any(adds_otherwise(plan) for plan in (in_whole, in_halves)):
        np.testing.assert_array_equal(output, whole)
    expected = reference.run(model, x)
    # a max pool's window may see padding alone, through dilation: then there are infinities
    assume(np.isfinite(expected).all())
    # a feature map, not logits: a sum may be clamped, and its roundings are as large as its terms
    allowed = 20 * tolerance(model, float(np.abs(expected).max()))
    np.testing.assert_allclose(output, expected, rtol=0, atol=allowed)


def stages():
    """A network whose last stage is too low to be cut, and what is left whole."""
    b = Builder((3, 17, 9))
    x = b.conv("x", 8)
    low = b.conv(x, 16, stride=(2, 2))  # 9 rows
    y = b.conv(low, 8, kernel=(1, 1), padding=(0, 0))
    b.node("concat", y, b.node("max_pool2d", x, dilation=(1, 1), **POOL))
    return b.model()


@pytest.mark.parametrize("least", [2, 12])
@pytest.mark.parametrize("threads", [2, 3, 9])
def test_any_number_of_threads_and_any_order_of_items(monkeypatch, least, threads):
    monkeypatch.setattr(halves, "LEAST_ROWS", least)
    engine, x = engine_of(stages()), randoms(1, 3, 17, 9)
    expected = in_one_piece(engine_of(stages())).run(x, 1)
    np.testing.assert_allclose(engine.run(x, threads), expected, rtol=1e-5, atol=1e-5)
    again = engine.run(x, 2)
    engine._helpers.close()  # nobody waits any more
    engine._helpers = Helpers()  # who never come
    np.testing.assert_array_equal(engine.run(x, threads), again)
    shuffled(engine._helpers.calls[0], again)


def test_nobody_waits_for_a_helper_that_never_comes():
    """A wait for the other half is some hundred microseconds, a step of this network a few."""
    b = Builder((8, 12, 12))
    x = "x"
    for _ in range(12):
        x = b.conv(x, 8)
    engine, images = engine_of(b.model()), randoms(1, 8, 12, 12)
    helpers, alone, deserted = engine._helpers, [], []
    for _ in range(30):
        engine._helpers = helpers
        start = time.perf_counter()
        engine.run(images, 1)
        engine._helpers = Helpers()
        middle = time.perf_counter()
        engine.run(images, 2)
        alone.append(middle - start)
        deserted.append(time.perf_counter() - middle)
    assert np.median(deserted) < 4 * np.median(alone)


# what is cut


def test_a_stage_too_low_stays_whole_and_reads_both_halves(monkeypatch):
    monkeypatch.setattr(halves, "LEAST_ROWS", 12)
    engine = engine_of(stages())
    assert names_cut(engine) == {"x", "conv2d0"}
    joining = [step for step in cut(engine).steps if step.joins is not None]
    assert [step.op for step in joining] == [records.COPY, records.POOL]
    assert all(step.source.endswith(".upper") and not step.joined for step in joining)


@pytest.mark.parametrize(
    ("kernel", "stride", "is_cut"),
    [((5, 5), (1, 1), True), ((6, 1), (1, 1), False), ((3, 3), (1, 3), False)],
)
def test_average_pools_that_divide_as_they_go_stay_whole(kernel, stride, is_cut):
    b = Builder((4, 20, 20))
    b.node("avg_pool2d", "x", kernel=kernel, stride=stride, padding=(1, 0), ceil_mode=False,
           count_include_pad=False)  # fmt: skip
    assert bool(names_cut(engine_of(b.model()))) is is_cut


# what one half reads of the other


def test_only_the_copies_at_the_border_read_the_other_half():
    steps = cut(engine_of(stages()))
    of_half = steps.halves
    crossing = [
        step for step in steps.steps
        if step.rows is not None and of_half[step.source] != of_half[step.target]
    ]  # fmt: skip
    assert crossing
    assert all(step.details.get("halo") for step in crossing)
    # 3x3 at stride 1 reads a row on either side. Of 17 rows the upper half has 9, and 5 outputs at
    # stride 2 read 6 rows of either phase, 11 in all; the other outputs begin with row 9
    rows = [(step.source, step.rows.height) for step in crossing]
    assert rows == [
        ("x.lower", 1), ("x.upper", 1), ("conv2d0.lower", 2), ("conv2d0.upper", 0),
    ]  # fmt: skip


def test_an_average_of_both_halves_needs_no_rows_around_them():
    """EfficientNet-B0 took 37 MB in place of 12, and twice as long, when every half kept both."""
    b = Builder((8, 40, 24))
    x = b.conv("x", 16)
    gate = b.node("adaptive_avg_pool2d", x, output_size=(1, 1))
    x = b.node("mul", x, b.conv(gate, 16, (1, 1), padding=(0, 0), activation="sigmoid"))
    b.conv(x, 8)
    engine = engine_of(b.model())
    steps = cut(engine)
    means = [step for step in steps.steps if step.op == records.ADAPTIVE_POOL]
    assert [step.source for step in means] == ["conv2d0.upper", "conv2d0.lower"]
    crossing = [step for step in steps.steps if step.details.get("halo")]
    for step in steps.steps:
        if step.rows is not None and step not in crossing:
            assert steps.halves.get(step.source, step.rows.half) == step.rows.half
    assert [(step.source, step.rows.height) for step in crossing] == [
        ("x.lower", 1), ("x.upper", 1), ("mul3.lower", 1), ("mul3.upper", 1),
    ]  # fmt: skip
    whole, halves = (engine._plan(1, threads).plan.floats for threads in (1, 2))
    assert halves < 1.25 * whole  # and what surrounds two maps in place of one


def test_the_last_average_reads_both_halves():
    """It writes a vector, which is nobody's half."""
    b = Builder((8, 40, 24))
    x = b.node("adaptive_avg_pool2d", b.conv("x", 16), output_size=(1, 1))
    b.linear(b.node("flatten", x), 10)
    engine, x = engine_of(b.model()), randoms(1, 8, 40, 24)
    (mean,) = (step for step in cut(engine).steps if step.op == records.ADAPTIVE_POOL)
    assert (mean.source, mean.other) == ("conv2d0.upper", "conv2d0.lower")
    expected = reference.run(b.model(), x)
    np.testing.assert_allclose(engine.run(x, 2), expected, rtol=1e-5, atol=1e-5)


def test_the_halves_share_no_memory():
    engine = engine_of(stages())
    plan = engine._plan(1, 2).plan
    places = {0: set(), 1: set()}
    steps = cut(engine).steps
    for record, step in zip(plan.records, steps, strict=True):
        if step.rows is not None and step.op != records.STORE:
            to = records.layout_at(record, records.TARGET)
            first = to.base - max(to.margin, 0)
            last = to.base + (to.channels - 1) * to.channel + to.run(1) + max(to.margin, 0)
            places[step.rows.half] |= set(range(first // 16, -(-last // 16)))
    assert places[0]
    assert places[1]
    assert not places[0] & places[1]


def test_steps_of_the_two_halves_are_joined():
    engine = engine_of(stages())
    plan = engine._plan(1, 2).plan
    joined = plan.records[:, records.JOINED]
    assert plan.origins[np.flatnonzero(joined)].tolist() == (
        plan.origins[np.flatnonzero(joined) + 1].tolist()
    )
    assert set(plan.origins.tolist()) == set(range(len(engine.steps.steps)))


@pytest.mark.parametrize(
    ("batch", "threads", "halved"), [(1, 2, True), (2, 2, False), (1, 1, False)]
)
def test_one_image_for_several_threads_is_cut(batch, threads, halved):
    engine = engine_of(stages())
    assert engine._plan(batch, threads).plan.records[:, records.JOINED].any() == halved
    engine.run(randoms(batch, 3, 17, 9), threads)
    assert list(engine._ready) == [(batch, halved, pieces.Piece.ALL)]


@pytest.mark.parametrize("count_include_pad", [False, True])
def test_an_average_at_the_edge_of_an_image_divides_by_what_is_there(count_include_pad):
    b = Builder((4, 9, 6))
    b.node("avg_pool2d", "x", kernel=(5, 3), stride=(1, 1), padding=(2, 1), ceil_mode=False,
           count_include_pad=count_include_pad)  # fmt: skip
    x = randoms(1, 4, 9, 6)
    engine = engine_of(b.model())
    assert names_cut(engine)
    np.testing.assert_allclose(engine.run(x, 2), reference.run(b.model(), x), rtol=1e-5, atol=1e-6)


def test_tiles_of_a_half_are_those_of_its_rows():
    b = Builder((8, 32, 64))
    b.conv("x", 8)
    engine = engine_of(b.model(), 16)
    way = next(way for way in Algorithm if way.transforms == "tiles" and not way.dense)
    engine._pieces = pieces.cut(lower(b.model(), engine.target, {"conv2d0": way}))
    plan = engine._plan(1, 2).plan
    tiles = plan.records[plan.records[:, records.OP] == records.TILES_CONV]
    assert tiles[:, records.TILE_ROWS_ALL].tolist() == [4, 4]  # rows of 16 tiles, 4 pixels high


@pytest.mark.parametrize(
    ("batch", "threads", "alone"), [(1, 1, 1), (1, 2, 1), (2, 1, 0), (2, 2, 0)]
)
def test_who_moves_values_alone_goes_along_their_channels(batch, threads, alone):
    """Several share rows, as each wrote some of them; channels of these maps are pages long."""
    b = Builder((16, 112, 112))
    b.node("max_pool2d", "x", dilation=(1, 1), **POOL)
    steps = engine_of(b.model())._plan(batch, threads).plan.records
    pools = steps[steps[:, records.OP] == records.POOL]
    assert len(pools) == (2 if (batch, threads) == (1, 2) else 1)
    assert set(pools[:, records.BY_CHANNELS]) == {alone}
