"""Servers that run with the interpreter of a peer's environment; they import its packages and this folder alone."""
