"""Diagnostics of an item beside its reward, and monitors of the stream of items."""
