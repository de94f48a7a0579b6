"""From the ATen graph of `capture` to a draft of the file's graph, one rule per operation."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind

from blocksparse.export import rules_pointwise, rules_pools, rules_products, rules_shapes
from blocksparse.export.capture import Capture
from blocksparse.export.draft import Draft
from blocksparse.export.errors import CaptureError, WeightError
from blocksparse.export.lowering import Constant, Lowering, Rule, Value

RULES: dict[str, Rule] = {
    **rules_products.RULES,
    **rules_pools.RULES,
    **rules_shapes.RULES,
    **rules_pointwise.RULES,
}

# Stands for sizes computed from the batch size: rules read shapes from the graph instead.
_SYMBOLIC = object()


def lower(capture: Capture) -> Draft:
    """Turn a captured model into a draft.

    Parameters
    ----------
    capture : Capture

    Returns
    -------
    Draft
        Every operation of the model that its output depends on; nothing folded or fused yet.

    Raises
    ------
    UnsupportedOpError
        An operation has no rule, or is used in a way the file cannot say.
    WeightError
        A parameter or buffer holds NaN or infinity.
    CaptureError
        The model does not return exactly one tensor computed from the input.
    """
    program = capture.program
    constants = _constants(program)
    graph_input = next(
        spec.arg.name
        for spec in program.graph_signature.input_specs
        if spec.kind is InputKind.USER_INPUT
    )
    leaves = {
        path for path, module in capture.model.named_modules() if not any(module.children())
    } - {""}
    draft = Draft("input", capture.input_shape)
    lowering = Lowering(draft, leaves)
    known: dict[fx.Node, Any] = {}
    for node in program.graph.nodes:
        if node.op == "placeholder":
            is_input = node.name == graph_input
            known[node] = (
                Value(draft.input_name, draft.input_shape) if is_input else (constants[node.name])
            )
        elif node.op == "call_function" and node.users:
            known[node] = _call(lowering, node, known)
        elif node.op == "output":
            draft.output = _output(lowering, node, known)
    draft.drop_unread()
    return draft


def _constants(program: ExportedProgram) -> dict[str, Constant]:
    """Parameters, buffers and literal tensors by placeholder name, checked to be finite."""
    found = {}
    for spec in program.graph_signature.input_specs:
        if spec.kind is InputKind.USER_INPUT:
            continue
        assert spec.target is not None
        tensor = program.state_dict.get(spec.target)
        if tensor is None:
            tensor = program.constants[spec.target]
        if not isinstance(tensor, torch.Tensor):
            raise WeightError(f"{spec.target} is a {type(tensor).__name__}, not a tensor")
        if not _is_finite(tensor):
            bad = int((~torch.isfinite(tensor)).sum())
            raise WeightError(
                f"{spec.target} of shape {tuple(tensor.shape)} holds {bad} NaN or infinite values; "
                "the training diverged or the checkpoint is damaged: export an earlier one"
            )
        found[spec.arg.name] = Constant(tensor, spec.target)
    return found


def _is_finite(tensor: torch.Tensor) -> bool:
    """Whether there is neither NaN nor infinity, told from the smallest and the largest value.

    NaN would be both. To test each value takes 26 times as long (VGG-16's first linear layer, two
    cores): a tenth of an export.
    """
    if not tensor.is_floating_point() or tensor.numel() == 0:
        return True
    return bool(torch.isfinite(torch.stack(tensor.aminmax())).all())


def _call(lowering: Lowering, node: fx.Node, known: dict[fx.Node, Any]) -> Any:
    if node.target is operator.getitem:
        parts, index = known[node.args[0]], node.args[1]  # type: ignore[index]
        if parts[index] is None:
            source = node.args[0]
            assert isinstance(source, fx.Node)
            raise lowering.unsupported(
                source, f"its result number {index} is used, and only the first is available"
            )
        return parts[index]
    value = node.meta.get("val")
    if not isinstance(value, torch.Tensor | tuple | list):
        return _SYMBOLIC
    arguments = _arguments(node, known)
    if not any(_depends(argument) for argument in _flat(arguments.values())):
        return _fold_constant(node, known)
    # "aten.add.Tensor" -> "aten.add": overloads of one operation share a rule.
    rule = RULES.get(".".join(str(node.target).split(".")[:2]))
    if rule is None:
        raise lowering.unsupported(node, "the file has no such operation")
    if isinstance(value, torch.Tensor) and value.dtype is not torch.float32:
        raise lowering.unsupported(node, f"it computes in {value.dtype}; the file is float32")
    result = rule(lowering, node, arguments)
    if isinstance(result, Value) and isinstance(value, torch.Tensor):
        lowering.check_shape(node, result, tuple(value.shape[1:]))
    return result


def _arguments(node: fx.Node, known: dict[fx.Node, Any]) -> dict[str, Any]:
    """Return arguments by schema name, defaults filled in, nodes replaced by what is known."""
    schema = node.target._schema.arguments  # type: ignore[union-attr]
    arguments = {entry.name: entry.default_value for entry in schema if entry.has_default_value()}
    arguments.update(zip((entry.name for entry in schema), node.args, strict=False))
    arguments.update(node.kwargs)
    return {name: _resolve(argument, known) for name, argument in arguments.items()}


def _resolve(argument: Any, known: dict[fx.Node, Any]) -> Any:
    if isinstance(argument, fx.Node):
        return known[argument]
    if isinstance(argument, list | tuple):
        return [_resolve(entry, known) for entry in argument]
    return argument


def _flat(entries: Any) -> Iterator[Any]:
    for entry in entries:
        if isinstance(entry, list | tuple):
            yield from _flat(entry)
        else:
            yield entry


def _depends(argument: Any) -> bool:
    return isinstance(argument, Value) or argument is _SYMBOLIC


def _fold_constant(node: fx.Node, known: dict[fx.Node, Any]) -> Any:
    """Compute what depends on no input: a transposed weight, a mask times a parameter."""
    names: list[str] = []

    def tensor(source: fx.Node) -> Any:
        constant = known[source]
        if isinstance(constant, Constant):
            if constant.name is not None:
                names.append(constant.name)
            return constant.tensor
        return constant

    args = fx.node.map_arg(node.args, tensor)
    kwargs = fx.node.map_arg(node.kwargs, tensor)
    with torch.no_grad():
        result = node.target(*args, **kwargs)  # type: ignore[operator]
    name = names[0] if names else None
    if isinstance(result, torch.Tensor):
        return Constant(result, name)
    return [Constant(part, name) if isinstance(part, torch.Tensor) else part for part in result]


def _output(lowering: Lowering, node: fx.Node, known: dict[fx.Node, Any]) -> str:
    results = list(_flat([node.args[0]] if isinstance(node.args[0], fx.Node) else node.args[0]))
    values = [known.get(result) for result in results]
    if len(values) != 1 or not isinstance(values[0], Value):
        raise CaptureError(
            f"the model returns {len(values)} results; a file has one output, a tensor computed "
            "from the input. Wrap the model so that it returns its logits only"
        )
    name = lowering.feature(results[0], values[0])
    if name == lowering.draft.input_name:
        raise CaptureError("the model returns its input unchanged: there is nothing to export")
    return name
