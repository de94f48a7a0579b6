"""Features of a network and its teacher, against their definition."""

from __future__ import annotations

import copy
import math

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from torch import nn
from torchvision.models import googlenet
from trainers import quiet_trainer

from blocksparse.training import Classifier, Digits, Distillation, ResNetCifar
from blocksparse.training.features import feature_error, recorded_features


def network(seed: int = 0, widths=(4, 4, 8)) -> ResNetCifar:
    torch.manual_seed(seed)
    return ResNetCifar(1, 10, 1, widths)


def recorded(model: nn.Module, images: torch.Tensor) -> dict[str, torch.Tensor]:
    with recorded_features(model) as features:
        model(images)
    return features


IMAGES = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))


def test_records_what_each_convolution_reads_and_leaves_no_hook():
    model = network().eval()
    features = recorded(model, IMAGES)
    convolutions = [n for n, m in model.named_modules() if isinstance(m, nn.Conv2d)]
    assert list(features) == convolutions
    assert features["conv1"] is IMAGES
    first = nn.functional.relu(model.bn1(model.conv1(IMAGES)))
    assert torch.equal(features["layer1.0.conv1"], first)
    inside = nn.functional.relu(model.layer1[0].bn1(model.layer1[0].conv1(first)))
    assert torch.equal(features["layer1.0.conv2"], inside)
    before = dict(features)
    model(IMAGES + 1)
    assert all(features[name] is value for name, value in before.items())


def test_hooks_go_when_the_network_fails():
    model = network()
    with pytest.raises(RuntimeError), recorded_features(model):
        model(torch.zeros(1, 7, 8, 8))
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_error_is_relative_and_averaged_over_maps():
    student, teacher = network(0), network(1).eval()
    got = feature_error(recorded(student, IMAGES), recorded(teacher, IMAGES))
    ours, theirs = recorded(student, IMAGES), recorded(teacher, IMAGES)
    errors = []
    for name in ours:
        if name != "conv1":  # reads the images
            s, t = (f[name].detach().double().numpy() for f in (ours, theirs))
            errors.append(((s - t) ** 2).sum() / (t**2).sum())
    assert len(errors) == 6
    assert float(got.detach()) == pytest.approx(np.mean(errors), rel=1e-5)
    got.backward()
    assert float(student.conv1.weight.grad.abs().sum()) > 0
    assert student.linear.weight.grad is None  # nothing reads what it puts out


def test_error_is_zero_for_the_teacher_itself_and_absolute_beside_zeros():
    student = network()
    features = recorded(student, IMAGES)
    assert float(feature_error(features, recorded(student, IMAGES)).detach()) == 0
    nothing = {name: torch.zeros_like(value) for name, value in features.items()}
    squares = [float(v.detach().pow(2).mean()) for name, v in features.items() if name != "conv1"]
    alone = feature_error(features, nothing).detach()
    assert float(alone) == pytest.approx(np.mean(squares), rel=1e-5)


def test_a_map_that_two_convolutions_read_counts_once():
    class Fork(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.left, self.right, self.behind = (nn.Conv2d(1, 1, 1) for _ in range(4))

        def forward(self, x):
            x = self.stem(x)
            return self.behind(self.left(x) + self.right(x))

    torch.manual_seed(0)
    student, teacher = Fork(), Fork()
    s, t = recorded(student, IMAGES), recorded(teacher, IMAGES)

    def alone(name):
        return feature_error({name: s[name]}, {name: t[name]})

    wanted = (alone("left") + alone("behind")) / 2
    torch.testing.assert_close(feature_error(s, t), wanted)


def test_other_architectures_are_refused():
    ours = recorded(network(), IMAGES)
    with pytest.raises(ValueError, match=r"layer1\.0\.conv1 reads \[3, 4.*teacher's \[3, 6"):
        feature_error(ours, recorded(network(widths=(6, 6, 8)), IMAGES))
    with pytest.raises(ValueError, match=r"no convolution.*distillation\.features=0"):
        feature_error(ours, {})


def test_heads_of_training_alone_do_not_count():
    torch.manual_seed(0)
    student = googlenet(num_classes=3, init_weights=False).train()
    teacher = copy.deepcopy(student).eval()
    images = torch.randn(2, 3, 64, 64)
    ours, theirs = recorded(student, images), recorded(teacher, images)
    assert set(ours) - set(theirs) == {"aux1.conv.conv", "aux2.conv.conv"}
    error = feature_error(ours, theirs)
    assert 0 < float(error.detach()) < math.inf
    error.backward()  # through activations that work in place
    assert float(student.conv1.conv.weight.grad.abs().sum()) > 0


def test_a_convolution_called_by_keyword_is_recorded():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(1, 1, 1)

        def forward(self, x):
            return self.conv(input=x)

    assert recorded(Named(), IMAGES)["conv"] is IMAGES


class Losses(pl.Callback):
    """Keep the loss of every step."""

    def __init__(self):
        self.seen = []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.seen.append((float(outputs["loss"]), batch[0]))
        self.logged = trainer.logged_metrics.get("train/feature_error")


def first_loss(weight: float, **options) -> tuple[float, float | None, torch.Tensor]:
    losses = Losses()
    trainer = quiet_trainer(
        max_steps=1,
        limit_val_batches=0,
        callbacks=[losses],
        **options,
    )
    module = Classifier(network(), distillation=Distillation(features=weight), teacher=network(1))
    trainer.fit(module, datamodule=Digits(batch_size=8))
    return losses.seen[0][0], losses.logged, losses.seen[0][1]


def test_the_error_joins_the_loss_with_its_weight():
    without, logged, images = first_loss(0.0)
    assert logged is None
    with_error, logged, _ = first_loss(5.0)
    error = feature_error(
        recorded(network().train(), images), recorded(network(1).eval(), images)
    ).detach()
    assert float(logged) == pytest.approx(float(error), rel=1e-5)
    assert with_error == pytest.approx(without + 5 * float(error), rel=1e-5)


def test_gradient_is_that_of_the_definition():
    student, teacher = network(0), network(1).eval()
    wanted = recorded(teacher, IMAGES)
    ours = {n: f for n, f in recorded(student, IMAGES).items() if n != "conv1"}
    parts = [(f - wanted[n]).pow(2).sum() / wanted[n].pow(2).sum() for n, f in ours.items()]
    expected = torch.autograd.grad(
        torch.stack(parts).mean(), list(ours.values()), retain_graph=True, materialize_grads=True
    )
    got = torch.autograd.grad(feature_error(ours, wanted), list(ours.values()))
    for one, other in zip(got, expected, strict=True):
        torch.testing.assert_close(one, other)


def test_half_precision_keeps_its_type():
    student = {"conv": torch.randn(2, 3, dtype=torch.bfloat16, requires_grad=True)}
    teacher = {"conv": torch.randn(2, 3, dtype=torch.bfloat16)}
    error = feature_error(student, teacher)
    assert error.dtype == torch.float32
    error.backward()
    assert student["conv"].grad.dtype == torch.bfloat16


def test_mixed_precision():
    loss, error, _ = first_loss(5.0, precision="bf16-mixed")
    wanted, _, _ = first_loss(5.0)
    assert error is not None
    assert loss == pytest.approx(wanted, rel=0.05)


@pytest.mark.parametrize("weight", [-1.0, math.inf, math.nan])
def test_weight_is_checked(weight):
    with pytest.raises(ValueError, match=r"distillation\.features is"):
        Distillation(features=weight)
