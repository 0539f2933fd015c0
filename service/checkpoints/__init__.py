"""Checkpoints: found, validated, merged and described; the ONNX bundle beside them."""
