"""Fewer passes over memory: what follows a layer element by element becomes part of it."""

from __future__ import annotations

import numpy as np

from blocksparse.export.draft import Draft, DraftNode

_WITH_ACTIVATION = ("conv2d", "linear", "add", "affine")


def fuse(draft: Draft) -> None:
    """Remove what does nothing, merge slices, and fuse residual adds and activations.

    Run after `blocksparse.export.fold.fold`: a batch norm between a convolution and what follows
    would be in the way.

    Parameters
    ----------
    draft : Draft
        Changed in place.
    """
    _merge_slices(draft)
    _drop_identities(draft)
    _fuse_gated_sigmoid(draft)
    _fuse_adds(draft)
    _fuse_activations(draft)
    _pool_fewer_channels(draft)
    draft.drop_unread()


def _merge_slices(draft: Draft) -> None:
    """Merge ``x[:, :, ::2][:, :, :, ::2]``, two slices for PyTorch, into one."""
    for node in draft:
        source = draft.nodes.get(node.inputs[0])
        if node.op != "slice" or source is None or source.op != "slice":
            continue
        if draft.sole_user(source.name) is not node:
            continue
        inner = zip(source.attrs["start"], source.attrs["step"], strict=True)
        outer = zip(node.attrs["start"], node.attrs["step"], node.shape, strict=True)
        merged = [
            (start + first * step, step * stride, size)
            for (start, step), (first, stride, size) in zip(inner, outer, strict=True)
        ]
        node.attrs = {
            "start": tuple(start for start, _, _ in merged),
            # One past the last element taken, so that the bound never exceeds the input.
            "stop": tuple(start + (size - 1) * step + 1 for start, step, size in merged),
            "step": tuple(step for _, step, _ in merged),
        }
        node.inputs = list(source.inputs)
        del draft.nodes[source.name]


def _drop_identities(draft: Draft) -> None:
    for node in draft:
        if _is_identity(draft, node):
            draft.bypass(node)


def _is_identity(draft: Draft, node: DraftNode) -> bool:
    attrs = node.attrs
    if node.op == "slice":
        return draft.shape(node.inputs[0]) == node.shape
    if node.op == "pad":
        return not any(attrs["before"] + attrs["after"])
    if node.op in ("max_pool2d", "avg_pool2d"):
        return attrs["kernel"] == (1, 1) == attrs["stride"] and attrs["padding"] == (0, 0)
    if node.op == "adaptive_avg_pool2d":
        return draft.shape(node.inputs[0]) == node.shape
    return node.op == "activation" and attrs["activation"] == "none"


def _fuse_gated_sigmoid(draft: Draft) -> None:
    """Rewrite ``x * sigmoid(x)`` and ``x * hardsigmoid(x)`` as the activations they are."""
    names = {"sigmoid": "silu", "hardsigmoid": "hardswish"}
    for node in draft:
        if node.op != "mul":
            continue
        for gate_name, value in (node.inputs, node.inputs[::-1]):
            gate = draft.nodes.get(gate_name)
            if gate is None or gate.op != "activation" or gate.inputs != [value]:
                continue
            if gate.attrs["activation"] in names and draft.sole_user(gate_name) is node:
                node.op, node.inputs = "activation", [value]
                node.attrs = {"activation": names[gate.attrs["activation"]]}
                del draft.nodes[gate_name]
                break


def _fuse_adds(draft: Draft) -> None:
    """Let the convolution computed last add the other operand: ``act(conv(x) + bias + other)``."""
    for node in draft:
        if node.op != "add":
            continue
        order = list(draft.nodes)
        candidates = [
            draft.nodes[name]
            for name in node.inputs
            if name in draft.nodes and _takes_residual(draft, draft.nodes[name], node)
        ]
        if not candidates:
            continue
        conv = max(candidates, key=lambda candidate: order.index(candidate.name))
        first, second = node.inputs
        conv.inputs = [*conv.inputs, second if first == conv.name else first]
        conv.attrs = {**conv.attrs, "activation": node.attrs["activation"]}
        # Where the add stood, the other operand is known, whichever was computed first.
        draft.move(conv, node)


def _takes_residual(draft: Draft, conv: DraftNode, add: DraftNode) -> bool:
    # Its activation cannot be set yet: activations are fused after the adds.
    return conv.op == "conv2d" and len(conv.inputs) == 1 and draft.sole_user(conv.name) is add


def _fuse_activations(draft: Draft) -> None:
    for node in draft:
        source = draft.nodes.get(node.inputs[0])
        if node.op != "activation" or source is None or source.op not in _WITH_ACTIVATION:
            continue
        if source.attrs["activation"] == "none" and draft.sole_user(source.name) is node:
            source.attrs = {**source.attrs, "activation": node.attrs["activation"]}
            draft.bypass(node)


def _pool_fewer_channels(draft: Draft) -> None:
    """Let a 1x1 convolution that halves the channels go before the average pool it follows.

    Both are linear, so they may change places as long as the bias comes last, for
    ``act(conv(pool(x)) + bias) = act(pool(conv(x)) + bias)``. Inception V3 has nine such pools, a
    sixth of its time at 90 % sparsity, most of which then have a quarter or less of the channels.
    """
    for node in draft:
        pool = draft.nodes.get(node.inputs[0])
        if node.op != "conv2d" or pool is None or pool.op != "avg_pool2d":
            continue
        if pool.attrs["stride"] != (1, 1) or draft.sole_user(pool.name) is not node:
            continue
        if not _is_pointwise(node) or 2 * node.shape[0] > pool.shape[0]:
            continue
        (source,) = pool.inputs
        channels = node.shape[0]
        after = DraftNode(
            f"{node.name}.bias", "affine", [pool.name], {"activation": node.attrs["activation"]},
            node.shape, scale=np.ones(channels),
            shift=np.zeros(channels) if node.bias is None else node.bias,
        )  # fmt: skip
        for reader in draft:
            reader.inputs = [after.name if name == node.name else name for name in reader.inputs]
        if draft.output == node.name:
            draft.output = after.name
        node.inputs, node.bias = [source], None
        node.attrs = {**node.attrs, "activation": "none"}
        node.shape = (channels, *draft.shape(source)[1:])
        pool.inputs, pool.shape = [node.name], after.shape
        del draft.nodes[pool.name]
        order = [[node, pool, after] if entry is node else [entry] for entry in draft]
        draft.nodes = {entry.name: entry for entries in order for entry in entries}


def _is_pointwise(node: DraftNode) -> bool:
    """Whether a node is a 1x1 convolution with nothing to it but bias and activation."""
    assert node.weight is not None
    return (
        len(node.inputs) == 1
        and node.weight.shape[2:] == (1, 1)
        and (node.attrs["stride"], node.attrs["padding"]) == ((1, 1), (0, 0))
        and node.attrs["groups"] == 1
    )
