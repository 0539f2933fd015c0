"""Kernels of our own for bfloat16 on x86-64 CPUs, in C++: compiled once for a machine, kept in the user's cache.

Between its matrix products a small model is bound by memory: transformers' operations read and write the same states
ten times where once would do, and attention and feed-forward layers send states through memory that could stay in a
core's cache. These kernels do the same arithmetic in one reading each. The results of a token depend on its own
sequence alone, whatever stands beside it in a pass.
"""
