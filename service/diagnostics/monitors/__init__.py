"""Monitors of the stream of scored items: length bias, style bias, out-of-distribution items and drift."""
