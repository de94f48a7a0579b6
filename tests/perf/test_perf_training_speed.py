"""The measurement of training steps: what it times, and what it prints."""

from __future__ import annotations

import json
import time

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from benchmarks.training_figures import BASELINE, OTHERS, PARTS, Result, Row, Variant
from benchmarks.training_speed import main, page
from benchmarks.training_steps import Batches, Decoding, Step, make_data, write_pictures
from blocksparse.perf import Timing
from blocksparse.training import build_model

QUICK = "--model resnet8 --image 16 --batch 4 --threads 1 --rounds 1"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    return make_data(tmp_path_factory.mktemp("files"), 16, 4, 0)


@pytest.fixture
def network():
    torch.manual_seed(0)
    return build_model("resnet8", num_classes=10, input_shape=(3, 16, 16))


def weights(step):
    return step._module.model.state_dict()


def test_pictures_are_smooth_like_photographs(tmp_path):
    write_pictures(tmp_path, 2, 64, 0)
    first, second = (np.asarray(Image.open(tmp_path / f"{i}.png"), float) for i in range(2))
    assert first.shape == (64, 64, 3)
    assert not np.array_equal(first, second)
    # Neighbours are alike: of noise they would differ by 1.13 standard deviations.
    assert np.abs(np.diff(first, axis=1)).mean() < 0.75 * first.std()
    assert np.corrcoef(first[..., 0].ravel(), first[..., 1].ravel())[0, 1] > 0.8


def test_every_variant_takes_the_same_step(data, network):
    """They differ in how they compute, not in what; but for the teacher and the augmentation."""
    batches = {cached: Batches.of(data[cached]) for cached in data}
    steps = {
        variant.name: Step(variant, network, batches[not variant.from_files])
        for variant in (BASELINE, *OTHERS)
        if not variant.compiled
    }
    for step in steps.values():
        step()
        step()
    wanted = weights(steps[BASELINE.name])
    for name, step in steps.items():
        far = name in ("decoded-each-time", "no-teacher")
        tolerance = {"rtol": 0, "atol": 2e-2 if "bf16" in name else 1e-5}
        close = [
            torch.allclose(value, wanted[key], **tolerance) for key, value in weights(step).items()
        ]
        assert all(close) != far, name
        layer, taught = (
            model.layer3[0].conv2.weight for model in (step._module.model, step._teacher.network)
        )
        assert layer.is_contiguous() != step.variant.channels_last
        assert taught.is_contiguous() != (step.variant.channels_last and step.variant.teacher)
        # Rounding to 8 bits shows, and that of another order of sums does not.
        moved = float((layer.detach() - wanted["layer3.0.conv2.weight"]).abs().max())
        assert far or (moved > 1e-6) == step.variant.autocast, (name, moved)
        assert float((layer == 0).float().mean()) == 0.5
        assert len(step.seen) == 2
        assert tuple(step.seen[0]) == PARTS
        assert (step.seen[0]["teacher's forward"] > 0) == step.variant.teacher


def test_parts_add_up_to_the_step(data, network):
    step = Step(BASELINE, network, Batches.of(data[True]))
    assert step.first() > 0
    assert step.seen == step.cpu == []  # it set up memory
    for _ in range(3):
        start = time.perf_counter()
        step()
        elapsed = time.perf_counter() - start
        assert 0.5 * elapsed < sum(step.seen[-1].values()) <= elapsed
        assert step.cpu[-1] > 0


def test_decoding_opens_the_files_of_a_batch(data, monkeypatch):
    opened = []
    monkeypatch.setattr(
        "benchmarks.training_steps.read_image",
        lambda path, channels: opened.append(path) or Image.new("RGB", (2, 2)),
    )
    Decoding(data[True].root, 4)()
    assert len(set(opened)) == 4


def test_command(tmp_path, monkeypatch, capsys):
    variants = (
        Variant("channels-last", channels_last=True),
        Variant("without", teacher=False),
        Variant("bf16", autocast=True),
        Variant("compile", compiled=True),
    )

    def fail(*args, **kwargs):
        raise RuntimeError("no compiler\nfor miles")

    def first(step):
        step()
        return 70.5 if step.variant.autocast else 1.0

    monkeypatch.setattr("benchmarks.training_speed.OTHERS", variants)
    monkeypatch.setattr(nn.Module, "compile", fail)
    monkeypatch.setattr(Step, "first", first)
    before = torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()
    assert main([*QUICK.split(), "--without", "without", "--output", str(tmp_path)]) == 0
    assert (torch.get_num_threads(), torch.are_deterministic_algorithms_enabled()) == before
    text = (tmp_path / "training-resnet8-image16-batch4-threads1.md").read_text()
    assert capsys.readouterr().out == text
    assert "Without is left out, as asked." in text
    assert "Compile is left out, it failed: no compiler." in text
    assert (
        "Bf16 took no turns: one step takes 70.50 s, 70.5 times the first step of contiguous."
        in text
    )
    facts = json.loads((tmp_path / "training-resnet8-image16-batch4-threads1.json").read_text())
    assert [row["name"] for row in facts["rows"]] == ["contiguous", "channels-last"]
    assert facts["times_as_fast"]["contiguous"] == 1.0


def test_an_unknown_network_is_said(tmp_path, capsys):
    assert main(["--model", "resnet21", "--output", str(tmp_path)]) == 1
    assert "resnet21" in capsys.readouterr().err


def timing(ms, spread=1.0):
    return Timing(ms, ms, ms * spread, ms, 7)


def result(spread=1.0, cpu=90.0):
    parts = {part: timing(ms) for part, ms in zip(PARTS, (1, 20, 24, 50, 4, 1), strict=True)}
    rows = tuple(
        Row(name, taken, timing(own), parts)
        for name, taken, own in (
            ("contiguous", timing(100.0), cpu),
            ("channels-last", timing(80.0), 60.0),
            ("busy", timing(200.0, spread), 100.0),
        )
    )
    return Result(
        "resnet20", 32, 32, 128, 1, "today", "here", "command", rows, timing(40.0), ("x failed",)
    )


def test_page():
    text = page(result())
    assert "| backward | 50.0 | 50.0 to 50.0 | 2560.0 | 50.0 % |" in text
    assert "| channels-last | 80.0 | 80.0 to 80.0 | 1600.0 | 1.25 | 60.0 | 1.50 |" in text
    assert "| channels-last | 1.0 | 20.0 | 24.0 | 50.0 | 4.0 | 1.0 |" in text
    assert "files of a batch (PNG, 32x32 pixels)" in text
    assert "X failed." in text
    assert "Not to be quoted" not in text
    assert "**Not to be quoted.** The machine was busy: the quartiles of busy" in page(result(1.3))
    # Steady load makes no wide quartiles, but the process waits for a core.
    assert "the process had 0.40 of a core" in page(result(cpu=40.0))
