"""Calibration: a network runs beside its pruned self, and what each layer gets is put in figures.

Both see the same images in one batch: the first half of it is the dense network's, the second half
the pruned network's. So the network runs once, each layer is pruned at the moment its inputs
arrive, and the layers behind it get what the pruned one puts out.
"""

# N images   C K input and output channels   T taps of a kernel   F inputs of one output: C * T
# P output pixels of all images together

from __future__ import annotations

import math
import operator
from collections import Counter
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.dropout import _DropoutNd

from blocksparse.sparsity.modes import evaluating

# Entries of the unfolded inputs that are held at a time. 4 MiB of float32 stay in a cache: half the
# time of 64 MiB, for a layer of 16 channels.
_CHUNK = 1 << 20
_ADDITIONS = (operator.add, operator.iadd, torch.add, "add", "add_")
# Functions that return their input unless they are told to train. By name, as stochastic depth is
# torchvision's, and nothing here needs that.
_DROPS = ("dropout", "dropout1d", "dropout2d", "dropout3d", "stochastic_depth")


@dataclass(frozen=True)
class Moments:
    """What a layer got and was to give, averaged over all output pixels of all images.

    A column of inputs is what one output pixel sees: F values, channel major and kernel position
    minor, as in a weight [K, C, ...] that is flattened behind its first axis. If the layer has an
    intercept, a bias or the running mean of a batch norm behind it, all are taken less their means.

    Parameters
    ----------
    inner : Tensor
        float64 [F, F], mean of ``x x^T``, x being the inputs in the pruned network.
    cross : Tensor
        float64 [F, F], mean of ``d x^T``, d being the inputs in the dense network.
    rest : Tensor
        float64 [K, F], mean of ``e x^T``: e is what the outputs are to exceed the dense weights'
        outputs by, to make up for a difference in what they are added to. Mostly 0.
    """

    inner: Tensor
    cross: Tensor
    rest: Tensor


Visit = Callable[[str, nn.Module, Moments], None]


@torch.no_grad()
def run_beside(network: nn.Module, images: Tensor, layers: Collection[str], visit: Visit) -> None:
    """Run a network beside its pruned self, and let ``visit`` prune layer after layer.

    Afterwards the batch norms' running statistics are those of the pruned network, and the biases
    of the layers such that their outputs have the means they had in the dense network.

    Parameters
    ----------
    network : nn.Module
        One that `torch.fx` can trace, and that treats the images of a batch independently.
    images : Tensor
        float32 [N, C, H, W], normalised as the network takes them, on its device.
    layers : collection of str
        The names of the layers to visit, as in `LayerPlan`.
    visit : callable
        Takes the name of a layer, the layer, and its moments, in the order in which the layers run;
        changes its weight in place.

    Raises
    ------
    ValueError
        If the network cannot be traced, a layer does not run exactly once, or its weight or bias
        is used elsewhere as well.
    """
    with evaluating(network):
        graph = _trace(network)
        _check_runs(network, graph, layers)
        _Beside(network, graph, layers, visit).run(torch.cat([images, images]))


class _Beside(fx.Interpreter):
    """Runs both halves of a batch; at a layer that is visited, the second with the new weights.

    The second half has batch-norm statistics of its own: the running ones, moved and scaled as the
    halves differ. So where nothing was pruned they are what they were, however few the images.
    """

    def __init__(
        self, network: nn.Module, graph: fx.Graph, layers: Collection[str], visit: Visit
    ) -> None:
        super().__init__(network, graph=graph)
        self.extra_traceback = False  # an error is to say no more than what `visit` says
        self.layers = layers
        self.visit = visit
        self.statistics: dict[_BatchNorm, tuple[Tensor, Tensor]] = {}
        self.calls = Counter(n.target for n in graph.nodes if n.op == "call_module")

    def run(self, *args: Any, **kwargs: Any) -> Any:
        result = super().run(*args, **kwargs)
        # Only now, as the dense half had to run with those it had.
        for norm, (mean, var) in self.statistics.items():
            norm.load_state_dict({"running_mean": mean, "running_var": var}, strict=False)
        return result

    def run_node(self, n: fx.Node) -> Any:
        output = super().run_node(n)
        if n.op == "call_module" and n.target in self.layers:
            return self._layer(n, output)
        norm = self._norm(n)
        return (
            output
            if norm is None
            else self._normalized(norm, self.env[n.all_input_nodes[0]], output)
        )

    def _layer(self, node: fx.Node, output: Tensor) -> Tensor:
        layer = self.fetch_attr(str(node.target))
        dense, pruned = self.env[node.all_input_nodes[0]].chunk(2)
        before, _ = output.chunk(2)
        norm, other = self._next(node)
        wanted = before
        if other is not None and other.shape == output.shape:
            inverse = _along(_reciprocal(_slope(norm, before, layer)), layer, before)
            wanted = before + torch.sub(*other.chunk(2)) * inverse
        centered = norm is not None or layer.bias is not None
        found = moments(layer, pruned, dense, wanted - before, centered)
        self.visit(str(node.target), layer, found)
        made = layer(pruned)
        if layer.bias is not None:
            channel = channel_axis(layer) % made.ndim
            shift = (wanted - made).mean([axis for axis in range(made.ndim) if axis != channel])
            layer.bias += shift
            made += _along(shift, layer, made)
        return torch.cat([before, made])

    def _norm(self, node: fx.Node | None) -> _BatchNorm | None:
        """Return the batch norm that a node calls, if it has statistics and runs once."""
        if node is None or node.op != "call_module" or self.calls[node.target] != 1:
            return None
        module = self.fetch_attr(str(node.target))
        fits = isinstance(module, _BatchNorm) and module.running_mean is not None
        return module if fits else None

    def _normalized(self, norm: _BatchNorm, x: Tensor, output: Tensor) -> Tensor:
        assert norm.running_mean is not None
        assert norm.running_var is not None
        axes = [axis for axis in range(x.ndim) if axis != 1]
        (var_d, mean_d), (var_p, mean_p) = (torch.var_mean(half, axes) for half in x.chunk(2))
        ratio = torch.where(var_d > 0.0, var_p / var_d, 1.0)
        mean = mean_p + (norm.running_mean - mean_d) * ratio.sqrt()
        var = norm.running_var * ratio
        self.statistics[norm] = mean, var
        pruned = nn.functional.batch_norm(
            x.chunk(2)[1], mean, var, norm.weight, norm.bias, eps=norm.eps
        )
        return torch.cat([output.chunk(2)[0], pruned])

    def _next(self, node: fx.Node) -> tuple[_BatchNorm | None, Tensor | None]:
        """Return the batch norm behind a layer, and what is added behind it, if known by then."""
        other = None
        node, follower = self._follower(node)
        norm = self._norm(follower)
        if follower is not None and norm is not None:
            node, follower = self._follower(follower)
        if follower is not None and follower.target in _ADDITIONS and not follower.kwargs:
            others = [input_ for input_ in follower.all_input_nodes if input_ is not node]
            # What runs later, such as the shortcut's convolution, will look back at this layer.
            if len(others) == 1 and others[0] in self.env:
                other = self.env[others[0]]
        return norm, other

    def _follower(self, node: fx.Node) -> tuple[fx.Node, fx.Node | None]:
        """Return what alone uses an output, and the node it uses: not what is the identity here."""
        follower = _only_user(node)
        while follower is not None and self._is_identity(follower):
            node, follower = follower, _only_user(follower)
        return node, follower

    def _is_identity(self, node: fx.Node) -> bool:
        """Say whether a node returns its input in evaluation."""
        if node.op == "call_module":
            module = self.fetch_attr(str(node.target))
            return isinstance(module, nn.Identity | _DropoutNd) and not module.training
        if node.op != "call_function" or getattr(node.target, "__name__", "") not in _DROPS:
            return False
        # PyTorch's have it by name in a trace; stochastic_depth is (input, p, mode, training).
        default = node.args[3] if len(node.args) > 3 else True
        return node.kwargs.get("training", default) is False


def moments(
    layer: nn.Module,
    pruned: Tensor,
    dense: Tensor,
    rest: Tensor,
    centered: bool,
) -> Moments:
    """Return what a layer got and was to give, in figures.

    Parameters
    ----------
    layer : nn.Module
        A convolution of any dimension with one group, or a linear layer.
    pruned, dense : Tensor
        float32 [N, C, ...] (linear layer: [N, ..., C]), the inputs for the same images.
    rest : Tensor
        float32, of the shape of the outputs: what they are to have beyond the dense weights' own.
    centered : bool
        Whether to take everything less its mean.

    Returns
    -------
    Moments
        Products of some images are summed in float32, and these sums in float64, on the device of
        the inputs (MPS: on the CPU).
    """
    # Products are taken of what is beyond the means of the first image: float32 would round off a
    # variance far below the square of its mean, and what it leaves could be negative.
    (unfold_x, pilot_x), (unfold_d, pilot_d) = (_unfolder(layer, part) for part in (pruned, dense))
    step = max(_CHUNK // (pruned[0].numel() * _taps(layer)), 1)
    count, sums = 0, [torch.zeros((), dtype=torch.float64)] * 6
    for start in range(0, len(pruned), step):
        x, d = unfold_x(pruned[start : start + step]), unfold_d(dense[start : start + step])
        e = rest[start : start + step].movedim(channel_axis(layer), 0).flatten(1)
        count += x.shape[1]
        parts = [x @ x.T, d @ x.T, e @ x.T, x.sum(1), d.sum(1), e.sum(1)]
        wide = [_wide(part) for part in parts]
        sums = [total.to(part.device) + part for total, part in zip(sums, wide, strict=True)]
    inner, cross, extra, beyond_x, beyond_d, mean_e = (total / count for total in sums)
    inner = inner - torch.outer(beyond_x, beyond_x)
    cross = cross - torch.outer(beyond_d, beyond_x)
    extra = extra - torch.outer(mean_e, beyond_x)
    mean_x, mean_d = beyond_x + _wide(pilot_x), beyond_d + _wide(pilot_d)
    if centered:
        # An input that varies by no more than its rounding is constant: nothing is fitted to that.
        constant = inner.diagonal() <= (torch.finfo(pruned.dtype).eps * mean_x).square()
        inner = inner.masked_fill(constant | constant[:, None], 0.0)
        cross, extra = cross.masked_fill(constant, 0.0), extra.masked_fill(constant, 0.0)
    else:
        inner = inner + torch.outer(mean_x, mean_x)
        cross = cross + torch.outer(mean_d, mean_x)
        extra = extra + torch.outer(mean_e, mean_x)
    return Moments(inner, cross, extra)


def _trace(network: nn.Module) -> fx.Graph:
    try:
        return fx.Tracer().trace(network)
    except Exception as error:  # whatever the network does with a proxy
        raise ValueError(
            f"{type(network).__name__} cannot be traced by torch.fx, so its layers cannot be "
            f"calibrated in turn: {error}. Prune it by training (calibration=none)"
        ) from error


def _check_runs(network: nn.Module, graph: fx.Graph, layers: Collection[str]) -> None:
    """Refuse layers that do not run exactly once, or share parameters with what runs besides."""
    calls = Counter(node.target for node in graph.nodes if node.op == "call_module")
    # By identity: two modules may hold one parameter, and a function may read that of a module.
    users: dict[int, list[str]] = {}
    for node in graph.nodes:
        name = str(node.target)
        if node.op == "call_module":
            used = list(network.get_submodule(name).parameters())
        elif node.op == "get_attr" and not all(_only_described(user) for user in node.users):
            used = [operator.attrgetter(name)(network)]
        else:
            continue
        for parameter in used:
            users.setdefault(id(parameter), []).append(name)
    for name in layers:
        remedy = (
            f"can be calibrated: leave it dense (sparsity.dense='[\"{name}\"]'), or prune without "
            "calibration (calibration=none)"
        )
        if calls[name] != 1:
            raise ValueError(
                f"{name}: runs {calls[name]} times for an image, and only a layer that runs once "
                + remedy
            )
        for kind, parameter in network.get_submodule(name).named_parameters():
            others = [user for user in users[id(parameter)] if user != name]
            if others:
                raise ValueError(
                    f"{name}: its {kind} is that of {', '.join(others)} as well, and only a layer "
                    "whose parameters are used once " + remedy
                )


def _only_described(node: fx.Node) -> bool:
    """Say whether a node reads what does not change with the values, as ``weight.dtype`` does."""
    return node.target is getattr and node.args[1] in ("dtype", "device", "shape", "ndim")


def _only_user(node: fx.Node) -> fx.Node | None:
    return next(iter(node.users)) if len(node.users) == 1 else None


def _slope(norm: _BatchNorm | None, output: Tensor, layer: nn.Module) -> Tensor:
    """Return [K], what a batch norm multiplies the channels by; ones without one."""
    if norm is None:
        return output.new_ones(output.shape[channel_axis(layer)])
    assert norm.running_var is not None
    scale = torch.rsqrt(norm.running_var + norm.eps)
    return scale if norm.weight is None else scale * norm.weight


def _reciprocal(slope: Tensor) -> Tensor:
    """Return 1 / slope, but 0 for channels that are next to nothing in the end."""
    return slope / (slope.square() + 1e-4 * slope.square().mean()).clamp(min=1e-30)


def channel_axis(layer: nn.Module) -> int:
    """Return the axis of the channels in inputs and outputs."""
    return 1 if isinstance(layer, _ConvNd) else -1


def _along(values: Tensor, layer: nn.Module, output: Tensor) -> Tensor:
    """Return values [K] so that they broadcast along the channels of ``output``."""
    shape = [1] * output.ndim
    shape[channel_axis(layer)] = -1
    return values.reshape(shape)


def _taps(layer: nn.Module) -> int:
    return math.prod(layer.kernel_size) if isinstance(layer, _ConvNd) else 1


def _unfolder(layer: nn.Module, images: Tensor) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """Return what brings inputs of ``layer`` into columns [F, P], less a pilot, and the pilot [F].

    The pilot is the mean of the columns of the first image.
    """
    if not isinstance(layer, _ConvNd):
        pilot = images[:1].reshape(-1, images.shape[-1]).mean(0)
        return lambda x: (x - pilot).reshape(-1, x.shape[-1]).T, pilot
    taps = _taps(layer)
    # A depthwise convolution whose outputs are the taps: any dimension, stride and padding.
    copies = type(layer)(  # type: ignore[call-arg]
        layer.in_channels,
        layer.in_channels * taps,
        layer.kernel_size,
        stride=layer.stride,
        padding=layer.padding,
        dilation=layer.dilation,
        groups=layer.in_channels,
        padding_mode=layer.padding_mode,
        device=layer.weight.device,
        dtype=layer.weight.dtype,
    )
    one_hot = torch.eye(taps).repeat(layer.in_channels, 1)
    copies.weight.copy_(one_hot.reshape(copies.weight.shape))
    bias: Tensor = nn.init.zeros_(copies.bias)  # type: ignore[arg-type]

    def columns(x: Tensor) -> Tensor:
        return copies(x).transpose(0, 1).flatten(1)

    pilot = columns(images[:1]).mean(1)
    bias.copy_(-pilot)  # the subtraction comes with the copies
    return columns, pilot


def _wide(part: Tensor) -> Tensor:
    # MPS has no float64.
    return (part.cpu() if part.device.type == "mps" else part).to(torch.float64)
