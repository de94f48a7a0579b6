"""Allocations beside uniform and global: ERK, and files with errors that help."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from blocksparse.sparsity import ERK, NM, Block, FileAllocation, Pattern, Plan, resolve
from blocksparse.sparsity.allocation import Candidate, Unreachable
from blocksparse.sparsity.allocation_file import StoredLayer, read_allocation, write_allocation


def network() -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(3, 16, 3),
        nn.Conv2d(16, 32, 3),
        nn.Conv2d(32, 64, 3),
        nn.Conv2d(64, 60, 1),
        nn.Linear(60, 10),
    )


def sparsities(plan: Plan) -> dict[str, float | None]:
    return {layer.name: layer.target for layer in plan.pruned}


@given(
    shapes=st.lists(
        st.tuples(*[st.integers(1, 64)] * 2, *[st.integers(1, 3)] * 2), min_size=1, max_size=5
    ),
    target=st.floats(0.05, 0.95),
)
@settings(max_examples=60, deadline=None)
def test_erk_keeps_in_proportion_to_the_sides(
    shapes: list[tuple[int, int, int, int]], target: float
) -> None:
    layers = [
        Candidate(str(index), math.prod(shape), math.prod(shape), shape)
        for index, shape in enumerate(shapes)
    ]
    zeros = ERK().zeros(layers, target, 1.0)
    sizes = [layer.full for layer in layers]
    assert target * sum(sizes) - 1e-3 <= sum(zeros) <= target * sum(sizes) + len(layers) + 1
    # One factor explains all layers that are neither dense nor, by rounding to weights, nearly so.
    raw = [sum(shape) / math.prod(shape) for shape in shapes]
    bounds = [
        ((size - gone) / size / each, (size - gone + 1) / size / each)
        for size, gone, each in zip(sizes, zeros, raw, strict=True)
        if gone > 0
    ]
    lowest_top = min((high for _, high in bounds), default=math.inf)
    assert all(low <= lowest_top * (1 + 1e-6) for low, _ in bounds)


def test_erk_takes_what_the_floors_allow_and_the_rest_elsewhere() -> None:
    plan = resolve(network(), target=0.7, allocation=ERK())
    assert plan.sparsity >= 0.7
    found = sparsities(plan)
    assert found["1"] < found["2"]  # the small one keeps more
    with pytest.raises(ValueError, match="cannot be reached"):
        resolve(network(), target=0.97, allocation=ERK())


def stored(plan: Plan, path: Path) -> Path:
    layers = {x.name: StoredLayer(x.shape, x.target or 0.0) for x in plan.pruned}
    write_allocation(path, layers, {"pattern": str(plan.pattern), "note": "a: b, ü"})
    return path


@pytest.mark.parametrize("pattern", [Block(8, 8), Block(4, 6), NM(2, 4)], ids=str)
def test_a_file_gives_back_what_was_written(pattern: Pattern, tmp_path: Path) -> None:
    plan = resolve(network(), target=0.37, pattern=pattern)
    path = stored(plan, tmp_path / "allocation.yaml")
    again = resolve(
        network(), target=0.9, pattern=pattern, allocation=FileAllocation(str(path))
    )  # the target of the file counts
    assert [layer.zeros for layer in again.layers] == [layer.zeros for layer in plan.layers]
    assert again.target == pytest.approx(plan.sparsity)
    assert yaml.safe_load(path.read_text())["note"] == "a: b, ü"
    assert [entry.name for entry in tmp_path.iterdir()] == ["allocation.yaml"]


def test_a_file_may_leave_layers_dense_and_have_names_with_signs(tmp_path: Path) -> None:
    layers = {"1": StoredLayer((32, 16, 3, 3), 0.0), "a: b[0]": StoredLayer((8, 8), 1 / 3)}
    path = tmp_path / "a.yaml"
    write_allocation(path, layers, {})
    assert read_allocation(path) == (layers, "")


def test_layers_a_file_leaves_dense_count(tmp_path: Path) -> None:
    shapes = {"1": (32, 16, 3, 3), "2": (64, 32, 3, 3), "3": (60, 64, 1, 1)}
    layers = {name: StoredLayer(shape, 0.5 * (name == "2")) for name, shape in shapes.items()}
    write_allocation(tmp_path / "a.yaml", layers, {})
    plan = resolve(network(), target=0.9, allocation=FileAllocation(str(tmp_path / "a.yaml")))
    assert [layer.name for layer in plan.pruned] == ["2"]
    assert plan.prunable == sum(map(math.prod, shapes.values()))
    assert plan.sparsity == pytest.approx(plan.target)


def test_a_file_of_another_pattern_is_used_and_says_so(tmp_path: Path, caplog) -> None:
    path = stored(resolve(network(), target=0.5, pattern=NM(2, 4)), tmp_path / "a.yaml")
    resolve(network(), target=0.5, pattern=NM(2, 4), allocation=FileAllocation(str(path)))
    assert caplog.text == ""
    plan = resolve(network(), target=0.5, pattern=Block(4, 4), allocation=FileAllocation(str(path)))
    assert plan.sparsity == pytest.approx(0.5)
    assert f"a.yaml: was made for {NM(2, 4)}, and the layers are pruned with" in caplog.text


def test_a_file_may_leave_its_pattern_open(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text("pattern:\nlayers: {'2': {shape: [64, 32, 3, 3], sparsity: 0.5}}\n")
    assert read_allocation(path)[1] == ""


def test_a_file_of_another_network_says_what_differs(tmp_path: Path) -> None:
    path = stored(resolve(network(), target=0.5), tmp_path / "a.yaml")
    other = network()
    other[1] = nn.Conv2d(16, 32, 1)
    other[3] = nn.Identity()
    other.append(nn.Linear(60, 64))
    other.append(nn.Linear(64, 10))
    with pytest.raises(ValueError, match=r"a\.yaml: made for another network") as error:
        resolve(other, target=0.5, allocation=FileAllocation(str(path)))
    for part in (
        "1 is 32x16x3x3 in the file, 32x16x1x1 in the network",
        "3 is not in the network",
        "5 is not in the file",
        "task=allocate",
    ):
        assert part in str(error.value)


def test_a_file_that_prunes_what_stays_dense_says_why(tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    plan = resolve(network(), target=0.5)
    layers = {x.name: StoredLayer(x.shape, 0.5) for x in plan.pruned}
    write_allocation(path, {**layers, "0": StoredLayer((16, 3, 3, 3), 0.5)}, {})
    with pytest.raises(ValueError, match=r"0 stays dense \(first convolution\)"):
        resolve(network(), target=0.5, allocation=FileAllocation(str(path)))
    write_allocation(path, {**layers, "3": StoredLayer((60, 64, 1, 1), 0.99)}, {})
    with pytest.raises(ValueError, match=r"cannot be reached.*in 3, for.*a\.yaml asks 0\.99"):
        resolve(network(), target=0.5, allocation=FileAllocation(str(path)))
    with pytest.raises(Unreachable):
        FileAllocation(str(path)).zeros([Candidate("3", 100, 90)], 0.5, 1.0)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("layers: [1", "not a YAML file"),
        ("- 1", "not an allocation, which has `layers:`"),
        ("layers: {}", "not an allocation"),
        ("layers: {a: 0.5}", "a: 0.5 is not a shape and a sparsity"),
        ("layers: {a: {shape: [3, x], sparsity: 0.5}}", "is not a shape and a sparsity"),
        ("layers: {a: {shape: [3, 3], sparsity: 1.5}}", r"such as \{shape: \[16, 16, 3, 3\]"),
        ("layers: {a: {shape: [3, 3], sparsity: .nan}}", "is not a shape and a sparsity in 0..1"),
    ],
)
def test_what_is_no_allocation_is_refused(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "a.yaml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        FileAllocation(str(path))


def test_no_file_says_what_writes_one(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no such file\. python train\.py task=allocate"):
        FileAllocation(str(tmp_path / "none.yaml"))
