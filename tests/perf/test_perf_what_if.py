"""What-if: which layers, how sparse, how many bytes, and where a layer breaks even."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from torch import nn

from blocksparse.export import export_model
from blocksparse.format import BsrWeight, DenseWeight, NMWeight, check_model, write
from blocksparse.perf.masked_models import Choice, densify, find_layers, mask_model
from blocksparse.perf.random_masks import Blocks, Groups
from blocksparse.perf.timing import Timing
from blocksparse.perf.what_if import LADDER, _layer_figures, what_if
from blocksparse.perf.what_if_figures import LayerTime, break_even
from blocksparse.runtime import load, reference
from blocksparse.runtime.tolerance import tolerance
from blocksparse.sparsity import NM, Block, resolve

PRUNED = ("3", "6", "10")  # of the network below


def network(channels=16):
    """Stem, 3x3, depthwise, 1x1, one too narrow for blocks, two linear layers."""
    c = channels
    return nn.Sequential(
        nn.Conv2d(3, c, 3, padding=1),
        nn.BatchNorm2d(c),
        nn.ReLU(),
        nn.Conv2d(c, 2 * c, 3, padding=1, stride=2),
        nn.ReLU(),
        nn.Conv2d(2 * c, 2 * c, 3, padding=1, groups=2 * c),
        nn.Conv2d(2 * c, 2 * c, 1),
        nn.Conv2d(2 * c, 2, 1),
        nn.AdaptiveAvgPool2d(3),
        nn.Flatten(),
        nn.Linear(18, 40),
        nn.ReLU(),
        nn.Linear(40, 5),
    )


@pytest.fixture(scope="module")
def model():
    return export_model(network(), (3, 12, 12))


@pytest.fixture(scope="module")
def found(model):
    return what_if(model, [0.75, 0.5], Blocks(), batch=2, threads=1, rounds=3)


# which layers


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [(Blocks(), Block()), (Groups(2, 4), NM(2, 4)), (Groups(20, 40), NM(20, 40))],
)
def test_the_same_layers_stay_dense_as_in_training_for_the_same_reasons(model, ours, theirs):
    # of N:M all it can give, or layers are pruned with a remark
    target = theirs.limit if theirs.limit < 1 else 0.25
    plan = resolve(network(), target=target, pattern=theirs)
    expected = {layer.name: layer.reason for layer in plan.layers}
    layers = find_layers(model, ours, Choice())
    assert {layer.name: layer.reason for layer in layers} == expected
    assert [layer.shape for layer in layers] == [layer.shape for layer in plan.layers]
    assert "" in expected.values()


def test_what_stays_dense_can_be_chosen(model):
    choice = Choice(first_conv_dense=False, classifier_dense=False, dense=["1*"])
    reasons = {layer.name: layer.reason for layer in find_layers(model, Groups(), choice)}
    assert reasons["0"] == ""
    assert reasons["10"] == reasons["12"] == "in dense"
    choice = replace(choice, dense=())
    assert {x.name: x.reason for x in find_layers(model, Groups(), choice)}["12"] == ""


def test_a_network_without_linear_layers_has_a_convolution_for_classifier():
    convs = nn.Sequential(nn.Conv2d(3, 16, 1), nn.Conv2d(16, 16, 1), nn.Conv2d(16, 8, 1))
    model = export_model(nn.Sequential(convs, nn.AdaptiveAvgPool2d(1), nn.Flatten()), (3, 4, 4))
    reasons = [layer.reason for layer in find_layers(model, Blocks(4, 4), Choice())]
    assert reasons == ["first convolution", "", "classifier"]


def test_nothing_left_to_prune_is_an_error_that_lists_why(model):
    with pytest.raises(ValueError, match=r"first convolution.*the floors keep every unit"):
        find_layers(model, Blocks(64, 64), Choice())


def test_a_glob_that_matches_nothing_is_an_error_that_lists_the_layers(model):
    with pytest.raises(ValueError, match=r"'conv9' matches no layer.*0; 3; 5"):
        find_layers(model, Blocks(), Choice(dense=["conv9"]))


# models


@pytest.mark.parametrize(
    ("pattern", "kind"), [(Blocks(8, 8), BsrWeight), (Groups(2, 4), NMWeight)], ids=str
)
def test_masks_are_as_sparse_as_asked_and_only_where_they_belong(model, pattern, kind):
    layers = find_layers(model, pattern, Choice())
    masked = mask_model(densify(model), layers, pattern, 0.5)
    check_model(masked)
    for layer in layers:
        weight = masked.weights[layer.name]
        assert isinstance(weight, DenseWeight if layer.reason else kind)
        if not layer.reason:
            slack = 64 * np.prod(layer.shape[2:]) / np.prod(layer.shape)  # one block
            if layer.name == "10" and kind is NMWeight:  # the last 2 of 18 inputs: a group of 2:2
                slack = -1 / 18
            assert min(0, slack) - 1e-9 <= 0.5 - weight.density <= max(0, slack)


def test_the_zeros_of_a_pruned_model_do_not_add_to_the_mask(model):
    layers = find_layers(model, Blocks(), Choice())
    pruned = mask_model(densify(model), layers, Blocks(), 0.75)
    filled = densify(pruned)
    for name, weight in filled.weights.items():
        assert isinstance(weight, DenseWeight)
        assert weight.density == 1.0
        old = pruned.weights[name].to_dense()
        assert np.array_equal(weight.values[old != 0], old[old != 0])
    again = mask_model(filled, layers, Blocks(), 0.25)
    assert again.weights["6"].density == 0.75
    empty = replace(model, weights={n: DenseWeight(0 * w.values) for n, w in model.weights.items()})
    assert all(weight.density == 1.0 for weight in densify(empty).weights.values())


def test_activations_keep_their_scale(model):
    images = np.random.default_rng(0).standard_normal((4, 3, 12, 12)).astype(np.float32)
    layers = find_layers(model, Blocks(), Choice())
    weights = mask_model(densify(model), layers, Blocks(), 0.9).weights
    for layer in layers:
        norm, dense = (np.linalg.norm(w[layer.name].to_dense()) for w in (weights, model.weights))
        assert norm == pytest.approx(dense, rel=0.4)
    masked = replace(model, weights=weights)
    expected = reference.run(masked, images)
    allowed = tolerance(masked, np.abs(expected).max())
    assert np.abs(load(masked, threads=1)(images) - expected).max() <= allowed


# figures


def test_bytes_are_those_of_the_files(model, found, tmp_path):
    dense = densify(model)
    layers = find_layers(model, Blocks(), Choice())
    for row in (found.dense, *found.levels):
        same = dense if row is found.dense else mask_model(dense, layers, Blocks(), row.sparsity)
        write(tmp_path / "model", same)
        assert row.file_bytes == (tmp_path / "model").stat().st_size


def test_kept_shares_are_counted_by_hand(model, found):
    assert [layer.name for layer in found.layers] == list(PRUNED)
    full = {"3": 32 * 16 * 9, "6": 32 * 32, "10": 40 * 18}
    others = sum(p.numel() for name, p in network().named_parameters() if not name.startswith("1."))
    for row in found.levels:
        # Of 4 x 2 blocks the floors keep 4, of 4 x 4 they keep 4, too. Of 5 x 3, with the last
        # column 2 wide, it depends on which are kept.
        kept = max(1 - row.sparsity, 1 / 2) * full["3"] + max(1 - row.sparsity, 1 / 4) * full["6"]
        last = next(x for x in found.layers if x.name == "10").times
        kept += full["10"] * next(1 - t.sparsity for t in last if t.asked == row.sparsity)
        assert row.prunable_kept == pytest.approx(kept / sum(full.values()))
        gone = sum(full.values()) - kept
        assert row.parameters_kept == pytest.approx(1 - gone / others)
    assert found.dense.prunable_kept == found.dense.parameters_kept == 1


def test_levels_rise_and_layers_are_timed_on_the_whole_ladder(found):
    assert [row.sparsity for row in found.levels] == [0.5, 0.75]
    assert found.dense.speedup == 1
    assert (found.batch, found.threads, found.pattern) == (2, 1, "block 8x8 shared")
    for layer in found.layers:
        assert tuple(time.asked for time in layer.times) == LADDER
        assert all(0 < time.q1_ms <= time.ms <= time.q3_ms for time in layer.times)
        assert 0 < layer.dense_q1_ms <= layer.dense_ms <= layer.dense_q3_ms
        assert layer.times[0].sparsity == 0
        assert layer.break_even == break_even(
            [(time.sparsity, time.q3_ms) for time in layer.times], layer.dense_q1_ms
        )
        assert layer.ms_at(0.75) == layer.times[3].ms
    assert 0 < sum(layer.dense_share for layer in found.layers) < 1
    assert {layer.name for layer in found.left_dense} == {"0", "5", "7", "12"}


def test_a_layer_that_computes_a_tenth_takes_less_time():
    wide = export_model(network(128), (3, 24, 24))
    found = what_if(wide, [0.9], Blocks(), threads=1, rounds=9)
    layer, pointwise, linear = found.layers
    assert layer.dense_ms > pointwise.dense_ms > linear.dense_ms  # 42, 9 and 0.001 million products
    assert layer.ms_at(0.9) < 0.6 * layer.dense_ms
    assert layer.break_even is not None
    assert layer.dense_share > 0.2


@pytest.mark.parametrize(
    ("quartiles", "verdict"),
    [
        ((0.7, 0.8), "faster"),
        ((0.7, 0.95), "within spread"),  # the median alone says faster
        ((0.95, 1.2), "within spread"),
        ((1.05, 1.3), "within spread"),  # the median alone says slower
        ((1.2, 1.3), "slower"),
    ],
)
def test_a_layer_is_faster_or_slower_where_quartiles_lie_apart(found, quartiles, verdict):
    low, high = quartiles
    layer = replace(
        found.layers[0], dense_ms=1.0, dense_q1_ms=0.9, dense_q3_ms=1.1,
        times=(LayerTime(0.5, 0.5, (low + high) / 2, low, high),),
    )  # fmt: skip
    one = replace(found, layers=(layer,))
    assert one.slower_than_dense(0.5) == ([layer] if verdict == "slower" else [])
    assert one.within_spread(0.5) == ([layer] if verdict == "within spread" else [])
    assert layer.faster(0.5) == (verdict == "faster")


def test_noise_is_no_break_even(found):
    # medians of 0.98 and 0.97 of dense, within its quartiles
    sparse = [Timing(0.98, 0.9, 1.1, 0.9, 9), Timing(0.97, 0.9, 1.1, 0.9, 9)]
    times = {"dense": {"3": Timing(1.0, 0.9, 1.1, 0.9, 9)}}
    times |= {str(level): {"3": timing} for level, timing in zip((0.0, 0.5), sparse, strict=True)}
    layers = [layer for layer in found.layers if layer.name == "3"]
    model = SimpleNamespace(weights={"3": SimpleNamespace(density=0.5)})
    figures = _layer_figures(layers[0], {0.0: model, 0.5: model}, times)
    assert figures.break_even is None


def test_a_pattern_of_one_sparsity_is_measured_there_only(model):
    found = what_if(model, [], Groups(2, 4), threads=1, rounds=1)
    assert [row.sparsity for row in found.levels] == [0.5]
    assert all([time.asked for time in x.times] == [0.5] for x in found.layers)
    assert all(layer.break_even in (0.0, None) for layer in found.layers)


def test_progress_rises_to_one(model):
    told = []
    what_if(model, [0.5], Blocks(), threads=1, rounds=2, on_progress=lambda *x: told.append(x))
    shares = [share for _, share in told]
    assert shares == sorted(shares)
    assert shares[-1] == pytest.approx(1)
    assert list(dict.fromkeys(what for what, _ in told)) == [
        "making networks",
        "timing networks",
        "timing layers",
    ]


@pytest.mark.parametrize("sparsities", [[], [1.0], [-0.1], [float("nan")], [0.5, 75]])
def test_sparsities_that_cannot_be_had(model, sparsities):
    with pytest.raises(ValueError, match="sparsity"):
        what_if(model, sparsities, Blocks())


@pytest.mark.parametrize(
    ("times", "expected"),
    [
        ([0.9, 0.8, 0.1], 0.0),
        ([1.2, 0.8, 0.1], 0.25),
        ([1.0, 0.5, 0.1], 0.0),  # as fast with nothing dropped, faster from there on
        ([2.0, 1.5, 0.5], 0.7),
        ([0.9, 1.5, 0.5], 0.7),  # from which on it stays faster
        ([1.5, 1.2, 1.0], None),
        ([0.5, 0.8, 1.1], None),
    ],
)
def test_break_even_is_where_the_lines_cross_for_good(times, expected):
    points = list(zip((0.0, 0.5, 0.9), times, strict=True))
    assert break_even(points, 1.0) == (None if expected is None else pytest.approx(expected))
