"""Link an object file into this process: as much of a linker as the kept code needs.

LLVM brings a linker of its own, but loading Numba and LLVM for it takes 100 MB of resident memory
and half a second, when all there is to do is to copy some kilobytes and fill in addresses. This one
knows relocatable ELF files for x86-64 as LLVM writes them, position-independent and of the small
code model ("System V Application Binary Interface, AMD64 Architecture Processor Supplement", 4.4).
What else it meets it refuses, and LLVM links instead.
"""

from __future__ import annotations

import ctypes
import mmap
import platform
import struct
import sys
from dataclasses import dataclass, replace

SUPPORTED = sys.platform == "linux" and platform.machine() == "x86_64"
"""Whether objects of this machine are of the kind known here."""

_BYTES, _SYMBOLS, _RELOCATIONS, _NOTE, _ZEROS, _UNWIND = 1, 2, 4, 7, 8, 0x70000001  # section types
_WRITE, _ALLOCATE = 1, 2  # flags of sections
_UNDEFINED, _COMMON = 0, 0xFFF2  # in place of a symbol's section
_ADDRESS, _NEAR, _CALL = 1, 2, 4  # relocations: an address, and 32-bit distances
_JUMP = struct.Struct("<2sQ3s3x")  # movabs $address, %r11; jmp *%r11

_process = ctypes.CDLL(None, use_errno=True) if SUPPORTED else None


class UnlinkableError(Exception):
    """An object that this linker does not know how to link; the message says what it met."""


@dataclass(frozen=True)
class _Section:
    kind: int
    flags: int
    offset: int
    size: int
    link: int
    info: int
    align: int

    @property
    def loaded(self) -> bool:
        # nothing unwinds through this code
        return bool(self.flags & _ALLOCATE) and self.kind != _UNWIND


@dataclass(frozen=True)
class _Symbol:
    name: str
    section: int
    value: int
    size: int


@dataclass(frozen=True)
class _Relocation:
    section: int  # what it applies to
    place: int
    kind: int
    symbol: int
    addend: int


def link(code: bytes, name: str) -> int:
    """Load an object file and return the address of one of its functions.

    Parameters
    ----------
    code : bytes
        The object.
    name : str
        The function.

    Returns
    -------
    int
        Its address, valid as long as the process lives.

    Raises
    ------
    UnlinkableError
        Where the object needs what is not known here, or names what this process does not have.
    OSError
        Where the system does not allow memory that can be executed.
    """
    sections = _sections(code)
    symbols = _symbols(code, sections)
    found = [i for i, s in enumerate(symbols) if s.name == name and s.section != _UNDEFINED]
    if not found:
        raise UnlinkableError(f"no function {name}")
    # memory for what no section holds, as one more section
    commons = [i for i, symbol in enumerate(symbols) if symbol.section == _COMMON]
    size = 0
    for i in commons:
        size += -size % symbols[i].value  # its alignment
        symbols[i] = replace(symbols[i], section=len(sections), value=size)
        size += symbols[i].size
    sections.append(_Section(_ZEROS, _ALLOCATE | _WRITE, 0, size, 0, 0, mmap.PAGESIZE))

    relocations = _relocations(code, sections)
    jumps = [
        r.symbol for r in relocations if r.kind == _CALL and symbols[r.symbol].section == _UNDEFINED
    ]
    places, jumps_at, read_only, size = _lay_out(sections, len(set(jumps)))
    memory = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    base = ctypes.addressof(ctypes.c_char.from_buffer(memory))
    for i, at in places.items():
        if sections[i].kind != _ZEROS:
            memory[at : at + sections[i].size] = code[sections[i].offset :][: sections[i].size]
    addresses = {
        i: _outside(symbol.name) if symbol.section == _UNDEFINED
        else base + places[symbol.section] + symbol.value
        for i, symbol in enumerate(symbols)
        if symbol.section in {_UNDEFINED, *places}
    }  # fmt: skip
    # libraries may be farther away than 32-bit distances reach
    for i, symbol in enumerate(dict.fromkeys(jumps)):
        at = jumps_at + i * _JUMP.size
        _JUMP.pack_into(memory, at, b"\x49\xbb", addresses[symbol], b"\x41\xff\xe3")
        addresses[symbol] = base + at
    for r in relocations:
        if r.symbol not in addresses:
            raise UnlinkableError(f"{symbols[r.symbol].name} lies in no section that is loaded")
        _apply(r, memory, base, base + places[r.section] + r.place, addresses[r.symbol])
    execute = mmap.PROT_READ | mmap.PROT_EXEC
    assert _process is not None
    if _process.mprotect(ctypes.c_void_p(base), ctypes.c_size_t(read_only), execute) != 0:
        raise OSError(ctypes.get_errno(), "memory cannot be made executable")
    # never unmapped: a daemon thread may still run the code while the interpreter ends
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(memory))
    return addresses[found[0]]


def _sections(code: bytes) -> list[_Section]:
    head = struct.unpack_from("<4sBB10xHH", code) if len(code) >= 64 else ()
    if head != (b"\x7fELF", 2, 1, 1, 62):  # 64 bits, little-endian, relocatable, x86-64
        raise UnlinkableError("not a relocatable ELF file for x86-64")
    (at,), (count,) = struct.unpack_from("<Q", code, 40), struct.unpack_from("<H", code, 60)
    found = [
        _Section(*struct.unpack_from("<4xIQ8xQQIIQ8x", code, at + 64 * i)) for i in range(count)
    ]
    for section in found:  # such as functions to be called at the start
        if section.loaded and section.kind not in (_BYTES, _NOTE, _ZEROS):
            raise UnlinkableError(f"section of type {section.kind}")
    return found


def _symbols(code: bytes, sections: list[_Section]) -> list[_Symbol]:
    found = []
    for table in sections:
        if table.kind == _SYMBOLS:  # there is one at most
            names = sections[table.link].offset
            for at in range(table.offset, table.offset + table.size, 24):
                name, section, value, size = struct.unpack_from("<I2xHQQ", code, at)
                end = code.index(b"\0", names + name)
                found.append(_Symbol(code[names + name : end].decode(), section, value, size))
    return found


def _relocations(code: bytes, sections: list[_Section]) -> list[_Relocation]:
    found = []
    for table in sections:
        if table.kind == _RELOCATIONS and sections[table.info].loaded:
            for at in range(table.offset, table.offset + table.size, 24):
                place, info, addend = struct.unpack_from("<QQq", code, at)
                kind, symbol = info & 0xFFFFFFFF, info >> 32
                found.append(_Relocation(table.info, place, kind, symbol, addend))
    return found


def _lay_out(sections: list[_Section], jumps: int) -> tuple[dict[int, int], int, int, int]:
    """Place sections, the writable ones on pages of their own behind the others and the jumps.

    Returns
    -------
    places : dict of int to int
        By number of the section.
    jumps_at, read_only, size : int
        Where the jumps lie, bytes before the first writable page, and all bytes.
    """
    places: dict[int, int] = {}
    size = jumps_at = read_only = 0
    for writable in (False, True):
        for i, section in enumerate(sections):
            if section.loaded and bool(section.flags & _WRITE) == writable:
                places[i] = size + -size % max(section.align, 1)
                size = places[i] + section.size
        if not writable:
            jumps_at = size + -size % _JUMP.size
            size = jumps_at + jumps * _JUMP.size
            read_only = size = size + -size % mmap.PAGESIZE
    return places, jumps_at, read_only, size


def _apply(relocation: _Relocation, memory: mmap.mmap, base: int, place: int, address: int) -> None:
    """Write at `place` what depends on the address of a symbol; both are addresses."""
    value = address + relocation.addend
    if relocation.kind == _ADDRESS:
        struct.pack_into("<Q", memory, place - base, value % 2**64)
        return
    if relocation.kind not in (_NEAR, _CALL):
        raise UnlinkableError(f"relocation of kind {relocation.kind}")
    if not -(2**31) <= value - place < 2**31:
        raise UnlinkableError("a symbol is farther away than 32-bit distances reach")
    struct.pack_into("<i", memory, place - base, value - place)


def _outside(name: str) -> int:
    """Address of a symbol of this process.

    Numba's arrays count references and free themselves. The loops only view memory that is not
    theirs, so that this never happens, and the call for it is bound to the end of the process.
    """
    if not name:  # the first symbol of every table
        return 0
    name = {"NRT_MemInfo_call_dtor": "abort"}.get(name, name)
    try:
        return ctypes.cast(getattr(_process, name), ctypes.c_void_p).value or 0
    except AttributeError:
        raise UnlinkableError(f"this process has no symbol {name}") from None
