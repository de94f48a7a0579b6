"""Batch-norm statistics become plain means over batches."""

from __future__ import annotations

import copy

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from torch import nn
from torchvision.models import googlenet
from trainers import quiet_trainer

from blocksparse.training import (
    BatchNormReestimation,
    Classifier,
    Digits,
    ResNetCifar,
    reestimate,
)


def batches(count: int, size: int = 6):
    generator = torch.Generator().manual_seed(count)
    return [
        (3 + torch.randn(size, 2, 5, 4, generator=generator), torch.zeros(size))
        for _ in range(count)
    ]


def test_statistics_are_means_over_batches():
    model = nn.Sequential(nn.BatchNorm2d(2), nn.Flatten())
    model[0].running_mean.fill_(99.0)
    data = batches(7)
    reestimate(model, data, num_batches=5)
    means, variances = [], []
    for images, _ in data[:5]:
        x = images.double().numpy()
        means.append(x.mean((0, 2, 3)))
        variances.append(x.var((0, 2, 3), ddof=1))
    # Means of 120 numbers near 3, in float32.
    np.testing.assert_allclose(model[0].running_mean, np.mean(means, 0), rtol=1e-5)
    np.testing.assert_allclose(model[0].running_var, np.mean(variances, 0), rtol=1e-5)


def test_everything_else_is_as_before():
    torch.manual_seed(0)
    model = ResNetCifar(1, 10, 2, (4, 8, 8))
    model.linear = nn.Sequential(nn.Dropout(0.5), model.linear)
    model.train()
    model.layer2.eval()
    model.bn1.momentum = 0.3
    before = copy.deepcopy(model)
    rng = torch.get_rng_state()
    reestimate(model, batches(4))
    assert torch.equal(torch.get_rng_state(), rng)  # no dropout was drawn
    assert [m.training for m in model.modules()] == [m.training for m in before.modules()]
    assert model.bn1.momentum == 0.3
    assert model.layer1[0].bn1.momentum == 0.1
    for (name, value), (_, old) in zip(
        model.named_parameters(), before.named_parameters(), strict=True
    ):
        assert torch.equal(value, old), name
        assert value.grad is None
    assert not torch.equal(model.bn1.running_mean, before.bn1.running_mean)


def test_result_depends_on_weights_and_batches_alone():
    torch.manual_seed(0)
    model = ResNetCifar(1, 10, 2, (4, 8, 8))
    other = copy.deepcopy(model)
    for name, buffer in other.named_buffers():
        if "running" in name:
            buffer.uniform_(1, 2)
    reestimate(model.train(), batches(4))
    reestimate(other.eval(), batches(4))
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, other.get_buffer(name)), name


def test_layers_that_evaluation_skips_keep_their_statistics():
    model = googlenet(num_classes=3, init_weights=False).train()
    model.aux1.conv.bn.running_mean.fill_(5.0)
    before = model.aux1.conv.bn.running_mean.clone()
    reestimate(model, [(torch.randn(2, 3, 64, 64), torch.zeros(2))])
    assert torch.equal(model.aux1.conv.bn.running_mean, before)
    assert model.conv1.bn.num_batches_tracked == 1


def test_no_batch_norm_and_no_batch():
    reestimate(nn.Linear(2, 2), [])
    model = nn.BatchNorm2d(2)
    model.running_mean.fill_(4.0)
    with pytest.raises(ValueError, match="the loader is empty"):
        reestimate(model, [], device="cpu")
    with pytest.raises(ValueError, match=r"batchnorm\.num_batches is 0"):
        reestimate(model, batches(1), num_batches=0)
    assert model.running_mean.tolist() == [4.0, 4.0]


def test_restored_after_an_error():
    model = nn.Sequential(nn.BatchNorm2d(2), nn.Conv2d(3, 1, 1)).train()
    with pytest.raises(RuntimeError, match="channels"):
        reestimate(model, batches(1))
    assert model.training
    assert model[0].training
    assert model[0].momentum == 0.1


class Statistics(pl.Callback):
    """Keep the first batch norm's means at each validation and at the end of each epoch."""

    def __init__(self):
        self.seen = []
        self.epochs = []

    def on_validation_end(self, trainer, module):
        if not trainer.sanity_checking:
            self.seen.append(module.model.bn1.running_mean.clone())

    def on_train_epoch_end(self, trainer, module):
        self.epochs.append(module.model.bn1.running_mean.clone())


def fit(callback: pl.Callback, **options):
    torch.manual_seed(0)
    module = Classifier(ResNetCifar(1, 10, 1, (4, 4, 4)))
    spy = Statistics()
    trainer = quiet_trainer(
        **{"max_epochs": 2, **options},
        limit_train_batches=3,
        callbacks=[callback, spy],
    )
    data = Digits(batch_size=16)
    trainer.fit(module, datamodule=data)
    wanted = copy.deepcopy(module.model)
    reestimate(wanted, data.statistics_dataloader(), 4)
    return module.model.bn1.running_mean, wanted.bn1.running_mean, spy


def test_callback_before_the_last_validation():
    got, wanted, spy = fit(BatchNormReestimation(num_batches=4))
    _, _, plain = fit(pl.Callback())
    assert torch.equal(got, wanted)
    assert torch.equal(spy.seen[1], wanted)
    assert torch.equal(spy.seen[0], plain.seen[0])
    assert torch.equal(spy.epochs[0], plain.epochs[0])


def test_callback_before_each_validation():
    _, wanted, spy = fit(BatchNormReestimation(num_batches=4, each_validation=True))
    _, _, plain = fit(pl.Callback())
    assert torch.equal(spy.seen[1], wanted)
    assert not torch.equal(spy.seen[0], plain.seen[0])


@pytest.mark.parametrize("options", [{"limit_val_batches": 0}, {"max_epochs": -1, "max_steps": 4}])
def test_callback_without_a_last_validation(options):
    got, wanted, _ = fit(BatchNormReestimation(num_batches=4), **options)
    assert torch.equal(got, wanted)


def test_callback_needs_a_data_module():
    module = Classifier(ResNetCifar(1, 10, 1, (4, 4, 4)))
    trainer = quiet_trainer(
        max_steps=1,
        callbacks=[BatchNormReestimation()],
    )
    with pytest.raises(ValueError, match="statistics_dataloader"):
        trainer.fit(module, Digits().train_dataloader())
