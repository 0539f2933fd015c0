"""Checkpoints become ONNX bundles (``reward-export``)."""
