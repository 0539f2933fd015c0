"""Linear layers: batch-invariant, int8 and fp8."""
