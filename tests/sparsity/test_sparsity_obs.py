"""One-shot pruning with calibration: against a slow twin, against magnitude, and its promises."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from blocksparse.sparsity import (
    NM,
    Allocation,
    Block,
    Floors,
    Global,
    Layers,
    MaskedWeights,
    OptimalBrainSurgeon,
    Pattern,
    Plan,
    Targets,
    Uniform,
    Unstructured,
    VectorNM,
    l1,
    l2,
    resolve,
    taylor,
)
from blocksparse.sparsity.calibration import Moments

ALL = Layers(first_conv_dense=False, classifier_dense=False)
PATTERNS = [Block(8, 8), Block(8, 8, False), Block(2, 3, False), NM(2, 4), VectorNM(4, 1, 3)]


def network(seed: int = 0) -> nn.Sequential:
    """Return a network with ragged channels, a grouped convolution, and a linear layer."""
    torch.manual_seed(seed)
    made = nn.Sequential(
        nn.Conv2d(3, 20, 3, padding=1),
        nn.BatchNorm2d(20),
        nn.ReLU(),
        nn.Conv2d(20, 13, 3, padding=1, bias=False),
        nn.BatchNorm2d(13),
        nn.ReLU(),
        nn.Conv2d(13, 26, 3, groups=13, bias=False),
        nn.Conv2d(26, 18, 1, stride=2),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(18 * 9, 21),
        nn.ReLU(),
        nn.Linear(21, 5),
    )
    return made.eval()


def images(count: int = 24, seed: int = 1) -> Tensor:
    # Neighbouring pixels are alike, as in photographs.
    noise = torch.randn(count, 3, 4, 4, generator=torch.manual_seed(seed))
    return nn.functional.interpolate(noise, size=8, mode="bilinear")


def plan_for(dense: nn.Module, pattern: Pattern, target: float = 0.5, **kwargs: object) -> Plan:
    return resolve(dense, target=target, pattern=pattern, **kwargs)  # type: ignore[arg-type]


def conforms(mask: np.ndarray, pattern: Pattern) -> bool:
    """Say whether a mask [K, C, T] obeys a pattern, by looking at each block or group."""
    outs, ins, taps = mask.shape
    if isinstance(pattern, VectorNM):
        return all(
            mask[k : k + pattern.vector, c : c + pattern.m, t].any(0).sum() <= pattern.n
            for k in range(0, outs, pattern.vector)
            for c in range(0, ins, pattern.m)
            for t in range(taps)
        )
    assert isinstance(pattern, Block)
    tiles = (
        mask[k : k + pattern.rows, c : c + pattern.cols, slice(None) if pattern.shared else t]
        for k in range(0, outs, pattern.rows)
        for c in range(0, ins, pattern.cols)
        for t in range(1 if pattern.shared else taps)
    )
    return all(tile.all() or not tile.any() for tile in tiles)


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_pattern_floors_and_targets_are_kept(pattern: Pattern) -> None:
    dense = network()
    plan = plan_for(
        dense, pattern, pattern.limit * 0.5 if isinstance(pattern, Block) else pattern.limit
    )
    pruned = copy.deepcopy(dense)
    masked = OptimalBrainSurgeon(rounds=3).prune(pruned, plan, images())
    weights = plan.weights(pruned)
    assert set(masked.masks) == set(weights) != set()
    for layer in plan.pruned:
        mask, weight = masked.masks[layer.param], weights[layer.param]
        assert not weight[~mask].any()
        assert bool(weight[mask].all())  # what stays is not zero by accident
        assert conforms(mask.reshape(*layer.shape[:2], -1).numpy(), pattern)
        largest = int(pattern.sizes(layer.shape).max())
        assert layer.zeros is not None
        assert layer.zeros <= int((~mask).sum()) < layer.zeros + largest
        grid = pattern.grid(layer.shape)
        if grid is not None:  # no block row and no block column is empty
            assert bool(mask.flatten(1).any(1).all())
            assert bool(mask.transpose(0, 1).flatten(1).any(1).all())
    # All others are as they were, but for batch norm and biases.
    for name, value in pruned.state_dict().items():
        if name.endswith("weight") and name not in weights:
            assert torch.equal(value, dense.state_dict()[name]), name
    assert "6.weight" not in weights  # grouped


def outputs_differ(pruned: nn.Module, dense: nn.Module, x: Tensor) -> float:
    with torch.no_grad():
        return float((pruned(x) - dense(x)).square().mean())


@pytest.mark.parametrize("pattern", PATTERNS, ids=str)
def test_outputs_are_nearer_than_with_magnitude(pattern: Pattern) -> None:
    dense = network()
    plan = plan_for(dense, pattern, pattern.limit * 0.5)
    by_magnitude, calibrated = copy.deepcopy(dense), copy.deepcopy(dense)
    masked = MaskedWeights(plan)
    masked.adopt(masked.build(by_magnitude, 1.0))
    masked.impose(by_magnitude)
    OptimalBrainSurgeon().prune(calibrated, plan, images(200))
    fresh = images(100, seed=7)
    want = outputs_differ(by_magnitude, dense, fresh)
    assert outputs_differ(calibrated, dense, fresh) < 0.6 * want


@pytest.mark.parametrize("seed", range(3))
def test_best_blocks_of_a_layer_are_those_of_exhaustive_search(seed: int) -> None:
    """One block of each half goes: the twin tries all, with numpy's least squares for the rest."""
    torch.manual_seed(seed)
    layer = nn.Linear(12, 4, bias=False)
    network = nn.Sequential(layer)
    x = torch.randn(60, 12) @ torch.randn(12, 12)
    dense = layer.weight.detach().double().numpy().copy()
    plan = resolve(
        network, target=1 / 6, pattern=Block(4, 2), layers=ALL, floors=Floors(0.0, False)
    )
    OptimalBrainSurgeon(damping=1e-9).prune(network, plan, x)
    inputs = x.double().numpy()

    def left(dropped: int) -> tuple[float, np.ndarray]:
        kept = np.arange(12) // 2 != dropped
        best = np.zeros((4, 12))
        best[:, kept] = np.linalg.lstsq(inputs[:, kept], inputs @ dense.T, rcond=None)[0].T
        return float(((inputs @ (best - dense).T) ** 2).sum()), best

    _, want = min((left(block) for block in range(6)), key=lambda pair: pair[0])
    np.testing.assert_allclose(layer.weight.detach().numpy(), want, rtol=1e-3, atol=1e-4)


def test_redundant_inputs_cost_nothing() -> None:
    """Channels 8 to 15 repeat channels 0 to 7: half of the blocks can go without a trace."""
    torch.manual_seed(0)
    first, second = nn.Conv2d(3, 16, 3, bias=False), nn.Conv2d(16, 8, 3)
    with torch.no_grad():
        first.weight[8:] = first.weight[:8]
    dense = nn.Sequential(first, nn.ReLU(), second)
    pruned = copy.deepcopy(dense)
    plan = resolve(
        dense,
        target=0.5,
        pattern=Block(8, 8),
        layers=Layers(include=["2"], classifier_dense=False),
        floors=Floors(0.0, False),
    )
    OptimalBrainSurgeon(damping=1e-6).prune(pruned, plan, images())
    assert int((pruned[2].weight == 0).sum()) == second.weight.numel() // 2
    with torch.no_grad():
        torch.testing.assert_close(
            pruned(images(seed=2)), dense(images(seed=2)), rtol=1e-3, atol=1e-4
        )


def test_later_layers_make_up_for_earlier_ones() -> None:
    """The goal is the dense output: a layer with nothing to drop still moves towards it."""
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16))
    x = torch.randn(400, 16)
    pruned = copy.deepcopy(dense)
    plan = resolve(
        dense, target=0.0, pattern=Unstructured(), layers=ALL,
        allocation=Targets([("0", 0.5), ("1", 0.05)]),
    )  # fmt: skip
    OptimalBrainSurgeon(damping=1e-6).prune(pruned, plan, x)
    frozen = nn.Sequential(pruned[0], dense[1])
    assert outputs_differ(pruned, dense, x) < 0.9 * outputs_differ(frozen, dense, x)


def test_same_images_same_weights_and_dtype_kept() -> None:
    dense = network()
    plan = plan_for(dense, Block(8, 8, False))
    results = []
    for _ in range(2):
        pruned = copy.deepcopy(dense)
        OptimalBrainSurgeon().prune(pruned, plan, images())
        results.append(pruned.state_dict())
    for name, value in results[0].items():
        assert torch.equal(value, results[1][name]), name
        assert value.dtype == dense.state_dict()[name].dtype


def test_float32_finds_what_float64_finds() -> None:
    dense = network()
    # One layer: in the next ones, a block that is a tie in one and not in the other shows.
    plan = plan_for(dense, Block(8, 8, False), layers=Layers(include=["3"]))
    single, double = copy.deepcopy(dense), copy.deepcopy(dense).double()
    masks = OptimalBrainSurgeon().prune(single, plan, images()).masks
    wide = OptimalBrainSurgeon().prune(double, plan, images().double()).masks
    assert all(torch.equal(mask, wide[name]) for name, mask in masks.items())
    for (name, value), exact in zip(
        single.state_dict().items(), double.state_dict().values(), strict=True
    ):
        # Moments in float32, and a condition of at most inputs / damping = 2e4.
        torch.testing.assert_close(value.double(), exact.double(), rtol=1e-2, atol=2e-3, msg=name)


def test_global_targets_are_met_together() -> None:
    dense = network()
    plan = plan_for(dense, Block(8, 8, False), 0.5, allocation=Global())
    pruned = copy.deepcopy(dense)
    masked = OptimalBrainSurgeon(rounds=2).prune(pruned, plan, images())
    zeros = {name: int((~mask).sum()) for name, mask in masked.masks.items()}
    assert sum(zeros.values()) >= plan.zeros
    uniform = OptimalBrainSurgeon(rounds=2).prune(
        dense, plan_for(dense, Block(8, 8, False)), images()
    )
    differing = {
        layer.name: abs(zeros[layer.param] - int((~uniform.masks[layer.param]).sum())) / layer.size
        for layer in plan.pruned
    }
    assert max(differing.values()) > 0.05


def test_scale_of_a_layer_that_a_batch_norm_undoes_does_not_count() -> None:
    """Only what the logits move with does, be it among layers or among the rows of a block."""
    dense, scaled = network(), network()
    factors = torch.linspace(0.1, 10.0, 13)
    with torch.no_grad():
        scaled[3].weight *= factors[:, None, None, None]
        scaled[4].running_mean *= factors
        scaled[4].running_var = (scaled[4].running_var + scaled[4].eps) * factors**2 - scaled[4].eps
    torch.testing.assert_close(dense(images()), scaled(images()), rtol=1e-4, atol=1e-5)
    kept = []
    for made in (dense, scaled):
        plan = plan_for(made, Block(8, 8, False), 0.5, allocation=Global())
        masks = OptimalBrainSurgeon(rounds=2).prune(made, plan, images()).masks
        kept.append({name: mask.float().mean().item() for name, mask in masks.items()})
        kept.append(masks["3.weight"])
    assert kept[0] == kept[2]
    assert torch.equal(kept[1], kept[3])


def test_what_is_zero_already_stays_zero() -> None:
    """Even where it would help: inputs 0 and 1 now tell what all the others told before."""
    torch.manual_seed(0)
    layer = nn.Linear(8, 8).requires_grad_(False)
    with torch.no_grad():
        layer.weight[:, :2] = 0.0
    plan = resolve(
        layer,
        target=0.3,
        pattern=Block(2, 2),
        layers=ALL,
        floors=Floors(0.0, False),
        initial="from_model",
    )
    cross = torch.eye(8, dtype=torch.float64)
    cross[:, :2] = 5.0
    seen = Moments(torch.eye(8, dtype=torch.float64), cross, torch.zeros(8, 8, dtype=torch.float64))
    surgeon = OptimalBrainSurgeon(damping=1e-6)
    mask = surgeon._prune_layer(layer, plan.pruned[0], plan, seen, torch.ones(8))
    assert not mask[:, :2].any()
    assert int((~mask).sum()) == 20  # 16 before, and one block to reach 30 %
    assert not layer.weight[~mask].any()


def test_progress_and_names_in_errors() -> None:
    dense = network()
    plan = plan_for(dense, Block(4, 4))
    seen: list[str] = []
    OptimalBrainSurgeon(rounds=1).prune(dense, plan, images(), seen.append)
    names = [layer.name for layer in plan.pruned]
    assert seen == names
    with pytest.raises(ValueError, match=rf"^{names[0]}: its inputs .* not finite"):
        OptimalBrainSurgeon().prune(dense, plan, images() * torch.nan)


def test_layers_whose_inputs_do_not_vary_keep_the_weights_that_stay() -> None:
    torch.manual_seed(0)
    hidden = nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 10))
    dead = nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 8, 1))
    with torch.no_grad():
        for value in (dead[0].weight, dead[0].bias):
            value.zero_()
        nn.init.uniform_(dead[1].bias, 0.5, 2.0)
    for made, last, seen in (
        (hidden, "2", 50.0 * torch.rand(1, 16)),
        (dead.eval(), "3", torch.randn(24, 3, 8, 8)),
    ):
        before, want = copy.deepcopy(made.state_dict()), made(seen)
        plan = plan_for(made, Unstructured(), layers=ALL)
        mask = OptimalBrainSurgeon().prune(made, plan, seen).masks[f"{last}.weight"]
        weight = made.get_submodule(last).weight
        torch.testing.assert_close(weight[mask], before[f"{last}.weight"][mask])
        assert not mask.all()
        torch.testing.assert_close(made(seen), want, rtol=1e-4, atol=1e-4)  # the bias sees to it


def test_inputs_that_hardly_vary_are_fitted_as_in_float64() -> None:
    torch.manual_seed(0)
    dense = nn.Sequential(nn.Linear(128, 16))
    seen = 1.0 + 0.013 * torch.randn(512, 4) @ torch.randn(4, 128) / 2.0
    plan = plan_for(dense, Unstructured(), layers=ALL)
    errors = []
    for made, x in ((copy.deepcopy(dense), seen), (copy.deepcopy(dense).double(), seen.double())):
        OptimalBrainSurgeon(rounds=2).prune(made, plan, x)
        errors.append(outputs_differ(made, dense.to(x), x))
    assert errors[0] == pytest.approx(errors[1], rel=0.1)


@pytest.mark.parametrize("allocation", [Uniform(), Global()])
def test_least_squares_without_a_solution_name_the_layer(allocation: Allocation) -> None:
    torch.manual_seed(0)
    made = nn.Sequential(nn.Linear(64, 8))
    plan = plan_for(made, Unstructured(), layers=ALL, allocation=allocation)
    few = torch.randn(5, 64)  # 64 inputs, of which 4 are independent
    with pytest.raises(ValueError, match=r"^0: its inputs .*calibration\.damping=1e-30.*raise it"):
        OptimalBrainSurgeon(damping=1e-30).prune(made, plan, few)


@pytest.mark.parametrize("key", ["images", "damping", "rounds"])
def test_settings_that_cannot_be_are_refused(key: str) -> None:
    with pytest.raises(ValueError, match=rf"calibration\.{key} is 0"):
        OptimalBrainSurgeon(**{key: 0})


@pytest.mark.parametrize("allocation", [Uniform(), Global()])
def test_what_ranks_weights_does_not_rank_what_calibration_found(allocation) -> None:
    dense = network()
    masks = []
    for score in (l2, l1, taylor):
        plan = plan_for(dense, Block(8, 8, False), allocation=allocation, score=score)
        pruned = copy.deepcopy(dense)
        masks.append(OptimalBrainSurgeon(rounds=2).prune(pruned, plan, images()).masks)
    for other in masks[1:]:
        assert all(torch.equal(mask, masks[0][name]) for name, mask in other.items())
