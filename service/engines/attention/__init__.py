"""Attention over packed batches, their layout, and the prefix cache."""
