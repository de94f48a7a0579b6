"""The plan: which layers are pruned and how far, what is refused, and what is written down."""

from __future__ import annotations

import json
import math

import pytest
import torch
import torchvision
from torch import nn

from blocksparse.sparsity import (
    NM,
    Block,
    Floors,
    Global,
    Layers,
    Plan,
    Targets,
    Unstructured,
    VectorNM,
    layer_mask,
    pattern_from_json,
    pattern_to_json,
    plan_markdown,
    plan_masks,
    plan_table,
    resolve,
    save_plan,
)


def small_network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 32, 3),
        nn.Conv2d(32, 32, 3, groups=32),
        nn.Conv2d(32, 64, 3, groups=4),
        nn.Conv2d(64, 40, (1, 3)),
        nn.ConvTranspose2d(40, 40, 2),
        nn.Conv2d(40, 64, 1),
        nn.Flatten(),
        nn.Linear(64, 100),
        nn.Linear(100, 10),
    )


def reasons(plan: Plan) -> dict[str, str]:
    return {layer.name: layer.reason for layer in plan.layers if not layer.pruned}


def targets(plan: Plan) -> dict[str, float | None]:
    return {layer.name: layer.target for layer in plan.pruned}


def test_what_stays_dense_says_why():
    plan = resolve(small_network(), target=0.5)
    assert reasons(plan) == {
        "0": "first convolution",
        "1": "depthwise convolution (groups=32)",
        "2": "grouped convolution (groups=4)",
        "4": "transposed convolution",
        "8": "classifier",
    }
    assert [layer.name for layer in plan.pruned] == ["3", "5", "7"]


def test_first_convolution_and_classifier_are_pruned_on_request():
    plan = resolve(
        small_network(),
        target=0.5,
        pattern=Block(2, 2),
        layers=Layers(first_conv_dense=False, classifier_dense=False),
    )
    assert {"0", "8"} <= set(targets(plan))


@pytest.mark.parametrize(
    ("name", "dense"),
    [
        ("resnet18", {"conv1": "first convolution", "fc": "classifier"}),
        (
            "squeezenet1_1",
            {"features.0": "first convolution", "classifier.1": "classifier"},
        ),
        (
            "inception_v3",
            {
                "Conv2d_1a_3x3.conv": "first convolution",
                "fc": "classifier",
                "AuxLogits.conv0.conv": "auxiliary classifier",
                "AuxLogits.conv1.conv": "auxiliary classifier",
                "AuxLogits.fc": "auxiliary classifier",
            },
        ),
        ("vgg11", {"features.0": "first convolution", "classifier.6": "classifier"}),
    ],
)
def test_first_convolution_and_classifier_of_real_networks(name, dense):
    with torch.device("meta"):
        network = torchvision.models.get_model(name, weights=None)
    plan = resolve(network, target=0.5)
    assert reasons(plan) == dense


def test_a_weight_used_twice_is_pruned_once():
    network = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 4))
    network[1].weight = network[0].weight
    plan = resolve(network, target=0.5, pattern=Block(4, 4))
    assert reasons(plan)["1"] == "shares its weight with 0"


def test_a_computed_weight_stays_dense():
    network = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 4))
    nn.utils.parametrizations.weight_norm(network[0])
    plan = resolve(network, target=0.5, pattern=Block(4, 4))
    assert reasons(plan)["0"] == "its weight is computed from other parameters"


@pytest.mark.parametrize("key", ["include", "dense", "targets"])
def test_a_glob_that_matches_nothing_lists_the_layers(key):
    network = torchvision.models.resnet18()
    allocation = Targets([("layer1.conv1", 0.3)]) if key == "targets" else None
    layers = Layers(**{key: ["layer1.conv1"]}) if key != "targets" else None
    with pytest.raises(ValueError, match=r"no layer.*Did you mean.*layer1\.0\.conv1") as error:
        resolve(network, target=0.5, allocation=allocation, layers=layers)
    assert "layer4.1.conv2" in str(error.value)
    assert key in str(error.value)


def test_targets_of_layers_left_dense_say_why_and_what_to_change():
    network = torchvision.models.resnet18()

    def plan(glob: str, sparsity: float, layers: Layers | None = None) -> Plan:
        return resolve(network, target=0.5, allocation=Targets([(glob, sparsity)]), layers=layers)

    with pytest.raises(ValueError, match=r"conv1 \(first conv.*sparsity\.first_conv_dense=false"):
        plan("conv1", 0.3)
    with pytest.raises(ValueError, match=r"fc \(classifier: set sparsity\.classifier_dense=false"):
        plan("fc", 0.3)
    with pytest.raises(ValueError, match=r"in dense: take it out of sparsity\.dense"):
        plan("layer1.*", 0.3, Layers(dense=["layer1.*"]))
    assert reasons(plan("conv1", 0.0))["conv1"] == "first convolution"
    assert targets(plan("*conv1", 0.25))["layer1.0.conv1"] == 0.25


def test_nothing_left_to_prune_lists_the_layers_and_reasons():
    with pytest.raises(ValueError, match="0: first convolution; 1: classifier"):
        resolve(nn.Sequential(nn.Conv2d(3, 8, 3), nn.Linear(8, 2)), target=0.5)
    with pytest.raises(ValueError, match="no convolution and no linear layer"):
        resolve(nn.Sequential(nn.ReLU()), target=0.5)


def test_include_and_dense_choose_layers():
    network = torchvision.models.resnet18()
    plan = resolve(network, target=0.5, layers=Layers(include=["layer[34].*"], dense=["*.conv2"]))
    assert set(targets(plan)) == {
        f"layer{i}.{name}" for i in (3, 4) for name in ("0.conv1", "0.downsample.0", "1.conv1")
    }
    assert reasons(plan)["layer3.0.conv2"] == "in dense"
    assert reasons(plan)["layer1.0.conv1"] == "not in include"


def test_the_last_match_wins_and_zero_is_dense():
    network = torchvision.models.resnet18()
    allocation = Targets([("layer*", 0.5), ("layer4.*", 0.75), ("layer2.*", 0.0), ("*.1.*", 0.25)])
    found = targets(resolve(network, target=0.9, allocation=allocation))
    assert found["layer1.0.conv1"] == 0.5
    assert found["layer4.0.conv1"] == 0.75
    assert found["layer4.1.conv1"] == 0.25
    assert "layer2.0.conv1" not in found
    assert found["layer2.1.conv1"] == 0.25


def test_layers_without_a_target_of_their_own_share_the_general_one():
    network = torchvision.models.resnet18()
    found = targets(resolve(network, target=0.5, allocation=Targets([["layer4.*", 0.75]])))
    assert found["layer4.1.conv2"] == 0.75
    assert found["layer3.1.conv2"] == 0.5


def narrow_and_wide() -> nn.Module:
    """Grids of 2x2, 8x2 and 8x8 blocks of 8x8."""
    return nn.Sequential(
        nn.Conv2d(3, 16, 3),
        nn.Conv2d(16, 16, 3),
        nn.Conv2d(16, 64, 3),
        nn.Conv2d(64, 64, 3),
        nn.Linear(64, 10),
    )


def test_what_a_narrow_layer_may_not_lose_the_others_do():
    plan = resolve(narrow_and_wide(), target=0.75)
    found = targets(plan)
    assert found["1"] == 0.5
    assert found["2"] == 0.5
    assert found["3"] > 0.75
    assert plan.zeros >= 0.75 * plan.prunable
    assert {layer.name: layer.reason for layer in plan.pruned} == {
        "1": "held back by the floors",
        "2": "held back by the floors",
        "3": "",
    }
    masks = plan_masks(plan, plan.weights(narrow_and_wide()), 1.0)
    for layer in plan.pruned:
        assert int((~masks[layer.param]).sum()) >= layer.zeros


def test_a_target_beyond_the_floors_is_an_error_at_once():
    # 4 + 16 + 64 blocks, of which 2 + 8 + 8 stay.
    most = 1 - 18 / 84
    with pytest.raises(ValueError, match=rf"target 0\.9 cannot .* at most {most:.4f}") as error:
        resolve(narrow_and_wide(), target=0.9)
    assert "keep_channels=True" in str(error.value)
    assert "2 0.5000, 1 0.5000, 3 0.8750" in str(error.value)
    assert resolve(narrow_and_wide(), target=most - 1e-4).sparsity == pytest.approx(most, abs=2e-4)
    loose = resolve(narrow_and_wide(), target=0.9, floors=Floors(keep_channels=False))
    assert loose.zeros >= 0.9 * loose.prunable
    with pytest.raises(ValueError, match=r"cannot be reached.*min_density=0\.2"):
        resolve(narrow_and_wide(), target=0.9, floors=Floors(0.2, keep_channels=False))
    with pytest.raises(ValueError, match="cannot be reached"):
        resolve(narrow_and_wide(), target=0.9, allocation=Global())
    with pytest.raises(ValueError, match=r"at most 0\.5000 in 1, for which targets ask 0\.75"):
        resolve(narrow_and_wide(), target=0.5, allocation=Targets([("1", 0.75)]))


def test_a_target_beyond_the_pattern_is_an_error_at_once():
    with pytest.raises(ValueError, match=r"more than the pattern can give, which is 0\.5"):
        resolve(narrow_and_wide(), target=0.75, pattern=NM(2, 4))
    assert resolve(narrow_and_wide(), target=0.5, pattern=NM(2, 4)).sparsity == 0.5


@pytest.mark.parametrize("target", [-0.1, 1.5])
def test_a_target_that_is_no_fraction_is_an_error(target):
    with pytest.raises(ValueError, match=r"fraction in 0\.\.1"):
        resolve(narrow_and_wide(), target=target)


def test_target_zero_leaves_all_dense():
    plan = resolve(narrow_and_wide(), target=0.0)
    assert plan.pruned == ()
    assert reasons(plan)["3"] == "target 0"
    assert resolve(narrow_and_wide(), target=0.0, allocation=Global()).pruned == ()


def test_ragged_groups_give_what_they_can():
    network = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.Conv2d(6, 8, 1), nn.Conv2d(2, 8, 1), nn.Linear(9, 2)
    )
    plan = resolve(network, target=0.5, pattern=NM(2, 4))
    # Of 6 channels, 4 form a group that loses 2 and 2 one that loses none.
    assert targets(plan) == {"1": pytest.approx(1 / 3)}
    assert reasons(plan)["2"] == "no group has more inputs than 2:4 keeps"


def test_from_model_starts_with_what_is_there():
    network = narrow_and_wide()
    with torch.no_grad():
        network[3].weight[:8, :40] = 0.0  # five blocks of a row of eight
        network[3].weight[16:24] = 0.0  # a whole row, of which the floors keep one block
        network[3].weight[8, 8] = 0.0  # not a block
        network[1].weight.mul_(layer_mask(network[1].weight, Block(8, 8), 0.25))
    plan = resolve(network, target=0.5, initial="from_model")
    assert {layer.name: layer.start / layer.size for layer in plan.pruned} == {
        "1": 0.25,
        "2": 0.0,
        "3": 12 / 64,
    }
    masks = plan_masks(plan, plan.weights(network), 0.0)
    assert not masks["3.weight"][:8, :40].any()
    assert int(masks["3.weight"][16:24].sum()) == 8 * 8 * 9
    assert int((~masks["3.weight"]).sum()) == 12 * 8 * 8 * 9
    nm = narrow_and_wide()
    with torch.no_grad():
        nm[3].weight.mul_(layer_mask(nm[3].weight, NM(2, 4), 0.25))
    plan = resolve(nm, target=0.5, pattern=NM(2, 4), initial="from_model")
    assert [layer.start / layer.size for layer in plan.pruned] == [0.0, 0.0, 0.25]


def test_a_layer_that_already_has_more_keeps_it():
    network = narrow_and_wide()
    with torch.no_grad():
        mask = layer_mask(network[3].weight, Block(8, 8), 0.75, floors=Floors())
        network[3].weight.mul_(mask)
    plan = resolve(network, target=0.5, initial="from_model")
    last = plan.pruned[-1]
    assert (last.target, last.reason) == (0.75, "already has this much")


def test_a_layer_with_target_0_keeps_what_it_already_has():
    network = narrow_and_wide()
    with torch.no_grad():
        network[3].weight.mul_(layer_mask(network[3].weight, Block(8, 8), 0.75, floors=Floors()))
    plan = resolve(network, target=0.0, initial="from_model")
    assert [(layer.name, layer.target, layer.reason) for layer in plan.pruned] == [
        ("3", 0.75, "already has this much")
    ]
    assert not resolve(network, target=0.0).pruned


def test_groups_of_which_not_all_obey_are_said_to_be_stored_as_dense():
    plan = resolve(narrow_and_wide(), target=0.4, pattern=NM(2, 4))
    assert {layer.reason for layer in plan.pruned} == {"not all groups reach 2:4: stored as dense"}
    assert not any(layer.reason for layer in resolve(narrow_and_wide(), target=0.4).pruned)
    assert not any(
        layer.reason for layer in resolve(narrow_and_wide(), target=0.5, pattern=NM(2, 4)).pruned
    )


def test_initial_sparsity_is_checked():
    plan = resolve(narrow_and_wide(), target=0.5, initial=0.25)
    assert [layer.start / layer.size for layer in plan.pruned] == [0.25] * 3
    with pytest.raises(ValueError, match=r"between 0 and the target 0\.5"):
        resolve(narrow_and_wide(), target=0.5, initial=0.6)
    with pytest.raises(ValueError, match="'from_model'"):
        resolve(narrow_and_wide(), target=0.5, initial="model")


@pytest.mark.parametrize("share", [0.0, 0.2, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("allocation", [None, Global()])
def test_zeros_on_the_way_follow_the_share(share, allocation):
    network = nn.Sequential(*[nn.Conv2d(64, 64, 3) for _ in range(4)], nn.Linear(64, 2))
    plan = resolve(network, target=0.75, initial=0.25, allocation=allocation)
    masks = plan_masks(plan, plan.weights(network), share)
    total = sum(int((~mask).sum()) for mask in masks.values())
    unit = 8 * 8 * 9
    wanted = (0.25 + 0.5 * share) * plan.prunable
    assert wanted - 1 <= total < wanted + (3 if allocation is None else 1) * unit


def test_the_plan_survives_json_and_is_written(tmp_path):
    network = torchvision.models.resnet18()
    for pattern in (Block(8, 4), NM(1, 4), VectorNM(4, 2, 4), Unstructured()):
        assert pattern_from_json(json.loads(json.dumps(pattern_to_json(pattern)))) == pattern
    with pytest.raises(ValueError, match="unknown kind of pattern 'ring'"):
        pattern_from_json({"kind": "ring"})
    plan = resolve(network, target=0.5, allocation=Global(), initial=0.1)
    as_json, as_text = save_plan(plan, tmp_path / "new")
    assert Plan.from_json(json.loads(as_json.read_text())) == plan
    text = as_text.read_text()
    assert text == plan_markdown(plan)
    assert "| conv1 | 64x3x7x7 | dense |  | first convolution |" in text
    assert "0.5000 of 11,157,504 prunable weights" in text
    all_weights = sum(param.numel() for param in network.parameters())
    assert f"{plan.zeros / all_weights:.4f} of all {all_weights:,} parameters" in text
    assert plan_table(plan).row_count == 21
    assert plan.patterns()["layer1.0.conv1.weight"] == Block(8, 8)
    assert "conv1.weight" not in plan.patterns()


def test_another_network_than_the_plans_is_refused():
    plan = resolve(narrow_and_wide(), target=0.5)
    other = narrow_and_wide()
    other[3] = nn.Conv2d(64, 32, 3)
    with pytest.raises(
        ValueError, match=r"3\.weight: the sparsity plan has shape \(64, 64, 3, 3\)"
    ):
        plan.weights(other)
    with pytest.raises(ValueError, match="has no such parameter"):
        plan.weights(nn.Sequential(nn.Conv2d(3, 16, 3)))


def test_convolutions_of_one_and_three_dimensions_are_pruned():
    network = nn.Sequential(
        nn.Conv1d(4, 16, 3), nn.Conv1d(16, 24, 5), nn.Conv3d(24, 16, 3), nn.Linear(16, 2)
    )
    plan = resolve(network, target=0.5)
    masks = plan_masks(plan, plan.weights(network), 1.0)
    assert {param: mask.shape for param, mask in masks.items()} == {
        "1.weight": (24, 16, 5),
        "2.weight": (16, 24, 3, 3, 3),
    }
    assert all(math.isclose(1 - mask.float().mean(), 0.5) for mask in masks.values())
