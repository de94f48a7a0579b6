"""The run beside the pruned self: what layers get and are to give, against plain definitions."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from naive import conv2d
from torch import Tensor, nn
from torchvision.ops import stochastic_depth

from blocksparse.sparsity import calibration
from blocksparse.sparsity.calibration import Moments, moments, run_beside


class Residual(nn.Module):
    """A block with a shortcut, as in a ResNet; `late`: the shortcut runs after the layers."""

    def __init__(self, late: bool = False) -> None:
        super().__init__()
        self.late = late
        self.first = nn.Conv2d(3, 4, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(4)
        self.last = nn.Conv2d(4, 3, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(3)
        self.shortcut = nn.Conv2d(3, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        before = x if self.late else self.shortcut(x)
        y = self.bn2(self.last(self.bn1(self.first(x)).relu()))
        y += self.shortcut(x) if self.late else before
        return y


def residual(late: bool = False) -> Residual:
    torch.manual_seed(0)
    network = Residual(late).eval()
    for norm in (network.bn1, network.bn2):
        nn.init.uniform_(norm.weight, 0.5, 2.0)
        nn.init.normal_(norm.bias)
        nn.init.normal_(norm.running_mean)
        nn.init.uniform_(norm.running_var, 0.5, 2.0)
    return network


def columns(layer: nn.Module, x: Tensor) -> np.ndarray:
    """Return the inputs of every output pixel, [F, P], by convolving with one-hot kernels."""
    array = x.numpy()
    if isinstance(layer, nn.Linear):
        return array.reshape(-1, array.shape[-1]).T
    shape = (array.shape[1], *layer.kernel_size)
    rows = []
    for index in np.ndindex(*shape):
        kernel = np.zeros((1, *shape))
        kernel[(0, *index)] = 1.0
        padding = layer.padding if layer.padding != "same" else 1
        rows.append(conv2d(array, kernel, None, layer.stride, padding, layer.dilation).reshape(-1))
    return np.array(rows)


@pytest.mark.parametrize("centered", [True, False])
@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Conv2d(3, 2, (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2)), (3, 3, 6, 5)),
        (nn.Conv2d(2, 3, 3, padding="same"), (4, 2, 4, 5)),
        (nn.Conv2d(5, 1, 1, stride=2), (2, 5, 3, 3)),
        (nn.Linear(4, 3), (6, 4)),
        (nn.Linear(4, 3), (2, 3, 4)),
    ],
)
def test_moments_are_those_of_the_definition(
    layer: nn.Module, shape: tuple[int, ...], centered: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibration, "_CHUNK", 100)  # several chunks, the last one smaller
    torch.manual_seed(0)
    pruned, dense = torch.rand(shape), torch.rand(shape)
    with torch.no_grad():
        rest = torch.rand_like(layer(pruned))
        found = moments(layer, pruned, dense, rest, centered)
    x, d = columns(layer, pruned), columns(layer, dense)
    e = np.moveaxis(rest.numpy(), -1 if isinstance(layer, nn.Linear) else 1, 0)
    e = e.reshape(len(e), -1).astype(np.float64)
    if centered:
        x, d, e = (part - part.mean(1, keepdims=True) for part in (x, d, e))
    # Sums of P float32 products of numbers below 1.
    near = {"rtol": 0, "atol": x.shape[1] * np.finfo(np.float32).eps}
    np.testing.assert_allclose(found.inner, x @ x.T / x.shape[1], **near)
    np.testing.assert_allclose(found.cross, d @ x.T / x.shape[1], **near)
    np.testing.assert_allclose(found.rest, e @ x.T / x.shape[1], **near)


@pytest.mark.parametrize("layer", [nn.Conv2d(4, 2, 2), nn.Linear(16, 3)])
def test_variance_far_below_the_mean_is_not_lost(
    layer: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibration, "_CHUNK", 1000)
    torch.manual_seed(0)
    shape = (40, 4, 5, 6) if isinstance(layer, nn.Conv2d) else (40, 8, 16)
    dense = 100.0 + 0.1 * torch.randn(shape)
    pruned = dense + 0.05 * torch.randn(shape)
    with torch.no_grad():
        rest = torch.randn_like(layer(pruned))
        found = moments(layer, pruned, dense, rest, centered=True)
    x, d = columns(layer, pruned).astype(np.float64), columns(layer, dense).astype(np.float64)
    x, d = x - x.mean(1, keepdims=True), d - d.mean(1, keepdims=True)
    want = x @ x.T / x.shape[1]
    # float32 products would be 1e4 * 1e-7 off, a tenth of the variance.
    near = {"rtol": 0, "atol": 1e-5 * want.max()}
    np.testing.assert_allclose(found.inner, want, **near)
    np.testing.assert_allclose(found.cross, d @ x.T / x.shape[1], **near)


def test_inputs_that_vary_by_their_rounding_only_are_constant() -> None:
    torch.manual_seed(0)
    layer = nn.Linear(3, 2)
    x = torch.rand(1000, 3)
    x[:, 0] = 0.1  # its mean in float32 is not 0.1
    x[::2, 1], x[1::2, 1] = 0.1, torch.tensor(0.1).nextafter(torch.tensor(1.0))
    with torch.no_grad():
        found = moments(layer, x, x, layer(x), centered=True)
    assert not found.inner[:2].any()
    assert not found.inner[:, :2].any()
    assert not found.cross[:, :2].any()
    assert not found.rest[:, :2].any()
    assert float(found.inner[2, 2]) == pytest.approx(float(x[:, 2].var()), rel=0.01)


def visit_order(network: nn.Module, names: list[str], change: Any = None) -> dict[str, Moments]:
    found: dict[str, Moments] = {}

    def visit(name: str, layer: nn.Module, seen: Moments) -> None:
        found[name] = seen
        if change is not None:
            change(name, layer)

    run_beside(network, torch.randn(8, 3, 6, 6, generator=torch.manual_seed(1)), names, visit)
    return found


def test_nothing_pruned_changes_nothing_but_rounding() -> None:
    network = residual()
    before = copy.deepcopy(network.state_dict())
    found = visit_order(network, ["first", "last", "shortcut"])
    assert list(found) == ["shortcut", "first", "last"]  # in the order in which they run
    for name, value in network.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=1e-5, atol=1e-6)
    for seen in found.values():
        torch.testing.assert_close(seen.inner, seen.cross)
        assert float(seen.rest.abs().max()) < 1e-6


def test_statistics_become_those_of_the_pruned_network() -> None:
    network = residual()
    images = torch.randn(8, 3, 6, 6, generator=torch.manual_seed(1))
    with torch.no_grad():
        maps = network.first(images)
        # Of many more images than these, so that they differ.
        want = maps.mean((0, 2, 3)) + 0.3, maps.var((0, 2, 3)) * 1.5
        network.bn1.running_mean, network.bn1.running_var = (value.clone() for value in want)
    # All weights halved: half the mean and a quarter of the variance, on any images.
    visit_order(network, ["first"], lambda name, layer: layer.weight.mul_(0.5))
    torch.testing.assert_close(network.bn1.running_mean, want[0] / 2, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(network.bn1.running_var, want[1] / 4, rtol=1e-4, atol=1e-6)
    assert network.bn1.num_batches_tracked == 0


def test_bias_keeps_the_mean() -> None:
    network = residual()
    images = torch.randn(8, 3, 6, 6, generator=torch.manual_seed(1))
    with torch.no_grad():
        want = network.shortcut(images).mean((0, 2, 3))
        visit_order(network, ["shortcut"], lambda name, layer: layer.weight.zero_())
        torch.testing.assert_close(network.shortcut(images).mean((0, 2, 3)), want)


@pytest.mark.parametrize("late", [False, True])
def test_a_layer_is_asked_to_make_up_for_what_it_is_added_to(late: bool) -> None:
    network = residual(late)
    dense = copy.deepcopy(network)
    pruned = "last" if late else "shortcut"
    found = visit_order(
        network,
        ["first", "last", "shortcut"],
        lambda name, layer: layer.weight.zero_() if name == pruned else None,
    )
    images = torch.randn(8, 3, 6, 6, generator=torch.manual_seed(1))
    assert float(found[pruned].rest.abs().max()) < 1e-6
    with torch.no_grad():
        branch = dense.bn1(dense.first(images)).relu()
        if late:  # the shortcut runs last: it makes up for the layers
            inputs, missing, rest = images, dense.bn2(dense.last(branch)), found["shortcut"].rest
        else:
            slope = (dense.bn2.weight / (dense.bn2.running_var + dense.bn2.eps).sqrt())[
                :, None, None
            ]
            inputs, missing, rest = branch, dense.shortcut(images) / slope, found["last"].rest
    x, e = (part.transpose(0, 1).flatten(1).double() for part in (inputs, missing))
    x, e = x - x.mean(1, keepdim=True), e - e.mean(1, keepdim=True)
    torch.testing.assert_close(rest, e @ x.T / x.shape[1], rtol=1e-3, atol=1e-5)


class Dropping(Residual):
    """With something before and behind the last batch norm that only a training notices."""

    def __init__(self, before: Any, behind: Any) -> None:
        super().__init__()
        self.before, self.behind = before, behind

    def forward(self, x: Tensor) -> Tensor:
        other = self.shortcut(x)
        y = self.bn2(self.before(self.last(self.bn1(self.first(x)).relu())))
        return self.behind(y) + other


def depth(x: Tensor, training: bool = False) -> Tensor:
    return stochastic_depth(x, 0.5, "row", training)


def last_moments(network: Residual) -> Moments:
    """Return what the last layer got and was to give where the shortcut was pruned to nothing."""
    network.load_state_dict(residual().state_dict())
    return visit_order(
        network.eval(),
        ["last", "shortcut"],
        lambda name, layer: layer.weight.zero_() if name == "shortcut" else None,
    )["last"]


@pytest.mark.parametrize("before", [True, False])
@pytest.mark.parametrize(
    "identity",
    [
        nn.Dropout(),
        nn.Dropout2d(),
        nn.Identity(),
        lambda x: nn.functional.dropout(x, 0.5, False),
        depth,
        lambda x: stochastic_depth(x, p=0.5, mode="row", training=False),
        lambda x: nn.functional.dropout2d(depth(depth(x)), training=False),
    ],
)
def test_what_is_the_identity_in_evaluation_hides_no_addition(identity: Any, before: bool) -> None:
    want = last_moments(Residual())
    assert float(want.rest.abs().max()) > 0.1
    pair = (identity, nn.Identity()) if before else (nn.Identity(), identity)
    torch.testing.assert_close(last_moments(Dropping(*pair)).rest, want.rest)


@pytest.mark.parametrize(
    "drop", [lambda x: nn.functional.dropout(x, 0.5, True), lambda x: depth(x, True), torch.relu]
)
def test_what_changes_the_output_in_evaluation_ends_what_a_layer_follows(drop: Any) -> None:
    assert not last_moments(Dropping(nn.Identity(), drop)).rest.any()


def test_modes_and_hooks_are_as_before() -> None:
    network = residual().train()
    network.bn2.eval()
    visit_order(network, ["first"])
    assert network.training
    assert not network.bn2.training
    with pytest.raises(RuntimeError, match="broken"):
        visit_order(
            network, ["first"], lambda name, layer: (_ for _ in ()).throw(RuntimeError("broken"))
        )
    assert network.training


def test_layers_that_do_not_run_once_are_refused() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Conv2d(3, 3, 1)
            self.idle = nn.Conv2d(3, 3, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(self.layer(x))

    for name, times in (("layer", 2), ("idle", 0)):
        with pytest.raises(ValueError, match=rf"{name}: runs {times} times .*sparsity\.dense"):
            visit_order(Twice(), [name])


class Tied(nn.Module):
    """Two modules share their weight or bias; a function reads the weight of a third."""

    def __init__(self, shared: str) -> None:
        super().__init__()
        self.first, self.then, self.last = (nn.Conv2d(3, 3, 1) for _ in range(3))
        setattr(self.then, shared, getattr(self.first, shared))

    def forward(self, x: Tensor) -> Tensor:
        return self.last(nn.functional.conv2d(self.then(self.first(x)), self.last.weight))


@pytest.mark.parametrize(
    ("name", "shared", "other"),
    [
        ("first", "weight", "then"),
        ("then", "weight", "first"),
        ("first", "bias", "then"),
        ("last", "weight", r"last\.weight"),
    ],
)
def test_layers_whose_parameters_are_used_elsewhere_are_refused(
    name: str, shared: str, other: str
) -> None:
    network = Tied(shared)
    before = copy.deepcopy(network.state_dict())
    with pytest.raises(
        ValueError, match=rf"{name}: its {shared} is that of {other} as well.*sparsity\.dense"
    ):
        visit_order(network, [name], lambda name, layer: layer.weight.zero_())
    assert all(torch.equal(value, before[key]) for key, value in network.state_dict().items())


def test_weights_that_idle_modules_share_or_whose_dtype_is_read_are_not_refused() -> None:
    class Fine(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.idle = nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)
            self.idle.weight = self.layer.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.layer(x.to(self.layer.weight.dtype))

    assert list(visit_order(Fine(), ["layer"])) == ["layer"]


def test_network_that_cannot_be_traced_is_refused() -> None:
    class Branch(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x if x.sum() > 0 else -x

    with pytest.raises(ValueError, match=r"Branch cannot be traced.*calibration=none"):
        visit_order(Branch(), [])
