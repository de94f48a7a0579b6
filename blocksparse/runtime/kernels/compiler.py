"""LLVM and Numba: the text of the kernels, machine code, and linking where ours cannot.

Only what has to be compiled comes here. A process that finds all its kernels on disk does not
import this module, which costs a quarter of a second and 60 MB.
"""

from __future__ import annotations

from collections.abc import Callable
from inspect import signature

import llvmlite.binding as llvm
from llvmlite import ir
from numba import types
from numba.core.registry import cpu_target

from .loop import loop
from .target import Target

_I32, _I64 = ir.IntType(32), ir.IntType(64)

_engines: list[llvm.ExecutionEngine] = []  # the code lives as long as its engine


def loop_text(function: Callable[..., None], name: str) -> str:
    """Compile a function with Numba as far as LLVM IR.

    Parameters
    ----------
    function : callable
        Takes int64 and returns nothing; what it calls may be decorated with `loop`.
    name : str
        The symbol it gets.

    Returns
    -------
    str
        An LLVM module, already optimised, in which a C function ``int32_t name(int64_t, ...)``
        stands. It returns 0, or another number where Numba would raise an exception.
    """
    count = len(signature(function).parameters)
    compiled = loop(function)
    compiled.compile((types.int64,) * count)
    (result,) = compiled.overloads.values()
    module = llvm.parse_assembly(compiled.inspect_llvm(compiled.signatures[0]))
    module.link_in(llvm.parse_assembly(_entry(result.fndesc.llvm_func_name, name, count)))
    return str(module)


def _entry(native: str, name: str, count: int) -> str:
    """Write a C function around one of Numba's, which also takes places for result and error."""
    module, pointer = ir.Module(name=name), ir.IntType(8).as_pointer()
    exception = ir.LiteralStructType([pointer, _I32, pointer, pointer, _I32]).as_pointer()
    places = [pointer.as_pointer(), exception.as_pointer()]
    called = ir.Function(module, ir.FunctionType(_I32, [*places, *[_I64] * count]), name=native)
    entry = ir.Function(module, ir.FunctionType(_I32, [_I64] * count), name=name)
    builder = ir.IRBuilder(entry.append_basic_block("entry"))
    taken = [builder.alloca(place.pointee) for place in places]
    builder.ret(builder.call(called, [*taken, *entry.args]))
    return str(module)


def _machine(target: Target, model: str) -> llvm.TargetMachine:
    llvm.initialize_native_target()
    llvm.initialize_native_asmprinter()
    return llvm.Target.from_triple(target.triple).create_target_machine(
        cpu=target.cpu,
        features=target.features,
        opt=3,
        reloc="pic",
        codemodel=model,
        jit=True,
    )


def emit(text: str, target: Target, model: str) -> bytes:
    """Compile an LLVM module to an object file, at full optimisation.

    Parameters
    ----------
    text : str
        The module, as LLVM IR.
    target : Target
        The host, as code generation knows it.
    model : {"small", "jitdefault"}
        What distances the code reaches: `elf` links the one, LLVM the other.
    """
    module = llvm.parse_assembly(text)
    module.verify()
    return bytes(_machine(target, model).emit_object(module))


def link(code: bytes, name: str, target: Target) -> int:
    """Load an object file of the default model by LLVM; return the address of a function of it."""
    assert cpu_target.target_context  # made when asked for: it lends LLVM's linker Numba's symbols
    # nothing is compiled here: of LLVM itself, 30 MB of code, little has to be in memory
    engine = llvm.create_mcjit_compiler(llvm.parse_assembly(""), _machine(target, "jitdefault"))
    engine.add_object_file(llvm.ObjectFileRef.from_data(code))
    engine.finalize_object()
    _engines.append(engine)
    return int(engine.get_function_address(name))
