"""What Numba's loops need and cannot say: call an address, and synchronise through memory."""

from __future__ import annotations

import os
import platform
import time
from typing import Any

from llvmlite import ir
from numba import carray, types
from numba.extending import intrinsic

from .loop import loop

_I32 = ir.IntType(32)
_I64 = ir.IntType(64)


@intrinsic
def _integers(typing_context: Any, address: Any) -> Any:
    signature = types.CPointer(types.int64)(types.int64)
    return signature, _as_pointer


@intrinsic
def _floats(typing_context: Any, address: Any) -> Any:
    signature = types.CPointer(types.float32)(types.int64)
    return signature, _as_pointer


def _as_pointer(context: Any, builder: Any, signature: Any, values: Any) -> Any:
    return builder.inttoptr(values[0], context.get_value_type(signature.return_type))


@loop
def integers_at(address: int, count: int) -> Any:
    """View the memory at an address as `count` values of int64."""
    return carray(_integers(address), (count,))


@loop
def floats_at(address: int, count: int) -> Any:
    """View the memory at an address as `count` values of float32."""
    return carray(_floats(address), (count,))


@intrinsic
def call(typing_context: Any, address: Any, arguments: Any) -> Any:
    """``call(address, (a, b, ...))``: call a function of 64-bit integers that returns nothing."""

    def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        _call_at(builder, signature, values, ir.VoidType())
        return context.get_dummy_value()

    return types.void(address, arguments), codegen


@intrinsic
def status_of(typing_context: Any, address: Any, arguments: Any) -> Any:
    """``status_of(address, (a, b, ...))``: call what `loop_text` compiled; return its result."""

    def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        return _call_at(builder, signature, values, _I32)

    return types.int32(address, arguments), codegen


def _call_at(builder: Any, signature: Any, values: Any, returned: ir.Type) -> Any:
    address, packed = values
    count = len(signature.args[1])
    kind = ir.FunctionType(returned, [_I64] * count)
    function = builder.inttoptr(address, kind.as_pointer())
    return builder.call(function, [builder.extract_value(packed, i) for i in range(count)])


@intrinsic
def fetch_add(typing_context: Any, address: Any, amount: Any) -> Any:
    """Add to the 64-bit integer at ``address`` atomically; return what it was."""
    signature = types.int64(address, amount)

    def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        pointer = builder.inttoptr(values[0], _I64.as_pointer())
        return builder.atomic_rmw("add", pointer, values[1], "acq_rel")

    return signature, codegen


@intrinsic
def compare_exchange(typing_context: Any, address: Any, old: Any, new: Any) -> Any:
    """Write `new` to the 64-bit integer at ``address`` if it is `old`; return whether it was."""
    signature = types.boolean(address, types.int64, types.int64)

    def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        pointer = builder.inttoptr(values[0], _I64.as_pointer())
        result = builder.cmpxchg(pointer, values[1], values[2], "acq_rel", "acquire")
        return builder.extract_value(result, 1)

    return signature, codegen


@intrinsic
def store(typing_context: Any, address: Any, value: Any) -> Any:
    """Write the 64-bit integer at ``address``."""
    signature = types.void(address, types.int64)

    def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        pointer = builder.inttoptr(values[0], _I64.as_pointer())
        builder.store_atomic(values[1], pointer, "monotonic", 8)
        return context.get_dummy_value()

    return signature, codegen


@intrinsic
def load_acquire(typing_context: Any, address: Any) -> Any:
    """Read the 64-bit integer at ``address``, ordered before everything that follows."""
    signature = types.int64(address)

    def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        pointer = builder.inttoptr(values[0], _I64.as_pointer())
        return builder.load_atomic(pointer, "acquire", 8)

    return signature, codegen


@intrinsic
def pause(typing_context: Any) -> Any:
    """Tell the processor that this is a waiting loop, where there is an instruction for it."""
    signature = types.void()

    def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        machine = platform.machine().lower()
        if machine in ("x86_64", "amd64"):
            kind = ir.FunctionType(ir.VoidType(), [])
            builder.call(_declare(builder.module, "llvm.x86.sse2.pause", kind), [])
        elif machine in ("aarch64", "arm64"):
            kind = ir.FunctionType(ir.VoidType(), [_I32])
            builder.call(_declare(builder.module, "llvm.aarch64.hint", kind), [_I32(1)])  # YIELD
        return context.get_dummy_value()

    return signature, codegen


@intrinsic
def give_way(typing_context: Any) -> Any:
    """Let the operating system run another thread on this core, where it has a call for that."""
    signature = types.void()

    def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        if os.name == "posix":
            builder.call(_declare(builder.module, "sched_yield", ir.FunctionType(_I32, [])), [])
        return context.get_dummy_value()

    return signature, codegen


@intrinsic
def now(typing_context: Any) -> Any:
    """Return nanoseconds of the monotonic clock, 0 where the system has no POSIX clock."""
    signature = types.int64()

    def codegen(context: Any, builder: Any, signature: Any, values: Any) -> Any:
        if os.name != "posix":
            return _I64(0)
        spec = ir.ArrayType(_I64, 2)  # struct timespec of 64-bit systems: seconds, nanoseconds
        with builder.goto_entry_block():
            at = builder.alloca(spec)
        kind = ir.FunctionType(_I32, [_I32, spec.as_pointer()])
        clock = _declare(builder.module, "clock_gettime", kind)
        builder.call(clock, [_I32(time.CLOCK_MONOTONIC), at])
        value = builder.load(at)
        seconds, rest = builder.extract_value(value, 0), builder.extract_value(value, 1)
        return builder.add(builder.mul(seconds, _I64(10**9)), rest)

    return signature, codegen


def _declare(module: Any, name: str, kind: ir.FunctionType) -> Any:
    return module.globals.get(name) or ir.Function(module, kind, name=name)
