"""The linker, on objects that LLVM writes for the purpose."""

from __future__ import annotations

import ctypes
import logging
import struct
from pathlib import Path

import numpy as np
import pytest
from models import randoms

from blocksparse.runtime import load
from blocksparse.runtime.kernels import compiler, elf, objects
from blocksparse.runtime.kernels.target import host

GOLDEN = Path(__file__).parents[1] / "golden" / "v1.bsr.safetensors"

pytestmark = pytest.mark.skipif(not elf.SUPPORTED, reason="LLVM links here")

# A table of constants, a zeroed counter, a table of addresses, another function, one of libc and
# one of libm: every kind of section, symbol and relocation that the kernels have.
TEXT = """
@table = internal constant [4 x i64] [i64 11, i64 22, i64 33, i64 44], align 16
@calls = internal global i64 0
@started = internal global i64 1000
@spare = common global [3 x i64] zeroinitializer, align 64
@places = internal constant [1 x [3 x i64]*] [[3 x i64]* @spare]
@functions = internal constant [2 x i64 (i64)*] [i64 (i64)* @double, i64 (i64)* @llabs]
declare i64 @llabs(i64)
declare double @cbrt(double)

define internal i64 @double(i64 %x) noinline {
  %y = mul i64 %x, 2
  ret i64 %y
}

define i64 @entry(i64 %i) {
  %before = load volatile i64, i64* @calls
  %after = add i64 %before, 1
  store volatile i64 %after, i64* @calls
  %start = load volatile i64, i64* @started
  %low = and i64 %i, 3
  %at = getelementptr [4 x i64], [4 x i64]* @table, i64 0, i64 %low
  %value = load volatile i64, i64* %at
  %which = and i64 %i, 1
  %place = getelementptr [2 x i64 (i64)*], [2 x i64 (i64)*]* @functions, i64 0, i64 %which
  %function = load volatile i64 (i64)*, i64 (i64)** %place
  %negative = sub i64 0, %value
  %changed = call i64 %function(i64 %negative)
  %float = sitofp i64 27000000 to double
  %root = call double @cbrt(double %float)
  %rest = fptosi double %root to i64
  %first = getelementptr [1 x [3 x i64]*], [1 x [3 x i64]*]* @places, i64 0, i64 0
  %memory = load volatile [3 x i64]*, [3 x i64]** %first
  %spare = ptrtoint [3 x i64]* %memory to i64
  %odd = and i64 %spare, 63
  %a = add i64 %changed, %after
  %b = add i64 %a, %start
  %c = add i64 %b, %rest
  %d = add i64 %c, %odd
  ret i64 %d
}
"""


def expected(i, call):
    """What `entry` returns when it is called for the `call`-th time."""
    value = -[11, 22, 33, 44][i & 3]
    return (2 * value, abs(value))[i & 1] + call + 1000 + 300


@pytest.fixture(scope="module")
def code():
    return compiler.emit(TEXT, host(), "small")


def function(address):
    return ctypes.CFUNCTYPE(ctypes.c_int64, ctypes.c_int64)(address)


def test_every_kind_of_symbol(code):
    entry = function(elf.link(code, "entry"))
    assert [entry(i) for i in range(8)] == [expected(i, i + 1) for i in range(8)]


def test_two_links_share_nothing(code):
    first, second = (function(elf.link(code, "entry")) for _ in range(2))
    assert [first(0), first(0), second(0)] == [expected(0, 1), expected(0, 2), expected(0, 1)]


def test_code_cannot_be_written(code):
    address = elf.link(code, "entry")
    with open("/proc/self/maps") as maps:
        rows = [line.split() for line in maps]
    spans = {tuple(int(x, 16) for x in row[0].split("-")): row[1] for row in rows}
    (rights,) = (rights for (low, high), rights in spans.items() if low <= address < high)
    assert rights.startswith("r-x")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda code: b"", "not a relocatable ELF"),
        (lambda code: b"\0" * 200, "not a relocatable ELF"),
        (lambda code: code[:18] + struct.pack("<H", 183) + code[20:], "not a relocatable ELF"),
        (lambda code: code.replace(b"cbrt\0", b"cbrx\0"), "no symbol cbrx"),
    ],
    ids=["empty", "zeros", "aarch64", "unknown symbol"],
)
def test_what_it_does_not_know_it_refuses(code, change, reason):
    with pytest.raises(elf.UnlinkableError, match=reason):
        elf.link(change(code), "entry")


def test_a_function_that_is_not_there(code):
    with pytest.raises(elf.UnlinkableError, match="no function other"):
        elf.link(code, "other")
    with pytest.raises(elf.UnlinkableError, match="no function llabs"):
        elf.link(code, "llabs")


def test_relocations_of_another_kind_are_refused():
    exported = TEXT.replace("@started = internal global", "@started = global")
    with pytest.raises(elf.UnlinkableError, match="relocation of kind"):
        elf.link(compiler.emit(exported, host(), "small"), "entry")


@pytest.fixture
def refusing(monkeypatch, tmp_path):
    """A linker that refuses everything, and nothing kept from before."""

    def refuse(code, name):
        raise elf.UnlinkableError("told to")

    monkeypatch.setattr(elf, "link", refuse)
    monkeypatch.setattr(objects, "_addresses", {})
    monkeypatch.setenv("BLOCKSPARSE_CACHE", str(tmp_path))


def test_sections_of_another_kind_are_refused(code):
    """Such as an array of functions to be called at the start."""
    changed, (at,) = bytearray(code), struct.unpack_from("<Q", code, 40)
    number = next(i for i, s in enumerate(elf._sections(code)) if s.loaded)
    struct.pack_into("<I", changed, at + 64 * number + 4, 14)
    with pytest.raises(elf.UnlinkableError, match="section of type 14"):
        elf.link(bytes(changed), "entry")


def test_where_it_refuses_llvm_links(refusing, caplog):
    caplog.set_level(logging.INFO, "blocksparse")
    for compiled in (2, 0):  # the object for each linker; then both are kept
        caplog.clear()
        entry = function(objects.compile_text("entry", TEXT, host()))
        assert [entry(i) for i in range(4)] == [expected(i, i + 1) for i in range(4)]
        assert caplog.text.count("compiled entry") == compiled
        assert "entry is linked by LLVM: told to" in caplog.text


@pytest.mark.long
def test_a_network_linked_by_llvm(refusing):
    network = load(GOLDEN, engine="compiled", threads=2)
    images = randoms(2, *network.input_shape)
    wanted = load(GOLDEN, engine="reference")(images)
    np.testing.assert_allclose(network(images), wanted, rtol=1e-4, atol=1e-5)
