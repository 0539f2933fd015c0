"""Calibrations are fitted to completions that count as normal (``reward-calibrate``)."""
