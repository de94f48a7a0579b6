"""Taylor and movement scores against plain loops, and how they rank."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from blocksparse.sparsity import (
    Block,
    Floors,
    Global,
    GradientScores,
    Layers,
    MaskedWeights,
    layer_mask,
    movement,
    plan_masks,
    resolve,
    taylor,
)
from blocksparse.sparsity.gradient_scores import WINDOW


def step(weight: torch.Tensor, generator: torch.Generator) -> None:
    """A new gradient, and weights that moved."""
    with torch.no_grad():
        weight.add_(0.3 * torch.randn(weight.shape, generator=generator))
    weight.grad = torch.randn(weight.shape, generator=generator)


def gathered(score, steps, seed=0, shape=(5, 6)):
    """The scores of some steps, and the weights and gradients they came from."""
    generator = torch.Generator().manual_seed(seed)
    weight = nn.Parameter(torch.randn(shape, generator=generator))
    scores, seen = GradientScores(score), []
    for _ in range(steps):
        step(weight, generator)
        scores.add({"weight": weight}, [weight])
        seen.append((weight.detach().clone(), weight.grad.clone()))
    return scores, weight, seen


@given(st.integers(1, 30), st.integers(0, 9))
@settings(max_examples=10, deadline=None)
def test_scores_are_their_definitions(steps, seed):
    scores, weight, seen = gathered(taylor, steps, seed)
    got = scores.ranked({"weight": weight}, None)["weight"]
    for k in range(5):
        for c in range(6):
            products = [abs(float(w[k, c]) * float(g[k, c])) for w, g in seen]
            # The mean is kept up to date in float32, with a rounding at every step.
            assert float(got[k, c]) == pytest.approx(sum(products) / steps, rel=1e-6 * steps)
    scores, weight, seen = gathered(movement, steps, seed)
    got = scores.ranked({"weight": weight}, None)["weight"]
    sums = [
        [-sum(float(w[k, c]) * float(g[k, c]) for w, g in seen) for c in range(6)] for k in range(5)
    ]
    lowest = min(map(min, sums))
    for k in range(5):
        for c in range(6):
            assert float(got[k, c]) == pytest.approx(sums[k][c] - lowest, abs=1e-5 * steps)


def test_old_steps_fade_from_taylor():
    scores, weight, seen = gathered(taylor, 3 * WINDOW, shape=(2, 3))
    mean = torch.zeros(2, 3, dtype=torch.float64)
    for index, (w, g) in enumerate(seen):
        mean += ((w * g).abs() - mean) / min(index + 1, WINDOW)
    torch.testing.assert_close(
        scores.ranked({"weight": weight}, None)["weight"], mean, rtol=1e-4, atol=0
    )


def test_movement_ranks_blocks_by_their_sums_whatever_the_signs():
    scores, weight, seen = gathered(movement, 7, shape=(8, 12))
    sums = -sum(w.double() * g.double() for w, g in seen)
    blocks = sums.reshape(2, 4, 3, 4).sum((1, 3)).reshape(-1)
    ranked = scores.ranked({"weight": weight}, None)["weight"]
    mask = layer_mask(ranked, Block(4, 4), 0.5, movement)
    kept = mask.reshape(2, 4, 3, 4)[:, 0, :, 0].reshape(-1)
    assert set(kept.nonzero().flatten().tolist()) == set(blocks.topk(3).indices.tolist())


def test_movement_compares_layers_by_what_the_loss_gains():
    """One weight far down in a layer says nothing about the others of that layer."""
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    plan = resolve(
        model,
        target=0.25,
        pattern=Block(1, 1),
        score=movement,
        allocation=Global(),
        layers=Layers(classifier_dense=False),
        floors=Floors(0.0, False),
    )
    scores, generator = GradientScores(movement), torch.Generator().manual_seed(0)
    for layer in model:
        with torch.no_grad():
            layer.weight.fill_(1.0)
        layer.weight.grad = torch.rand(8, 8, generator=generator)
    model[0].weight.grad[0, 0] = 100.0
    weights = plan.weights(model)
    scores.add(weights, list(weights.values()))
    gains = -torch.cat([layer.weight.grad.reshape(-1) for layer in model])
    masks = plan_masks(plan, scores.ranked(weights, None), 1.0)
    dropped = ~torch.cat([masks[name].reshape(-1) for name in ("0.weight", "1.weight")])
    expected = gains.topk(32, largest=False).indices
    assert set(dropped.nonzero().flatten().tolist()) == set(expected.tolist())


@pytest.mark.parametrize("score", [taylor, movement])
def test_what_is_dropped_without_learning_stays_last(score):
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Linear(16, 8), nn.Linear(8, 2))
    plan = resolve(model, target=0.5, pattern=Block(4, 4), floors=Floors(0.0, False), score=score)
    masked, scores = MaskedWeights(plan), GradientScores(score)
    weight, generator = model[1].weight, torch.Generator().manual_seed(0)
    before = None
    for share in (0.4, 0.4, 1.0):
        for _ in range(3):
            step(weight, generator)
            masked.impose(model)
            scores.add({"1.weight": weight}, [weight])
        weight.grad = None
        packed = masked.build(model, share, scores.ranked({"1.weight": weight}, masked.masks))
        masked.adopt(packed)
        masked.impose(model)
        mask = masked.masks["1.weight"]
        assert before is None or not (mask & ~before).any()
        assert int((~mask).sum()) == {0.4: 32, 1.0: 64}[share]
        before = mask


def test_a_weight_without_gradients_is_an_error():
    scores, weight, _ = gathered(taylor, 2)
    other = nn.Parameter(torch.ones(2, 2))
    with pytest.raises(ValueError, match="frozen: no gradient has come to it, so taylor cannot"):
        scores.ranked({"weight": weight, "frozen": other}, None)
    assert GradientScores(taylor).ranked({"frozen": other}, None) is None


def test_another_optimizers_step_counts_for_nothing():
    scores, weight, _ = gathered(taylor, 2)
    before = copy.deepcopy(scores.state)
    scores.add({"weight": weight}, [nn.Parameter(torch.ones(1))])
    assert scores.state["steps"] == before["steps"]
    assert torch.equal(scores.state["values"]["weight"], before["values"]["weight"])
