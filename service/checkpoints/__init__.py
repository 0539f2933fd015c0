"""Checkpoint folders: locating, validating, merging and opening them; and the ONNX bundles exported from them."""
