"""Reading: whole files, no copies, and errors that say what is wrong."""

from __future__ import annotations

import mmap
import pickle
import tracemalloc

import numpy as np
import pytest
import safetensors.numpy
from craft import join, poke, saved, small_model, split

from blocksparse.format import DenseWeight, FormatError, read, write
from blocksparse.format.reader import release
from blocksparse.format.validate import model_arrays


@pytest.fixture
def good(tmp_path):
    path = tmp_path / "good.bsr.safetensors"
    write(path, small_model())
    return path


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere/model\.bsr\.safetensors: no such file"):
        read(tmp_path / "nowhere" / "model.bsr.safetensors")


def test_what_the_safetensors_library_reads_is_the_same(good):
    theirs = safetensors.numpy.load_file(good)
    ours = model_arrays(read(good))
    assert theirs.keys() == ours.keys()
    for name, array in ours.items():
        assert array.dtype == theirs[name].dtype
        np.testing.assert_array_equal(array, theirs[name])


def test_a_file_the_safetensors_library_wrote_reads(good, tmp_path):
    header, _ = split(good.read_bytes())
    tensors = safetensors.numpy.load_file(good)
    metadata = safetensors.safe_open(good, "numpy").metadata()
    assert metadata.keys() == header["__metadata__"].keys()
    again = tmp_path / "again"
    safetensors.numpy.save_file(tensors, again, metadata=metadata)
    assert read(again) == small_model()


def test_arrays_are_read_only_views_of_the_file(good):
    model = read(good)
    for array in model_arrays(model).values():
        assert array.base is not None
        assert not array.flags.writeable
        assert array.flags.aligned
        assert array.flags.c_contiguous


def test_reading_copies_no_values(tmp_path):
    rng = np.random.default_rng(0)
    model = small_model()
    big = rng.standard_normal((4, 180)).astype(np.float32)
    model.vectors["head.bias"][:] = big[:, 0]
    path = tmp_path / "file"
    write(path, model)
    back = read(path)
    assert np.shares_memory(back.vectors["head.bias"], back.vectors["head.bias"].base)
    path.rename(tmp_path / "moved")
    write(path, small_model())  # a file in use can be replaced; the old one lives on
    np.testing.assert_array_equal(back.vectors["head.bias"], big[:, 0])


def test_only_memory_that_nobody_can_write_to_is_let_go(tmp_path):
    (tmp_path / "values").write_bytes(bytes(4 * mmap.PAGESIZE))
    private = np.memmap(tmp_path / "values", np.float32, "c", shape=(8, mmap.PAGESIZE // 8))
    private[:] = 1
    release(DenseWeight(private))
    assert (private == 1).all(), "what is not in the file was lost"


def test_every_truncation_is_an_error(good, tmp_path):
    raw = good.read_bytes()
    for length in [*range(0, 200), *range(200, len(raw), 61), len(raw) - 1]:
        with pytest.raises(FormatError):
            read(saved(tmp_path / "cut", raw[:length]))


def test_bytes_too_many_are_an_error(good, tmp_path):
    with pytest.raises(FormatError, match="bytes too many"):
        read(saved(tmp_path / "long", good.read_bytes() + b"\0"))


@pytest.mark.parametrize(
    "raw", [b"", b"hello", b"PK\3\4" + b"\0" * 99, b"\x80\x02}q\0." * 9, bytes(4096)]
)
def test_garbage_is_an_error(tmp_path, raw):
    with pytest.raises(FormatError, match=r"garbage: .*(safetensors|cut short)"):
        read(saved(tmp_path / "garbage", raw))


@pytest.mark.parametrize(
    ("tensor", "at", "value", "dtype", "rule"),
    [
        ("stem.weight", 5, np.nan, "f4", "values must be finite"),
        ("norm.scale", 0, np.inf, "f4", "values must be finite"),
        ("head.weight.indptr", 0, 1, "i4", "must rise from 0"),
        ("head.weight.indptr", 1, 2**31 - 1, "i4", "must rise from 0"),
        ("head.weight.indices", 3, -1, "i4", "must lie in 0 to 22"),
        ("head.weight.indices", 3, 2**31 - 1, "i4", "must lie in 0 to 22"),
        ("head.weight.indices", 3, 1, "i4", "must rise strictly"),
        ("body.weight.indices", 3, 0b00_01_10_11, "u1", "must not decrease"),
    ],
)
def test_wrong_numbers(good, tmp_path, tensor, at, value, dtype, rule):
    bad = saved(tmp_path / "bad", poke(good.read_bytes(), tensor, at, value, dtype))
    with pytest.raises(FormatError, match=rule) as error:
        read(bad)
    assert error.value.tensor == tensor
    assert str(error.value).startswith(f"{bad}: {tensor}: ")


def test_tensors_must_be_those_of_the_graph(good, tmp_path):
    header, buffer = split(good.read_bytes())
    extra = {"dtype": "U8", "shape": [0], "data_offsets": [len(buffer), len(buffer)]}
    with pytest.raises(FormatError, match="belongs to no node") as error:
        read(saved(tmp_path / "bad", join(header | {"more": extra}, buffer)))
    assert error.value.tensor == "more"
    renamed = {("stem.wEight" if k == "stem.weight" else k): v for k, v in header.items()}
    with pytest.raises(FormatError, match="tensor is missing") as error:
        read(saved(tmp_path / "bad", join(renamed, buffer)))
    assert error.value.tensor == "stem.weight"


def test_a_tiny_file_of_huge_claims_allocates_nothing(good, tmp_path):
    header, buffer = split(good.read_bytes())
    claims = []
    for shape in ([2**31 - 1] * 4, [2**20, 2**10], [2**30]):
        lie = {"dtype": "F32", "shape": shape, "data_offsets": [0, len(buffer)]}
        claims.append(header | {"stem.weight": lie})
    graph = header["__metadata__"]["graph"]
    nodes = [dict(node) for node in graph["nodes"]]
    nodes[4]["weight"] = {"layout": "bsr", "shape": [2**24, 180], "block": [2**24, 1]}
    claims.append(
        header | {"__metadata__": header["__metadata__"] | {"graph": graph | {"nodes": nodes}}}
    )
    for claim in claims:
        raw = saved(tmp_path / "liar", join(claim, buffer))
        tracemalloc.start()
        try:
            with pytest.raises(FormatError):
                read(raw)
            assert tracemalloc.get_traced_memory()[1] < 2**20
        finally:
            tracemalloc.stop()


def test_names_in_errors_fit_a_line(good, tmp_path):
    header, buffer = split(good.read_bytes())
    header["line\nbreak" + "x" * 5000] = header.pop("stem.weight") | {"dtype": "F16"}
    with pytest.raises(FormatError) as error:
        read(saved(tmp_path / "bad", join(header, buffer)))
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 1200


def test_errors_can_be_pickled():
    error = FormatError("rule", tensor="t", path="file", mend="mend it")
    assert str(error) == "file: t: rule (mend it)"
    assert isinstance(pickle.loads(pickle.dumps(error)), FormatError)
