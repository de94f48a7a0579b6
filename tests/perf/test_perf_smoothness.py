"""Time grows evenly with batch, size and threads; ratios only, and what they are made from."""

from __future__ import annotations

import math
from contextlib import closing

import numpy as np
import pytest
import torch
from torch import nn

from benchmarks import smoothness
from benchmarks.series import Call, Point, Share, _reasons, beside, points, resized, shares, ways
from benchmarks.smoothness import BATCH, BATCHES, SIZES, Result, Scaling, page, scaling
from blocksparse.export import export_model
from blocksparse.format import check_model, read
from blocksparse.perf import Timing, interleave, usable_cores
from blocksparse.perf.masked_models import Choice, find_layers, mask_model
from blocksparse.perf.random_masks import Blocks
from blocksparse.runtime import load
from blocksparse.runtime.tolerance import tolerance

CLIFF = 1.35  # times what its neighbours take per pixel: far more than noise
SERIES = 5  # of measurements at most: a cliff stays, what a busy machine shows does not
BETTER = 1.1  # times the time of an image alone that one in a batch may take


def small():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1, stride=2),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1),
        nn.MaxPool2d(2),
        nn.Conv2d(32, 32, 1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(32, 5),
    ).eval()


def layer(kernel, channels=128, size=14):
    """One sparse convolution: large beside what a call costs, small beside the last cache."""
    network = nn.Sequential(
        nn.Conv2d(channels, channels, kernel, padding=kernel // 2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )
    model = export_model(network, (channels, size, size))
    layers = find_layers(model, Blocks(), Choice(first_conv_dense=False, classifier_dense=False))
    return mask_model(model, layers, Blocks(), 0.75)


# what the ratios are made from


@pytest.mark.slow
@pytest.mark.parametrize("size", [11, 12, 17, 30])
def test_a_resized_model_computes_what_the_network_computes(size):
    network = small()
    model = resized(export_model(network, (3, 12, 12)), size)
    check_model(model)
    images = torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        expected = network(images).numpy()
    with closing(load(model, threads=1)) as ours:
        allowed = tolerance(model, float(np.abs(expected).max()))
        np.testing.assert_allclose(ours(images.numpy()), expected, rtol=0, atol=allowed)


def test_a_size_that_does_not_fit_names_the_layer():
    network = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8 * 100, 5))
    model = export_model(network, (3, 12, 12))
    with pytest.raises(ValueError, match="images of 14x14 do not fit 2: "):
        resized(model, 14)


def test_neighbours_are_two_on_either_side_and_never_the_point_itself():
    assert beside([1.0, 1.0, 9.0, 1.0, 1.0]) == [5.0, 1.0, 1.0, 1.0, 5.0]
    assert beside([4.0, 2.0]) == [2.0, 4.0]


def test_points_and_page():
    model = export_model(small(), (3, 32, 32))
    calls = [Call(model, batch, 1) for batch in BATCHES]
    batches = points(BATCHES, calls, rounds=2, seconds=0.0)
    assert [point.at for point in batches] == list(BATCHES)
    for point, call in zip(batches, calls, strict=True):
        assert point.each * call.pixels == pytest.approx(1e6 * point.timing.median_ms)
        assert point.work == pytest.approx(1.0)
        assert (len(point.layers) > 0) == (point.ratio >= 1.1)
    assert ways(calls[0].trace())["0"] == "direct"  # strided
    scaled = scaling(model, (1, BATCH), 2, rounds=2)
    assert [row.batch for row in scaled] == [1, BATCH]
    for row in scaled:
        names = {node.name for node in model.graph.nodes}
        assert {each.name for each in row.shares} <= names
        assert all(0 <= each.idle <= 0.5 for each in row.shares)  # of two threads
    text = page(Result("small", 0.75, 32, 2, "today", "here", "command", batches, batches, scaled))
    assert "## 2 threads against one, 8 images" in text
    assert f"| {BATCH} | " in text
    for call in calls:
        call.network.close()


class Noted(Call):
    """A call that notes when it runs."""

    def __init__(self, batch, notes):
        super().__init__(export_model(small(), (3, 16, 16)), batch, 1)
        self.notes = notes

    def __call__(self):
        if hasattr(self, "notes"):
            self.notes.append((len(self.images), "run"))
        return super().__call__()

    def trace(self):
        self.notes.append((len(self.images), "trace"))
        return super().trace()


def test_layers_are_traced_as_calls_are_timed_warm_and_in_alternating_order():
    notes = []
    calls = [Noted(batch, notes) for batch in (1, 2, 3)]
    _reasons(calls, rounds=3)
    for call in calls:
        call.network.close()
    turns = [(batch, what) for batch in (1, 2, 3, 3, 2, 1, 1, 2, 3) for what in ("run", "trace")]
    assert notes == turns


def timing(ms, spread=1.0):
    return Timing(ms, ms, ms * spread, ms, 10)


def figures(threads=2, spoiled=""):
    """A page's figures, one of them spoiled by a busy machine."""
    spread = {name: 1.3 if name == spoiled else 1.0 for name in ("batch", "size", "one", "several")}
    batches = tuple(
        Point(n, timing(4.0, spread["batch"] if n == BATCH else 1.0), 1.0, 1.0, 1.0, ())
        for n in BATCHES
    )
    sizes = (Point(160, timing(4.0, spread["size"]), 1.0, 1.0, 1.0, ()),)
    layers = (Share("conv", "direct", 4.0, 2.0, 0.0),)
    scaled = Scaling(1, timing(4.0, spread["one"]), timing(2.0, spread["several"]), layers)
    return Result("small", 0.75, 32, threads, "today", "here", "command", batches, sizes, (scaled,))


@pytest.mark.parametrize(
    ("spoiled", "named"),
    [
        ("batch", "8 images of 32x32"),
        ("size", "1 image of 160x160 among sizes"),
        ("one", "1 image on one thread"),
        ("several", "1 image on 2 threads"),
    ],
)
def test_page_of_a_busy_machine_is_not_to_be_quoted(spoiled, named):
    assert "Not to be quoted" not in page(figures())
    text = page(figures(spoiled=spoiled))
    assert "**Not to be quoted.**" in text
    assert f"the quartiles of {named} lie" in text


def test_one_thread_is_not_compared_with_itself(monkeypatch):
    monkeypatch.setattr(smoothness, "BATCHES", (1, BATCH))
    monkeypatch.setattr(smoothness, "SIZES", (16, 20))
    chosen = smoothness.parse(["--threads", "1", "--rounds", "1", "--seconds", "0"])
    text = page(smoothness.measure(export_model(small(), (3, 16, 16)), chosen))
    assert "against one" not in text
    assert "computed" not in text  # the table of layers
    assert "# Smoothness of resnet18, 75 % sparse, 1 thread\n" in text


def test_shares_know_who_waits():
    model = export_model(small(), (3, 64, 64))
    one, two = Call(model, 4, 1), Call(model, 4, 2)
    with closing(one.network), closing(two.network):
        rows = {row.name: row for row in shares(one, two, 3)}
    assert all(row.one_ms > 0 and row.several_ms > 0 for row in rows.values())
    assert {row.way for row in rows.values()} >= {"", "direct"}


# the ratios


@pytest.mark.slow
@pytest.mark.parametrize("kernel", [1, 3])
def test_one_layer_takes_as_long_per_image_at_any_batch(kernel):
    model = layer(kernel)
    calls = {str(batch): Call(model, batch, 1) for batch in BATCHES}
    each = [math.inf] * len(calls)
    for _ in range(SERIES):
        timings = interleave(calls, rounds=12)
        # The best of several, for other programs only ever add time.
        found = [timings[str(batch)].best_ms / batch for batch in BATCHES]
        each = [min(pair) for pair in zip(each, found, strict=True)]
        ratios = [own / other for own, other in zip(each, beside(each), strict=True)]
        if max(ratios) < CLIFF:
            break
    for call in calls.values():
        call.network.close()
    assert max(ratios) < CLIFF, ratios


@pytest.fixture(scope="module")
def resnet18(tmp_path_factory):
    from benchmarks.exports import sparse_file

    file, _ = sparse_file("resnet18", 224, 0.75, tmp_path_factory.mktemp("resnet18"))
    return read(file)


@pytest.fixture(scope="module")
def two_cores():
    if usable_cores() < 2:
        pytest.skip("compares two threads with one, which needs two cores; this process has one")


@pytest.mark.long
@pytest.mark.usefixtures("two_cores")
def test_no_batch_of_a_network_falls_off_a_cliff(resnet18):
    calls = [Call(resnet18, batch, 2) for batch in BATCHES]
    found = points(BATCHES, calls, rounds=15, seconds=0.0)
    assert max(point.ratio for point in found) < CLIFF, found
    assert found[BATCH - 1].each < BETTER * found[0].each


@pytest.mark.long
@pytest.mark.usefixtures("two_cores")
def test_no_size_of_a_network_falls_off_a_cliff(resnet18):
    calls = [Call(resized(resnet18, size), 1, 2) for size in SIZES]
    found = points(SIZES, calls, rounds=15, seconds=0.0)
    assert max(point.ratio for point in found) < CLIFF, found


@pytest.mark.long
@pytest.mark.usefixtures("two_cores")
def test_a_second_thread_helps(resnet18):
    alone, batch = scaling(resnet18, (1, BATCH), 2, rounds=20)
    assert alone.times > 1.3
    assert batch.times > 1.6
