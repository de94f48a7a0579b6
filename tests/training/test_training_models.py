"""Networks by name."""

from __future__ import annotations

import urllib.error

import pytest
import torch
import torch.nn.functional as F
import torchvision

from blocksparse.training import ResNetCifar, WeightsError, build_model, model_names
from blocksparse.training.models import CIFAR_RESNETS
from blocksparse.training.resnet_cifar import BasicBlock


def naive_shortcut(x: torch.Tensor, channels: int, stride: int) -> torch.Tensor:
    """Option A of He et al., value by value: every second pixel, new channels around the old."""
    count, old, height, width = x.shape
    before = (channels - old) // 2
    y = x.new_zeros(count, channels, -(-height // stride), -(-width // stride))
    for n in range(count):
        for c in range(old):
            for i in range(y.shape[2]):
                for j in range(y.shape[3]):
                    y[n, before + c, i, j] = x[n, c, i * stride, j * stride]
    return y


@pytest.mark.parametrize(
    ("in_channels", "channels", "stride"), [(3, 3, 1), (2, 6, 2), (4, 7, 2), (3, 3, 2), (2, 5, 1)]
)
@pytest.mark.parametrize("size", [(6, 8), (5, 7), (1, 1)])
def test_block_without_residual_is_its_shortcut(in_channels, channels, stride, size):
    block = BasicBlock(in_channels, channels, stride).eval()
    torch.nn.init.zeros_(block.conv2.weight)
    x = torch.rand(2, in_channels, *size)  # positive, so that the last ReLU passes it
    assert torch.equal(block(x), naive_shortcut(x, channels, stride))


def naive_resnet(state: dict[str, torch.Tensor], x: torch.Tensor, depth: int) -> torch.Tensor:
    """The network of section 4.2 in evaluation mode, layer by layer from its weights."""

    def convolve(x, conv, norm, stride=1):
        x = F.conv2d(x, state[f"{conv}.weight"], stride=stride, padding=1)
        scale = state[f"{norm}.weight"] / (state[f"{norm}.running_var"] + 1e-5).sqrt()
        shift = state[f"{norm}.bias"] - state[f"{norm}.running_mean"] * scale
        return x * scale[:, None, None] + shift[:, None, None]

    x = convolve(x, "conv1", "bn1").clamp(min=0)
    for stage in (1, 2, 3):
        for i in range(depth):
            name = f"layer{stage}.{i}"
            stride = 2 if stage > 1 and i == 0 else 1
            y = convolve(x, f"{name}.conv1", f"{name}.bn1", stride).clamp(min=0)
            y = convolve(y, f"{name}.conv2", f"{name}.bn2")
            x = (y + naive_shortcut(x, y.shape[1], stride)).clamp(min=0)
    return x.mean((2, 3)) @ state["linear.weight"].T + state["linear.bias"]


@pytest.mark.parametrize(("depth", "widths"), [(1, (2, 4, 6)), (2, (3, 3, 5))])
def test_cifar_resnet_is_the_papers(depth, widths):
    torch.manual_seed(0)
    model = ResNetCifar(depth, 3, 2, widths).double().eval()
    for module in model.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            for vector in (module.weight, module.running_var):
                torch.nn.init.uniform_(vector, 0.5, 2)
            for vector in (module.bias, module.running_mean):
                torch.nn.init.uniform_(vector, -0.5, 0.5)
    x = torch.randn(2, 2, 9, 8, dtype=torch.float64)
    logits = model(x)
    torch.testing.assert_close(logits, naive_resnet(model.state_dict(), x, depth))
    assert not torch.allclose(logits[0], logits[1])  # not all units are dead


@pytest.mark.parametrize(
    ("name", "parameters"),
    # The paper's table 6 says 0.27 M, 0.46 M, 0.66 M, 0.85 M, 1.7 M.
    [
        ("resnet20", 269_722),
        ("resnet32", 464_154),
        ("resnet44", 658_586),
        ("resnet56", 853_018),
        ("resnet110", 1_727_962),
    ],
)
def test_cifar_resnets(name, parameters):
    model = build_model(name, num_classes=10, input_shape=(3, 32, 32))
    assert sum(p.numel() for p in model.parameters()) == parameters
    layers = [m for m in model.modules() if isinstance(m, torch.nn.Conv2d | torch.nn.Linear)]
    assert len(layers) == int(name.removeprefix("resnet"))
    assert set(model.state_dict()) >= {
        "conv1.weight",
        "bn1.running_mean",
        "layer1.0.conv1.weight",
        "layer2.0.bn1.weight",
        "layer3.2.conv2.weight",
        "layer3.2.bn2.bias",
        "linear.weight",
        "linear.bias",
    }


def test_cifar_resnet_widths_and_channels():
    model = build_model("resnet8", num_classes=5, input_shape=(1, 8, 8), widths=[8, 16, 24])
    assert model.conv1.weight.shape == (8, 1, 3, 3)
    assert model.linear.weight.shape == (5, 24)
    assert model(torch.rand(2, 1, 8, 8)).shape == (2, 5)


@pytest.mark.parametrize("widths", [(8, 16), (16, 8, 32), (0, 8, 8)])
def test_cifar_resnet_refuses_widths(widths):
    with pytest.raises(ValueError, match="widths is"):
        ResNetCifar(1, widths=widths)


def test_names():
    names = model_names()
    assert {"resnet8", "resnet50", "vgg16_bn", "inception_v3", "squeezenet1_1"} <= set(names)
    assert not set(CIFAR_RESNETS) & set(torchvision.models.list_models(module=torchvision.models))
    # Not classification models.
    assert not {"fcn_resnet50", "maskrcnn_resnet50_fpn", "raft_large"} & set(names)


@pytest.mark.parametrize(
    ("name", "near"), [("resnet51", "resnet50"), ("resnet22", "resnet20"), ("vgg16bn", "vgg16_bn")]
)
def test_unknown_name(name, near):
    with pytest.raises(ValueError, match=rf"model\.name={name}.*did you mean .*{near}"):
        build_model(name, num_classes=10)


def test_torchvision_model_by_name():
    model = build_model("squeezenet1_1", num_classes=7, options={"dropout": 0.25})
    assert model.training
    assert model.classifier[0].p == 0.25
    assert model.eval()(torch.rand(1, 3, 64, 64)).shape == (1, 7)


def test_wrong_knobs():
    with pytest.raises(ValueError, match="resnet18 takes images of 3 channels, the data has 1"):
        build_model("resnet18", num_classes=10, input_shape=(1, 8, 8))
    with pytest.raises(ValueError, match="resnet18 has fixed widths"):
        build_model("resnet18", num_classes=10, widths=(1, 2, 3))
    with pytest.raises(ValueError, match=r"resnet20 takes no model\.options"):
        build_model("resnet20", num_classes=10, options={"dropout": 0.1})


def test_unknown_pretrained_weights():
    with pytest.raises(WeightsError, match=r"IMAGENET1K_V3: resnet50 has IMAGENET1K_V1, .*_V2"):
        build_model("resnet50", num_classes=1000, weights="IMAGENET1K_V3")
    with pytest.raises(WeightsError, match="resnet20 is not torchvision's"):
        build_model("resnet20", num_classes=10, weights="IMAGENET1K_V1")


@pytest.mark.parametrize("name", ["IMAGENET1K_V1", "SqueezeNet1_1_Weights.IMAGENET1K_V1"])
def test_download_fails(name, monkeypatch, tmp_path):
    def no_network(*args, **kwargs):
        raise urllib.error.URLError("no network")

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr("torch.hub.download_url_to_file", no_network)
    with pytest.raises(WeightsError, match=r"downloading https://.*\.pth failed .*model\.weights"):
        build_model("squeezenet1_1", num_classes=1000, weights=name)


def test_downloaded_weights(monkeypatch):
    """With the download replaced by weights at hand: other classes need a word, the same do not."""
    torch.manual_seed(0)
    full = torchvision.models.squeezenet1_1().state_dict()
    monkeypatch.setattr(
        "torchvision.models._api.load_state_dict_from_url", lambda *args, **kwargs: full
    )
    weights = "IMAGENET1K_V1"
    model = build_model("squeezenet1_1", num_classes=1000, weights=weights)
    assert torch.equal(model.state_dict()["classifier.1.weight"], full["classifier.1.weight"])
    with pytest.raises(WeightsError, match=r"trained for 1000 classes, .* has 5.*new_class"):
        build_model("squeezenet1_1", num_classes=5, weights=weights)
    model = build_model("squeezenet1_1", num_classes=5, weights=weights, new_classifier=True)
    assert model.state_dict()["classifier.1.weight"].shape[0] == 5
    assert torch.equal(model.state_dict()["features.0.weight"], full["features.0.weight"])


def test_downloaded_weights_of_a_network_with_auxiliary_heads(monkeypatch):
    """torchvision's GoogLeNet with weights normalises anew and has no auxiliary heads."""
    full = torchvision.models.googlenet(init_weights=False).state_dict()
    monkeypatch.setattr(
        "torchvision.models._api.load_state_dict_from_url", lambda *args, **kwargs: full
    )
    for num_classes in (1000, 5):
        model = build_model(
            "googlenet", num_classes=num_classes, weights="DEFAULT", new_classifier=True
        )
        assert model.transform_input
        assert not model.aux_logits
        assert model.fc.out_features == num_classes
        assert torch.equal(model.conv1.conv.weight, full["conv1.conv.weight"])
