"""Devices: their capabilities, and copies between them and the host."""
