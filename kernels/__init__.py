"""Operations that need a kernel of our own: one folder per operation, reference first. Holds none yet.

This file stays a docstring: the folder is imported as `lensc.kernels`, never as `kernels`.
"""
