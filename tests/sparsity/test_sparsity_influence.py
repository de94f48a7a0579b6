"""The influence of output channels on the logits, against the Jacobian itself."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from blocksparse.sparsity.influence import influences


def network() -> nn.Sequential:
    """Return convolutions with an activation in place, dropout, tokens, and a linear layer."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, padding=1),
        nn.ReLU(inplace=True),
        nn.Conv2d(4, 3, 3, stride=2, bias=False),
        nn.BatchNorm2d(3),
        nn.SiLU(inplace=True),
        nn.Flatten(2),
        nn.Linear(4, 6),
        nn.Dropout(0.5),
        nn.Flatten(),
        nn.Linear(18, 5),
    )


def images(count: int) -> Tensor:
    return torch.randn(count, 2, 6, 6, generator=torch.manual_seed(1))


def by_definition(network: nn.Sequential, at: int, x: Tensor) -> Tensor:
    """Sum the squared Jacobian of the logits by the outputs of layer ``at`` over all but [K]."""
    with torch.no_grad():
        before = network[: at + 1](x)
    behind = copy.deepcopy(network[at + 1 :])
    jacobian = torch.autograd.functional.jacobian(lambda z: behind(z.clone()).sum(0), before)
    squares = jacobian.square().sum(0)  # of each image, as they do not know each other
    channel = -1 if isinstance(network[at], nn.Linear) else 1
    return squares.movedim(channel, 0).flatten(1).sum(1) / len(x)


@pytest.mark.parametrize("at", [0, 6, *(pytest.param(i, marks=pytest.mark.slow) for i in (2, 9))])
def test_influence_is_the_mean_squared_jacobian(at: int) -> None:
    made = network().eval()
    one = images(1)
    want = by_definition(made, at, one)
    # The same image many times: only the random signs differ, and they average out.
    found = influences(made, one.repeat(3000, 1, 1, 1), [str(at)])[str(at)]
    torch.testing.assert_close(found, want, rtol=0.1, atol=1e-5)


def test_all_images_count_and_in_batches_of_any_size() -> None:
    """For the last layer, each logit moves with itself alone, whatever the signs."""
    made = network()
    for count in (1, 32, 33):
        torch.testing.assert_close(influences(made, images(count), ["9"])["9"], torch.ones(5))


def test_network_is_left_as_it_was_and_calls_agree() -> None:
    made = network().requires_grad_(False)
    made[3].eval()
    before = copy.deepcopy(made.state_dict())
    layers = ["0", "2", "6", "9"]
    with torch.no_grad():
        first, second = (influences(made, images(40), layers) for _ in range(2))
    assert list(first) == layers
    for name, values in first.items():
        assert torch.equal(values, second[name])
        assert len(values) == len(made[int(name)].weight)
        assert not values.requires_grad
    for name, value in made.state_dict().items():
        assert torch.equal(value, before[name])
    assert made.training
    assert made[0].training
    assert not made[3].training
    assert not made[0]._forward_hooks
    assert all(parameter.grad is None for parameter in made.parameters())


def test_channels_without_influence_are_worth_next_to_nothing_but_something() -> None:
    made = network().eval()
    with torch.no_grad():
        made[9].weight[:, :6] = 0.0  # the first of the three tokens
    found = influences(made, images(8), ["2", "0"])
    assert float(found["2"][0]) == pytest.approx(1e-6 * float(found["2"].sum()) / 3, rel=1e-3)
    assert float(found["2"][1:].min()) > 100 * float(found["2"][0])
    with torch.no_grad():
        made[9].weight.zero_()
    assert torch.equal(influences(made, images(8), ["2"])["2"], torch.ones(3))


def test_a_layer_that_runs_twice_counts_twice_and_one_that_rests_not_at_all() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 3, bias=False)
            self.idle = nn.Linear(3, 3)
            self.aside = nn.Linear(3, 3)

        def forward(self, x: Tensor) -> Tensor:
            self.aside(x)
            return self.layer(x) + self.layer(2 * x)

    found = influences(Twice(), torch.randn(5, 3), ["layer", "idle", "aside"])
    torch.testing.assert_close(found["layer"], torch.full((3,), 2.0))
    assert float(found["idle"].max()) == 1.0
    assert float(found["aside"].max()) == 1.0
