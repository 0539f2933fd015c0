"""Experiments that measure the reliability goals R1 to R25 of docs/reliability.md on servers that they start."""
