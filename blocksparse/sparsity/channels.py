"""Channels: which of a network's channels can change places without changing what it computes.

The network is traced, and every channel of every activation and of every axis of every parameter
gets an id. What has to move together is *tied*: an output channel of a convolution with its row of
the weight, its entries in the batch norm that follows, its columns in all layers that read it, and
the channel it is added to. Tied ids form a *strand*. Two strands can change places if they run
through the same operations: if each has one channel, no more and no fewer, wherever the other has
one. So every id carries a *label* that says where it was made and from what. Strands with the same
labels form a `Group`, whose strands may be put into any order.

Whatever cannot be followed keeps its strands where they are: that costs gain, never correctness.
"""

# n strands of a group, s places of a strand along one axis (several only after a flatten)

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from blocksparse.sparsity.channel_layers import LAYERS
from blocksparse.sparsity.channel_moves import MOVES
from blocksparse.sparsity.channel_trace import Trace
from blocksparse.sparsity.ledger import Ledger

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Place:
    """Where the strands of a group lie along one axis of one parameter or buffer.

    Parameters
    ----------
    name : str
        Of the parameter or buffer.
    axis : int
        0 for the output channels of a weight, 1 for its input channels.
    positions : ndarray
        int64 [n, s], the indices along the axis of each strand.
    """

    name: str
    axis: int
    positions: np.ndarray


@dataclass(frozen=True)
class Group:
    """Strands that may be put into any order.

    Parameters
    ----------
    size : int
        How many there are: n, at least 2.
    places : tuple of Place
        Everywhere they lie, none left out.
    """

    size: int
    places: tuple[Place, ...]


@dataclass(frozen=True)
class Channels:
    """What may be reordered in a network, and what may not.

    Parameters
    ----------
    groups : tuple of Group
        In the order in which the network makes them.
    fixed : mapping of str to int
        Why channels keep their place, and how many do for that reason. The network's own inputs
        and outputs are not listed.
    """

    groups: tuple[Group, ...]
    fixed: Mapping[str, int]


def find_channels(network: nn.Module, input_shape: Sequence[int]) -> Channels:
    """Find the groups of channels of ``network`` that may be reordered.

    Evaluation mode is followed; training mode as well where it reads parameters that evaluation
    does not, as with auxiliary classifiers.

    Parameters
    ----------
    network : nn.Module
        Takes one float tensor [N, *input_shape]. It is not changed.
    input_shape : sequence of int
        Of one image, (C, H, W).

    Returns
    -------
    Channels
        Without groups if the network cannot be traced; `fixed` says why.

    Examples
    --------
    >>> network = nn.Sequential(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 8, 1))
    >>> [(p.name, p.axis) for p in find_channels(network, (3, 8, 8)).groups[0].places]
    [('0.weight', 0), ('0.bias', 0), ('2.weight', 1)]
    """
    network = copy.deepcopy(network).cpu().float()
    ledger = Ledger(_canonical_names(network))
    try:
        _follow(ledger, network.eval(), input_shape)
        parameters = {ledger.canonical[name] for name, _ in network.named_parameters()}
        if parameters - {name for name, _ in ledger.params}:
            _follow(ledger, network.train(), input_shape)
    except Exception as error:  # torch.export raises whatever it meets
        first_line = str(error).strip().split("\n")[0]
        reason = f"the network could not be traced ({type(error).__name__}: {first_line})"
        logger.warning("channels keep their order: %s", reason)
        weights = [weight for weight in network.parameters() if weight.ndim > 1]
        return Channels((), {reason: sum(len(weight) for weight in weights)})
    return Channels(tuple(_groups(ledger)), dict(ledger.reasons))


def reorder(network: nn.Module, group: Group, order: np.ndarray) -> None:
    """Put the strands of ``group`` into ``order``, in place.

    Parameters
    ----------
    network : nn.Module
        The network that the group was found in. It computes the same function afterwards.
    group : Group
        What is reordered.
    order : ndarray
        int64 [n], a permutation: where strand ``i`` was, strand ``order[i]`` comes.
    """
    tensors = _tensors(network)
    with torch.no_grad():
        for place in group.places:
            tensor = tensors[place.name]
            index = torch.arange(tensor.shape[place.axis])
            before, after = place.positions[order].reshape(-1), place.positions.reshape(-1)
            index[torch.from_numpy(after)] = torch.from_numpy(before)
            tensor.copy_(tensor.index_select(place.axis, index.to(tensor.device)))


def _canonical_names(network: nn.Module) -> dict[str, str]:
    """Map every name of a parameter or buffer to the first name of the same tensor."""
    first: dict[int, str] = {}
    return {name: first.setdefault(id(tensor), name) for name, tensor in _tensors(network).items()}


def _tensors(network: nn.Module) -> dict[str, Tensor]:
    """Return all parameters and buffers under all their names."""
    return {
        **dict(network.named_parameters(remove_duplicate=False)),
        **dict(network.named_buffers(remove_duplicate=False)),
    }


def _follow(ledger: Ledger, network: nn.Module, input_shape: Sequence[int]) -> None:
    """Trace ``network`` in the mode it is in, and note everything in ``ledger``."""
    example = torch.zeros(2, *input_shape)
    with torch.no_grad(), warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")
        program = torch.export.export(network, (example,), strict=False)
    Trace(ledger, program, {**LAYERS, **MOVES}).run()


def _groups(ledger: Ledger) -> Iterable[Group]:
    """Yield the groups, by the first place of their strands."""
    labels = ledger.labels
    found, strand = np.unique(_components(len(labels), *ledger.ties), return_inverse=True)
    count = len(found)
    fixed = np.zeros(count, dtype=bool)
    fixed[strand[ledger.fixed]] = True
    order = np.lexsort((labels, strand))
    # A strand with two channels in one place is no permutation of single channels: leave it.
    twice = (np.diff(strand[order]) == 0) & (np.diff(labels[order]) == 0)
    fixed[strand[order[1:][twice]]] = True
    ends = np.searchsorted(strand[order], np.arange(count), side="right")
    alike: dict[bytes, list[np.ndarray]] = {}
    start = 0
    for index, end in enumerate(ends.tolist()):
        if not fixed[index]:
            members = order[start:end]
            alike.setdefault(labels[members].tobytes(), []).append(members)
        start = end
    keys, which, position = ledger.places()
    for strands in alike.values():
        ids = np.stack(strands)  # [n, labels], of one label in each column
        columns = [column for column in ids.T if which[column[0]] >= 0]
        if len(strands) < 2 or not columns:
            continue
        # In the order of the network, so that results do not depend on how ids are dealt.
        order = np.argsort(position[columns[0]], kind="stable")
        lies: dict[int, list[np.ndarray]] = {}
        for column in columns:
            lies.setdefault(int(which[column[0]]), []).append(position[column[order]])
        places = (Place(*keys[key], np.stack(lies[key], 1)) for key in sorted(lies))
        yield Group(len(strands), tuple(places))


def _components(size: int, one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Return for each of ``size`` ids the lowest that it is connected with through the ties."""
    root = np.arange(size)
    while True:
        low = np.minimum(root[one], root[other])
        lower = root.copy()
        np.minimum.at(lower, root[one], low)
        np.minimum.at(lower, root[other], low)
        while not np.array_equal(lower[lower], lower):
            lower = lower[lower]
        if np.array_equal(lower, root):
            return root
        root = lower
