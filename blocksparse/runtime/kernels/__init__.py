"""The kernels: LLVM vector code for the products, plain Numba loops around it.

``target`` says what the processor offers, ``microkernels`` writes the vector code for it,
``objects`` compiles and keeps it, ``intrinsics`` lets Numba call it, and the other modules are the
loops: one 2-D primitive each.
"""
