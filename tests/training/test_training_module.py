"""The classifier: its loss, its state, and how it lives with Lightning."""

from __future__ import annotations

import copy
import math
from types import SimpleNamespace

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from lightning.pytorch.tuner import Tuner
from torch import nn
from torchvision.models import googlenet
from trainers import quiet_trainer

from blocksparse.training import (
    Classifier,
    Digits,
    Distillation,
    Fake,
    Optimization,
    ResNetCifar,
    WeightsError,
)
from blocksparse.training.cutmix import cutmix
from blocksparse.training.module import fingerprint


def network(seed: int = 0) -> ResNetCifar:
    torch.manual_seed(seed)
    return ResNetCifar(1, 10, 1, (4, 4, 4))


def trainer(**options) -> pl.Trainer:
    settings = {"max_epochs": 1, "limit_train_batches": 4, "limit_val_batches": 2}
    return quiet_trainer(
        **{**settings, **options},
    )


def softmax(logits: np.ndarray) -> np.ndarray:
    e = np.exp(logits - logits.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True)


def test_divergence_is_the_papers():
    rng = np.random.default_rng(0)
    student, teacher = rng.normal(size=(2, 5, 7)) * 3
    for temperature in (1.0, 2.5):
        p, q = softmax(teacher / temperature), softmax(student / temperature)
        wanted = temperature**2 * (p * np.log(p / q)).sum() / 5
        got = Distillation(temperature).divergence(torch.tensor(student), torch.tensor(teacher))
        assert float(got) == pytest.approx(wanted, rel=1e-12)
    assert float(Distillation().divergence(torch.tensor(student), torch.tensor(student))) == 0


def test_distillation_refuses():
    with pytest.raises(ValueError, match=r"distillation\.temperature is 0"):
        Distillation(temperature=0)
    with pytest.raises(ValueError, match=r"distillation\.weight is 1\.5"):
        Distillation(weight=1.5)
    with pytest.raises(ValueError, match=r"distillation\.cutmix is -0\.5; it is a share"):
        Distillation(cutmix=-0.5)
    with pytest.raises(ValueError, match="there is no teacher"):
        Classifier(network(), distillation=Distillation())
    with pytest.raises(ValueError, match=r"label_smoothing is 1\.0"):
        Classifier(network(), label_smoothing=1.0)


class Losses(pl.Callback):
    """Keep the training loss of every step, and the batches."""

    def __init__(self):
        self.seen = []

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        self.seen.append((float(outputs["loss"]), batch))


def test_loss_mixes_smoothed_labels_and_teacher():
    student, teacher = network(0), network(1)
    start = copy.deepcopy(student)
    module = Classifier(
        student,
        label_smoothing=0.2,
        distillation=Distillation(temperature=3.0, weight=0.25),
        teacher=teacher,
    )
    losses = Losses()
    fit = trainer(max_steps=1)
    fit.callbacks.append(losses)
    fit.fit(module, datamodule=Digits(batch_size=8))
    ((loss, (images, labels)),) = losses.seen
    logits = start.train()(images).detach().double().numpy()
    wanted = teacher.eval()(images).detach().double().numpy()
    smoothed = np.full((8, 10), 0.02)
    smoothed[np.arange(8), labels] += 0.8
    hard = -(smoothed * np.log(softmax(logits))).sum() / 8
    p, q = softmax(wanted / 3), softmax(logits / 3)
    soft = 9 * (p * np.log(p / q)).sum() / 8
    assert loss == pytest.approx(0.75 * hard + 0.25 * soft, rel=1e-5)


@pytest.mark.parametrize("share", [0.0, 1.0])
def test_of_mixed_images_only_the_teacher_counts(share):
    """With labels that are all wrong the loss is another, unless images are mixed."""
    found = []
    for shift in (0, 1):
        torch.manual_seed(3)
        distillation = Distillation(weight=0.25, cutmix=share)
        module = Classifier(network(0), distillation=distillation, teacher=network(1))
        module._trainer = None
        module.log = lambda *args, **kwargs: None
        module.optimizers = lambda: SimpleNamespace(param_groups=[{"lr": 0.1}])
        images = torch.randn(4, 1, 8, 8)
        loss = module.training_step((images, (torch.arange(4) + shift) % 10), 0)
        found.append(float(loss.detach()))
    assert (found[0] == found[1]) is (share == 1.0)


@pytest.mark.parametrize("seed", range(5))
def test_cutmix_pastes_one_rectangle_of_the_image_opposite(seed):
    torch.manual_seed(seed)
    images = torch.arange(3 * 2 * 16 * 20, dtype=torch.float32).reshape(3, 2, 16, 20)
    before = images.clone()
    mixed = cutmix(images)
    torch.testing.assert_close(images, before)
    pasted = (mixed != images)[0, 0]
    rows, columns = pasted.any(dim=1), pasted.any(dim=0)
    assert torch.equal(pasted, rows[:, None] & columns)
    for used in (rows, columns):  # one piece
        assert int((used[1:] != used[:-1]).sum()) <= 2
    assert torch.equal(mixed[0, :, pasted], images[2, :, pasted])
    assert torch.equal(mixed[1], images[1]), "the one in the middle is its own opposite"


def test_cutmix_replaces_next_to_nothing_up_to_nearly_all():
    torch.manual_seed(0)
    images = torch.stack([torch.zeros(1, 16, 16), torch.ones(1, 16, 16)])
    shares = [float(cutmix(images)[0].mean()) for _ in range(300)]
    assert min(shares) < 0.02
    assert max(shares) > 0.8
    assert 0.2 < np.mean(shares) < 0.5  # of even 0 to 1, less what lies outside


def test_teacher_is_used_but_not_kept(tmp_path):
    teacher = network(1).train()
    before = fingerprint(teacher)
    module = Classifier(network(), distillation=Distillation(), teacher=teacher)
    assert set(module.state_dict()) == {f"model.{name}" for name in network().state_dict()}
    fit = trainer()
    fit.fit(module, datamodule=Digits(batch_size=8))
    assert fingerprint(teacher) == before
    assert not teacher.training
    assert all(p.requires_grad and p.grad is None for p in teacher.parameters())
    fit.save_checkpoint(tmp_path / "last.ckpt")
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert set(checkpoint["state_dict"]) == set(module.state_dict())
    assert checkpoint["teacher"] == before
    other = Classifier(network(), distillation=Distillation(), teacher=network(2))
    with pytest.raises(WeightsError, match="another teacher"):
        trainer(max_epochs=2).fit(
            other, datamodule=Digits(batch_size=8), ckpt_path=tmp_path / "last.ckpt"
        )


def test_fingerprint_sees_every_value():
    model = network()
    prints = {fingerprint(model)}
    for value in model.state_dict().values():
        value.view(-1)[-1] += 1
        prints.add(fingerprint(model))
    assert len(prints) == len(model.state_dict()) + 1


@pytest.mark.parametrize("channels_last", [False, True])
def test_deepcopy_while_training(channels_last):
    class Copy(pl.Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            self.copied = copy.deepcopy(module.model)
            self.whole = copy.deepcopy(module.state_dict())

    fit, spy = trainer(), Copy()
    fit.callbacks.append(spy)
    module = Classifier(
        network(), distillation=Distillation(), teacher=network(1), channels_last=channels_last
    )
    fit.fit(module, datamodule=Digits(batch_size=8))
    for name, value in module.model.state_dict().items():
        assert torch.equal(spy.copied.state_dict()[name], value)
        assert torch.equal(spy.whole[f"model.{name}"], value)


def test_fit_twice_validate_test_predict():
    module = Classifier(network())
    data = Digits(batch_size=32, val_batch_size=100)  # and a last batch of 60
    trainer().fit(module, datamodule=data)
    fit = trainer(limit_val_batches=1.0, limit_test_batches=1.0)
    fit.fit(module, datamodule=data)
    (validated,) = fit.validate(module, datamodule=data, verbose=False)
    (tested,) = fit.test(module, datamodule=data, verbose=False)
    assert validated["val/accuracy"] == tested["test/accuracy"]
    logits = torch.cat(fit.predict(module, data.val_dataloader()))
    labels = torch.cat([labels for _, labels in data.val_dataloader()])
    right = logits.argmax(1) == labels
    among = (logits.topk(5, 1).indices == labels[:, None]).any(1)
    assert validated["val/accuracy"] == pytest.approx(float(right.float().mean()), abs=1e-6)
    assert validated["val/accuracy_top5"] == pytest.approx(float(among.float().mean()), abs=1e-6)
    wanted = nn.functional.cross_entropy(logits, labels)
    assert validated["val/loss"] == pytest.approx(float(wanted), rel=1e-5)


def test_no_top5_with_five_classes():
    module = Classifier(nn.Sequential(nn.Flatten(), nn.Linear(64, 5)))
    data = Fake(num_classes=5, input_shape=(1, 8, 8), train_size=64, val_size=64)
    (figures,) = trainer().validate(module, datamodule=data, verbose=False)
    assert set(figures) == {"val/loss", "val/accuracy"}


def test_learning_rate_finder_leaves_training_as_it_was():
    def weights(find: bool):
        module = Classifier(network(), Optimization(lr=0.05))
        data, fit = Digits(batch_size=8), trainer(max_epochs=2, limit_train_batches=15)
        if find:
            found = Tuner(fit).lr_find(module, datamodule=data, num_training=20, update_attr=False)
            assert found is not None
            assert len(found.results["lr"]) == 20
        fit.fit(module, datamodule=data)
        return module.state_dict()

    plain, searched = weights(False), weights(True)
    assert all(torch.equal(plain[name], value) for name, value in searched.items())


def test_learning_rate_finder_sets_the_learning_rate():
    module = Classifier(network(), Optimization(lr=0.05))
    fit = trainer(limit_train_batches=40)
    Tuner(fit).lr_find(module, datamodule=Digits(batch_size=8), num_training=30)
    assert module.lr != 0.05
    fit = trainer()
    fit.fit(module, datamodule=Digits(batch_size=8))
    assert fit.optimizers[0].param_groups[0]["initial_lr"] == module.lr


def test_learning_rate_and_weight_decay_of_each_step():
    class Spy(pl.Callback):
        def __init__(self):
            self.seen = []

        def on_before_optimizer_step(self, trainer, module, optimizer):
            self.seen.append(tuple(optimizer.param_groups[0][k] for k in ("lr", "weight_decay")))

    fit, spy = trainer(max_epochs=2), Spy()
    fit.callbacks.append(spy)
    recipe = Optimization(lr=0.1, weight_decay=0.01, weight_decay_until=0.5, hold=0.5)
    fit.fit(Classifier(network(), recipe), datamodule=Digits(batch_size=8))
    lrs, decays = zip(*spy.seen, strict=True)
    assert decays == (0.01,) * 4 + (0.0,) * 4
    falling = [0.1 * (1 + math.cos(math.pi * k / 4)) / 2 for k in (1, 2, 3)]
    assert lrs == pytest.approx([0.1] * 5 + falling)


def test_channels_last():
    module = Classifier(network(), channels_last=True)
    fit = trainer()
    fit.fit(module, datamodule=Digits(batch_size=8))
    weight = module.model.layer1[0].conv1.weight
    assert weight.is_contiguous(memory_format=torch.channels_last)
    assert module.state_dict()["model.conv1.weight"].shape == (4, 1, 3, 3)


def test_mixed_precision():
    module = Classifier(network(), distillation=Distillation(), teacher=network(1))
    trainer(precision="bf16-mixed").fit(module, datamodule=Digits(batch_size=8))
    assert module.model.conv1.weight.dtype == torch.float32


def test_auxiliary_logits_join_the_loss():
    torch.manual_seed(0)
    model = googlenet(num_classes=3, init_weights=False, dropout=0.0, dropout_aux=0.0)
    module = Classifier(model)
    module.log = lambda *args, **kwargs: None
    module.optimizers = lambda: torch.optim.SGD(model.parameters(), lr=0.5)
    batch = (torch.randn(3, 3, 64, 64), torch.tensor([0, 2, 1]))
    loss = module.training_step(batch, 0)
    outputs = model(batch[0])
    parts = [
        nn.functional.cross_entropy(logits, batch[1])
        for logits in (outputs.logits, outputs.aux_logits1, outputs.aux_logits2)
    ]
    torch.testing.assert_close(loss, parts[0] + 0.3 * parts[1] + 0.3 * parts[2])
    assert module.eval()(batch[0]).shape == (3, 3)


def test_endless_training_is_refused():
    with pytest.raises(ValueError, match=r"has no end.*max_epochs or max_steps"):
        trainer(max_epochs=-1).fit(Classifier(network()), datamodule=Digits())


def test_a_network_that_was_evaluated_is_trained_as_any_other():
    def weights(model):
        trainer().fit(module := Classifier(model), datamodule=Digits(batch_size=8))
        return module.state_dict()

    plain, evaluated = weights(network()), weights(network().eval())
    assert all(torch.equal(plain[name], value) for name, value in evaluated.items())


def test_layers_in_evaluation_mode_stay_so():
    model = network()
    model.bn1.eval()
    assert not Classifier(model).model.bn1.training


@pytest.mark.parametrize("spoiled", [1, 3], ids=["within the epoch", "in its last step"])
def test_a_training_that_diverges_stops(spoiled):
    class Spoil(pl.Callback):
        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            if batch_idx == spoiled:
                module.model.conv1.weight.data.fill_(math.nan)

    module = Classifier(network())
    stopping = trainer(callbacks=[Spoil()], log_every_n_steps=2, max_epochs=2)
    with pytest.raises(ValueError, match=r"the loss is nan after step [24], .* diverged"):
        stopping.fit(module, datamodule=Digits())
    assert stopping.current_epoch == 0


def test_weights_that_the_last_step_spoils_are_refused():
    class Spoil(pl.Callback):
        def on_train_epoch_end(self, trainer, module):
            module.model.linear.bias.data[0] = math.inf

    with pytest.raises(ValueError, match=r"linear\.bias is not finite after step 4"):
        trainer(callbacks=[Spoil()]).fit(Classifier(network()), datamodule=Digits())
