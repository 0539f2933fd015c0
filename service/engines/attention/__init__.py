"""Attention over packed rows, the layout it works on, and the prefix cache."""
