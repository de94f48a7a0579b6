"""Capturing leaves the model as it was, and says what keeps a model from being captured."""

from __future__ import annotations

import copy

import pytest
import torch
from export_networks import assert_same_logits, exported, randomized
from torch import nn
from torch.nn.utils import prune

from blocksparse.export import CaptureError, export_model
from blocksparse.export.capture import capture


def state_of(model: nn.Module) -> dict[str, object]:
    """Everything of a model that an export could change, apart from the tensors' values."""
    return {
        name: (
            module.training,
            dict(module._forward_hooks),
            dict(module._forward_pre_hooks),
            {key: (id(value), value.dtype) for key, value in module._parameters.items()},
            {key: (id(value), value.dtype) for key, value in module._buffers.items()},
        )
        for name, module in model.named_modules()
    }


def test_the_model_is_never_changed():
    model = randomized(
        nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten())
    )
    model[0].weight.data[0, 0] = 1e-40  # flushed in the file, not in the model
    model.train()
    model[1].eval()
    model[2].register_forward_hook(lambda module, args, output: None)
    model[0].weight.grad = torch.ones_like(model[0].weight)
    model[0].bias.requires_grad_(False)
    before, values = state_of(model), copy.deepcopy(model.state_dict())
    result = export_model(model, (3, 6, 6))
    assert state_of(model) == before
    assert all(torch.equal(values[name], value) for name, value in model.state_dict().items())
    assert torch.equal(model[0].weight.grad, torch.ones_like(model[0].weight))
    assert not model[0].bias.requires_grad
    assert result.weights["0"].to_dense()[0, 0].max() == 0


def test_the_export_does_not_follow_the_model():
    model = randomized(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten()))
    result = export_model(model, (3, 6, 6))
    kept = result.weights["0"].to_dense()
    model[0].weight.data.zero_()
    assert (result.weights["0"].to_dense() == kept).all()
    assert kept.any()


def test_a_model_in_training_is_exported_as_it_predicts():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Dropout(), nn.Flatten())
    result = export_model(randomized(model).train(), (3, 6, 6))
    assert model.training
    assert_same_logits(model.eval(), result, torch.randn(2, 3, 6, 6))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_precisions_become_float32(dtype):
    model = randomized(nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Flatten())).to(dtype)
    result = export_model(model, (3, 6, 6))
    assert result.weights["0"].to_dense().dtype == "float32"
    assert model[0].weight.dtype is dtype


def test_channels_last_weights_keep_their_order():
    model = randomized(nn.Sequential(nn.Conv2d(3, 5, (3, 2)), nn.Flatten()))
    exported(model.to(memory_format=torch.channels_last), (3, 6, 6))


def test_the_batch_stays_dynamic():
    captured = capture(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten()), (3, 6, 6))
    output = next(node for node in captured.program.graph.nodes if node.op == "output").args[0][0]
    assert isinstance(output.meta["val"].shape[0], torch.SymInt)
    assert captured.program.module()(torch.zeros(1, 3, 6, 6)).shape == (1, 128)


class FixedBatch(nn.Module):
    def forward(self, x):
        return x.reshape(2, -1)


class Branching(nn.Module):
    def forward(self, x):
        return x + 1 if x.sum() > 0 else x


@pytest.mark.parametrize("model", [FixedBatch(), Branching(), nn.Conv2d(4, 8, 1)])
def test_what_cannot_be_captured_is_explained(model):
    with pytest.raises(CaptureError, match=rf"capture {type(model).__name__} on inputs of shape"):
        export_model(model, (3, 6, 6))


def test_reparametrized_modules_are_explained():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten())
    prune.random_unstructured(model[0], "weight", 0.5)
    model(torch.zeros(1, 3, 6, 6))
    with pytest.raises(CaptureError, match=r"prune\.remove"):
        export_model(model, (3, 6, 6))
    prune.remove(model[0], "weight")
    exported(model.eval(), (3, 6, 6))


@pytest.mark.parametrize("shape", [(3, 6), (3, 0, 6)])
def test_input_shapes_are_checked(shape):
    with pytest.raises(CaptureError, match=r"must be \(C, H, W\)"):
        export_model(nn.Flatten(), shape)
