"""Golden files: every version keeps being read, runs to the same logits, and is hard to break.

A damaged file is an error or another sound model: never a crash, never a large allocation.
"""

from __future__ import annotations

import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from craft import saved

from blocksparse.format import ACTIVATIONS, OPS, FormatError, check_model, read, write
from blocksparse.format.validate import model_arrays
from blocksparse.runtime import reference

GOLDEN = Path(__file__).parents[1] / "golden"
VERSIONS = sorted(path.name.split(".")[0] for path in GOLDEN.glob("*.bsr.safetensors"))


def golden(version: str) -> Path:
    return GOLDEN / f"{version}.bsr.safetensors"


@pytest.mark.parametrize("version", VERSIONS)
def test_golden_logits(version):
    model = read(golden(version))
    with np.load(GOLDEN / f"{version}.npz") as file:
        x, logits = file["x"], file["logits"]
    # Depth 16, longest sum 91 terms: far above what order of summation can do, far below an error.
    np.testing.assert_allclose(reference.run(model, x), logits, rtol=0, atol=1e-4)
    assert np.ptp(logits, axis=0).min() > 0.01


def test_the_newest_golden_file_holds_all_there_is():
    model = read(golden(VERSIONS[-1]))
    assert {node.op for node in model.graph.nodes} == set(OPS)
    assert {type(weight).__name__ for weight in model.weights.values()} == {
        "DenseWeight",
        "BsrWeight",
        "NMWeight",
    }
    used = {node.attrs.get("activation") for node in model.graph.nodes}
    assert len(used & set(ACTIVATIONS)) >= 6
    assert model.classes == ("null", "eins", "zwei", "drei")
    assert model.preprocessing is not None
    assert golden(VERSIONS[-1]).stat().st_size < 20_000


def test_the_newest_golden_file_is_written_the_same_today(tmp_path):
    path = golden(VERSIONS[-1])
    write(tmp_path / "again", read(path))
    assert (tmp_path / "again").read_bytes() == path.read_bytes()


def damaged(raw: bytes, rng: np.random.Generator) -> bytes:
    """Return `raw` with one seeded injury: bytes flipped, set, cut out, put in, or swapped."""
    out = bytearray(raw)
    # Half of the injuries go to the header, where they hurt most.
    header = 8 + int.from_bytes(raw[:8], "little")
    at = int(rng.integers(0, header if rng.random() < 0.5 else len(raw)))
    kind = rng.integers(0, 6)
    if kind == 0:
        out[at] ^= 1 << int(rng.integers(0, 8))
    elif kind == 1:
        out[at] = int(rng.choice([0, 1, 0x7F, 0x80, 0xFF, *b'0129-.e"[]{},: ']))
    elif kind == 2:
        del out[at : at + int(rng.integers(1, 9))]
    elif kind == 3:
        out[at:at] = rng.bytes(int(rng.integers(1, 9)))
    elif kind == 4:
        span = int(rng.integers(1, 33))
        out[at : at + span] = rng.bytes(len(out[at : at + span]))
    else:
        other = int(rng.integers(0, len(raw)))
        out[at], out[other] = out[other], out[at]
    return bytes(out)


def survives(path: Path, raw: bytes, original) -> str:
    """Read damaged bytes under a limit on memory, and say what became of them."""
    saved(path, raw)
    tracemalloc.start()
    try:
        model = read(path)
    except FormatError:
        return "refused"
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 2**21, peak
    if model == original:
        return "equal"
    check_model(model)
    if model.graph == original.graph:
        again, before = model_arrays(model), model_arrays(original)
        assert {k: (v.dtype, v.shape) for k, v in again.items()} == {
            k: (v.dtype, v.shape) for k, v in before.items()
        }
    out = reference.run(model, np.ones((1, *model.input_shape), np.float32))
    assert out.shape == (1, *model.output_shape)
    return "other"


def test_damage(tmp_path):
    path = golden("v1")
    raw, original = path.read_bytes(), read(path)
    rng = np.random.default_rng(2024)
    fates = [survives(tmp_path / "bad", damaged(raw, rng), original) for _ in range(300)]
    count = {fate: fates.count(fate) for fate in ("refused", "equal", "other")}
    # Most injuries must be noticed; values of weights and free text cannot be told from others.
    assert count["refused"] > 150
    assert count["other"] > 20


@pytest.mark.long
def test_every_byte_damaged(tmp_path):
    path = golden("v1")
    raw, original = path.read_bytes(), read(path)
    for at, flip in enumerate(np.random.default_rng(0).choice([0x01, 0x04, 0x80, 0xFF], len(raw))):
        bad = raw[:at] + bytes([raw[at] ^ int(flip)]) + raw[at + 1 :]
        survives(tmp_path / "bad", bad, original)
