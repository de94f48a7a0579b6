"""`blocksparse what-if`: from a file or a name to tables, advice, JSON, and errors of one line."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
from test_cli import call, small_model

from blocksparse.cli import main
from blocksparse.cli.what_if import _break_even, advice
from blocksparse.format import read, write
from blocksparse.perf.random_masks import Blocks
from blocksparse.perf.timing import Timing
from blocksparse.perf.what_if import what_if
from blocksparse.perf.what_if_figures import LayerTime
from blocksparse.pipeline import untrained


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    path = tmp_path_factory.mktemp("models") / "small.bsr.safetensors"
    write(path, small_model())
    return path


@pytest.fixture(scope="module")
def found():
    return what_if(small_model(), [0.5], Blocks(4, 4), threads=1, rounds=1)


def test_tables_advice_and_json_of_a_file(file, tmp_path, capsys):
    target = tmp_path / "figures.json"
    options = ("--pattern", "block4x4", "--sparsity", "0.75,0.25", "--threads", "1", "--rounds", 2)
    status, out, err = call(capsys, "what-if", file, *options, "--save", target)
    assert (status, err) == (0, "")
    for text in (
        "small.bsr.safetensors: block 4x4 shared, batch 1, 1 thread",
        "ms per batch",
        "break-even",
        "left dense, first convolution: stem",
        "left dense, classifier: fc",
        "only training tells",
        "rounds on",
    ):
        assert text in out
    facts = json.loads(target.read_text())
    assert [row["sparsity"] for row in facts["levels"]] == [0.25, 0.75]
    assert [layer["name"] for layer in facts["layers"]] == ["body", "tail"]
    assert facts["dense"]["timing"]["rounds"] >= 2
    assert facts["machine"]["cores"] >= 1
    assert facts["levels"][0]["file_bytes"] > facts["levels"][1]["file_bytes"]
    assert list(tmp_path.iterdir()) == [target]


def test_layers_can_be_left_dense_or_not(file, tmp_path, capsys):
    target = tmp_path / "figures.json"
    options = ("--pattern", "nm2:4", "--rounds", 1, "--prune-classifier", "--dense", "body,tai*")
    status, out, _ = call(capsys, "what-if", file, *options, "--save", target)
    assert status == 0
    assert "left dense, in dense: body, tail" in out
    assert [layer["name"] for layer in json.loads(target.read_text())["layers"]] == ["fc"]


@pytest.mark.long
def test_a_network_by_name_is_built_in_a_process_of_its_own(capsys):
    options = ("--size", "8", "--rounds", "1", "--sparsity", "0.5", "--threads", "1")
    status, out, err = call(capsys, "what-if", "resnet8", *options)
    assert (status, err) == (0, "")
    assert "resnet8, random weights: block 8x8 shared" in out
    assert "left dense, first convolution: conv1" in out


@pytest.mark.long  # imports PyTorch in a process of its own only to find nothing
def test_a_name_of_no_network_is_one_line_with_near_ones(capsys):
    status, out, err = call(capsys, "what-if", "resnet2O")
    assert (status, out) == (1, "")
    assert len(err.splitlines()) == 1
    assert "resnet2O, which is no model file" in err
    assert "did you mean" in err


@pytest.mark.parametrize(
    ("options", "status", "words"),
    [
        (("--pattern", "block"), 2, "there is no pattern 'block'; there are block8x8"),
        (("--pattern", "nm2:4", "--sparsity", "0.75"), 2, "2:4 has one sparsity, 0.5"),
        (("--size", "32"), 2, "a file's input size is fixed"),
        (("--save", "no/such/folder.json"), 2, "there is no folder"),
        (("--dense", "bodi"), 1, "Did you mean body?"),
        (("--pattern", "block64x64"), 1, "no layer is left to prune with block 64x64 shared"),
    ],
)
def test_errors_are_one_line(file, capsys, options, status, words):
    got, out, err = call(capsys, "what-if", file, *options)
    assert (got, out) == (status, "")
    assert len(err.splitlines()) == 1
    assert words in err


@pytest.mark.parametrize("text", ["1", "-0.5", "half", "0.5,,0.75", "nan", "75"])
def test_sparsities_that_are_none(file, capsys, text):
    with pytest.raises(SystemExit) as leaving:
        main(["what-if", str(file), f"--sparsity={text}"])
    assert leaving.value.code == 2
    assert "such as 0.5,0.75" in capsys.readouterr().err


def test_help_teaches_with_examples(capsys):
    with pytest.raises(SystemExit) as leaving:
        main(["what-if", "--help"])
    assert leaving.value.code == 0
    assert "blocksparse what-if resnet50" in capsys.readouterr().out.split("examples:")[1]


def test_advice_names_levels_and_layers(found):
    row, layer = found.levels[0], found.layers[0]
    fast = replace(row, timing=Timing(1.0, 1.0, 1.0, 1.0, 3), prunable_kept=0.5)
    dense = replace(found.dense, timing=Timing(2.0, 1.5, 2.5, 1.5, 3))
    quick, unsure, slow = (
        replace(
            layer, dense_ms=1.0, dense_q1_ms=0.9, dense_q3_ms=1.1,
            times=(LayerTime(0.5, 0.5, ms, ms - 0.1, ms + 0.1),),
        )
        for ms in (0.5, 1.01, 2.0)
    )  # fmt: skip
    lines = list(advice(replace(found, dense=dense, levels=(fast,), layers=(quick,))))
    assert lines[0] == "Faster than dense beyond the spread of the rounds: 50 %."
    assert lines[-2].startswith("Every layer that is pruned is faster than dense at every level,")
    held = replace(fast, prunable_kept=0.56)
    lines = list(advice(replace(found, dense=dense, levels=(held,), layers=(quick,))))
    assert lines[1].startswith("At 50 %, 56.0 % of the prunable weights are left")
    near = replace(row, timing=Timing(1.4, 1.3, 1.6, 1.3, 3))
    lines = list(advice(replace(found, dense=dense, levels=(near,), layers=(quick, slow))))
    assert lines[0] == "Not faster than dense beyond the spread of the rounds: 50 %."
    assert "At 50 %, 1 of 2 layers are slower than dense: body. Leave them dense" in lines[-2]
    lines = list(advice(replace(found, dense=dense, levels=(fast,), layers=(quick, unsure))))
    assert "At 50 %, 1 of 2 layers differ from dense by no more than the spread" in lines[-2]
    assert not any("Every layer" in line or "slower" in line for line in lines)


def test_break_even_in_words():
    assert [_break_even(share) for share in (None, 0.0, 0.002, 0.128)] == [
        "never",
        "always",
        "always",
        "13 %",
    ]


# the process that builds a network by its name


@pytest.mark.slow
def test_an_untrained_network_has_the_size_it_was_made_for(tmp_path):
    path = tmp_path / "model.bsr.safetensors"
    assert untrained.main(["resnet8", str(path)]) == 0
    model = read(path)
    assert model.input_shape == (3, 32, 32)
    assert model.provenance["weights"] == "random"
    assert untrained._usual_size("inception_v3") == 299
    assert untrained._usual_size("resnet50") == 224


def test_what_cannot_be_built_is_one_line(tmp_path, capsys):
    assert untrained.main(["resnet2O", str(tmp_path / "model")]) == 1
    said = capsys.readouterr().err
    assert len(said.splitlines()) == 1
    assert "did you mean" in said
    assert not list(tmp_path.iterdir())
