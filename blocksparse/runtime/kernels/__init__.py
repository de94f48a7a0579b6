"""The kernels: LLVM vector code for the products, plain Numba loops around it.

``target`` says what the processor offers, ``microkernels`` writes the vector code for it,
``program`` is the loops, one 2-D primitive each in a module of its own, and ``intrinsics`` lets
them call the vector code. ``compiler`` makes machine code of both, ``objects`` keeps it on disk and
``elf`` links it; a process that finds everything there does not import the compilers.
"""
