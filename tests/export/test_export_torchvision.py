"""The networks people use, pruned, agree with PyTorch; slow."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
import torchvision
from export_networks import prune_blocks, prune_groups, randomized
from torch import nn

from blocksparse.export import ExportReport, export_file
from blocksparse.runtime import load
from blocksparse.runtime.tolerance import tolerance
from blocksparse.training import ResNetCifar, build_model
from blocksparse.training.data import ImageFolder

pytestmark = pytest.mark.long


def no_init(name: str, **options) -> nn.Module:
    """Build a network whose own initialisation is slow, and about to be overwritten anyway."""
    return getattr(torchvision.models, name)(init_weights=False, **options)


NETWORKS = {
    "resnet18": (torchvision.models.resnet18, 224),
    "resnet50": (torchvision.models.resnet50, 224),
    "resnext50_32x4d": (torchvision.models.resnext50_32x4d, 224),
    "vgg16": (lambda: no_init("vgg16"), 224),
    "vgg16_bn": (lambda: no_init("vgg16_bn"), 224),
    "inception_v3": (lambda: no_init("inception_v3", transform_input=True), 299),
    "inception_v3, plain": (lambda: no_init("inception_v3", aux_logits=False), 299),
    "squeezenet1_1": (torchvision.models.squeezenet1_1, 224),
    "resnet20": (lambda: ResNetCifar(3), 32),
    "resnet56": (lambda: ResNetCifar(9), 32),
}

# Further classifiers that the operations reach.
OTHERS = {
    "alexnet": (torchvision.models.alexnet, 224),
    "densenet121": (torchvision.models.densenet121, 224),
    "efficientnet_b0": (torchvision.models.efficientnet_b0, 224),
    "googlenet": (lambda: no_init("googlenet", transform_input=True), 224),
    "mnasnet1_0": (torchvision.models.mnasnet1_0, 224),
    "mobilenet_v2": (torchvision.models.mobilenet_v2, 224),
    "mobilenet_v3_small": (torchvision.models.mobilenet_v3_small, 224),
    "regnet_y_400mf": (torchvision.models.regnet_y_400mf, 224),
    "shufflenet_v2_x1_0": (torchvision.models.shufflenet_v2_x1_0, 224),
    "squeezenet1_0": (torchvision.models.squeezenet1_0, 224),
}

PATTERNS = {
    "8x8": lambda model: prune_blocks(model, 0.5),
    "2:4": lambda model: prune_groups(model, 2, 4),
}


def export(model: nn.Module, size: int, path: Path) -> ExportReport:
    """Export after verification at batch 1 and 3, and check both once more from here."""
    images = torch.randn(3, 3, size, size, generator=torch.Generator().manual_seed(0))
    report = export_file(model, path, images)
    network = load(path)
    for batch in (images[:1], images):
        with torch.no_grad():
            expected = model(batch)
        allowed = tolerance(network.model, float(expected.abs().max()))
        assert (torch.from_numpy(network(batch.numpy())) - expected).abs().max() <= allowed
    network.close()
    return report


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize(("build", "size"), NETWORKS.values(), ids=NETWORKS)
def test_pruned_networks_agree(tmp_path, build, size, pattern):
    model = randomized(build())
    PATTERNS[pattern](model)
    report = export(model, size, tmp_path / "net.bsr.safetensors")
    # Few blocks may make larger ones by chance.
    wide = [row for row in report.layers if min(row.shape[:2]) >= 64]
    assert {row.layout for row in wide} == {"bsr 8x8" if pattern == "8x8" else "nm 2:4"}
    assert report.verification.same_argmax == report.verification.images
    assert report.ratio < 0.85


@pytest.mark.parametrize(("build", "size"), OTHERS.values(), ids=OTHERS)
def test_other_classifiers_agree(tmp_path, build, size):
    model = randomized(build())
    prune_blocks(model, 0.5)
    assert export(model, size, tmp_path / "net.bsr.safetensors").ratio < 0.9


@pytest.mark.parametrize("name", ["resnet20", "resnet32", "resnet44", "resnet56"])
def test_pretrained_cifar_resnets_agree_on_every_image(tmp_path, name):
    images, weights = (
        os.environ.get("BLOCKSPARSE_CIFAR10"),
        os.environ.get("BLOCKSPARSE_CIFAR10_WEIGHTS"),
    )
    if not images or not weights:
        pytest.skip(
            "set BLOCKSPARSE_CIFAR10 to a folder with train/ and val/ of CIFAR-10 in class folders "
            "and BLOCKSPARSE_CIFAR10_WEIGHTS to one with cifar10_resnet20.safetensors and so on"
        )
    data = ImageFolder(
        root=images,
        size=32,
        resize=None,
        mean=(0.485, 0.456, 0.406),
        std=(0.229, 0.224, 0.225),
        val_batch_size=500,
        num_workers=0,
    )
    file = Path(weights) / f"cifar10_{name}.safetensors"
    model = build_model(name, num_classes=10, input_shape=(3, 32, 32), weights=file).eval()
    loader = data.val_dataloader()
    sample, _ = next(iter(loader))
    report = export_file(model, tmp_path / "net.bsr.safetensors", sample[:1], val_loader=loader)
    check = report.verification
    assert check.val_images == len(loader.source) > 0
    assert check.same_argmax == check.images
    assert check.accuracy_torch == check.accuracy_runtime > 0.9
