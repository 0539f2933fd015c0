"""Devices: what they can do, and how tensors get there and back."""
