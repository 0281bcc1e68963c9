"""Our own operations: one folder each, the reference first, then the kernel. `_cpu` is the compiled module, which need not be
there.

This file stays a docstring: the folder is imported as `lensc.kernels`, never as `kernels`.
"""
