"""Compiled CPU kernels for x86-64, in C++: compiled once for a machine and stored in the user's cache.

Apart from its matrix products, a small model on a CPU is limited by memory bandwidth: transformers' operations read and
write the same states up to ten times, and the intermediate states of attention and feed-forward layers go through
memory instead of a core's cache. These kernels fuse the operations around each product. The result of a token depends
on its own sequence alone, not on the batch composition.
"""
