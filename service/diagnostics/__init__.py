"""Diagnostics of items in addition to their rewards, and monitors of the stream of items."""
