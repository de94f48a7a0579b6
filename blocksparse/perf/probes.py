"""The loops that reach this machine's ceilings: multiply-adds in registers, and reading.

They are LLVM vector code like the micro-kernels, compiled and kept by the same means, so that a
ceiling is one the micro-kernels could reach.
"""

from __future__ import annotations

from dataclasses import dataclass

from llvmlite import ir

from blocksparse.runtime.kernels.target import Target
from blocksparse.runtime.kernels.writer import F32, FLOAT_BYTES, I8, I32, Function

LOADS = 16
"""Vectors that the reading loop reads in one turn."""

_CHAINS = 8  # sums of the reading loop, so that none waits for the one before


@dataclass(frozen=True)
class Precision:
    """A multiply-add instruction.

    Attributes
    ----------
    name : str
        What is multiplied: ``f32``, ``bf16``, ``int8``.
    unit : str
        ``GFLOP/s`` or ``GOP/s``; an addition and a multiplication are two operations.
    instruction : str
        LLVM's intrinsic.
    sums, operands : ir.Type
        Elements of the vectors that are added to and multiplied.
    products : int
        Multiply-adds for one 32-bit lane.
    """

    name: str
    unit: str
    instruction: str
    sums: ir.Type
    operands: ir.Type
    products: int

    def operations(self, target: Target) -> int:
        """Operations in one turn of the loop."""
        return 2 * self.products * target.lanes * chains(target)


def chains(target: Target) -> int:
    """Return how many sums the multiply-add loop keeps: those of the largest register tile.

    At least 12, because some processors start two multiply-adds a cycle and finish after 5.
    """
    return max(12, target.rows * target.vectors)


def precisions(target: Target) -> list[Precision]:
    """Return the multiply-adds that the target has vector instructions for.

    float32 is always among them. Dot products of bf16 and int8 are there where the processor has
    them and LLVM's intrinsic takes types that can be written here.
    """
    lanes = target.lanes
    found = [Precision("f32", "GFLOP/s", f"llvm.fma.v{lanes}f32", F32, F32, 1)]
    features = set(target.features.split(","))
    x86 = target.triple.startswith("x86_64")
    # The x86 intrinsics have also been declared with vectors of int8 and bfloat; LLVM takes the
    # older declaration, of 32-bit lanes, in every version.
    if x86 and lanes == 16 and "+avx512bf16" in features:
        name = "llvm.x86.avx512bf16.dpbf16ps.512"
        found.append(Precision("bf16", "GFLOP/s", name, F32, I32, 2))
    if x86 and {16: "+avx512vnni", 8: "+avxvnni"}.get(lanes) in features:
        name = f"llvm.x86.avx512.vpdpbusd.{32 * lanes}"
        found.append(Precision("int8", "GOP/s", name, I32, I32, 4))
    if not x86 and "+dotprod" in features:
        name = "llvm.aarch64.neon.sdot.v4i32.v16i8"
        found.append(Precision("int8", "GOP/s", name, I32, I8, 4))
    return found


def write_multiply(precision: Precision, target: Target) -> tuple[str, str]:
    """Write a loop of multiply-adds that stays in registers.

    The function takes the address of two operand vectors, the address of the sums (read before the
    loop, written after it) and the number of turns; each turn adds once to every sum.

    Returns
    -------
    name, text : str
        The function and its LLVM module.
    """
    name = f"probe_multiply_{precision.name}"
    module, f = _function(name, ("operands", "sums", "count"), target)
    vector = ir.VectorType(precision.sums, target.lanes)
    size = FLOAT_BYTES * target.lanes
    width = size // (1 if precision.operands == I8 else FLOAT_BYTES)
    operands = ir.VectorType(precision.operands, width)
    a, b = (f.load(operands, f.step(f.arg["operands"], i * size)) for i in range(2))
    places = [f.step(f.arg["sums"], i * size) for i in range(chains(target))]

    def turn(sums: list[ir.Value]) -> list[ir.Value]:
        if precision.instruction.startswith("llvm.fma"):
            return [f.intrinsic(precision.instruction, [a, b, c]) for c in sums]
        return [f.intrinsic(precision.instruction, [c, a, b]) for c in sums]

    for place, value in zip(places, f.loop([f.load(vector, at) for at in places], turn),
                            strict=True):  # fmt: skip
        f.store(value, place)
    f.builder.ret_void()
    return name, str(module)


def write_read(target: Target) -> tuple[str, str]:
    """Write a loop that reads memory from start to end, again and again.

    The function takes the addresses of start and end, a whole number of `read_bytes` apart, and the
    number of turns; it writes one vector at the end, so that nothing it read can be left out.

    Returns
    -------
    name, text : str
        The function and its LLVM module.
    """
    name = "probe_read"
    module, f = _function(name, ("start", "end", "count"), target)
    b, vector = f.builder, ir.VectorType(I32, target.lanes)

    def turn(state: list[ir.Value]) -> list[ir.Value]:
        at, *seen = state
        for i in range(LOADS):
            value = f.load(vector, f.step(at, i * FLOAT_BYTES * target.lanes))
            seen[i % _CHAINS] = b.or_(seen[i % _CHAINS], value)
        following = f.step(at, read_bytes(target))
        again = b.icmp_unsigned("==", following, f.arg["end"])
        return [b.select(again, f.arg["start"], following), *seen]

    _, *seen = f.loop([f.arg["start"], *[ir.Constant(vector, None)] * _CHAINS], turn)
    total = seen[0]
    for value in seen[1:]:
        total = b.or_(total, value)
    f.store(total, f.arg["end"])
    b.ret_void()
    return name, str(module)


def read_bytes(target: Target) -> int:
    """Bytes that one turn of the reading loop reads."""
    return LOADS * FLOAT_BYTES * target.lanes


def _function(name: str, arguments: tuple[str, ...], target: Target) -> tuple[ir.Module, Function]:
    module = ir.Module(name=name)
    module.triple = target.triple
    return module, Function(module, name, arguments, target.lanes)
