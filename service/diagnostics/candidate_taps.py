"""The hidden states of a model from which a calibration chooses.

Taps cost memory and time in every forward pass that reads them, so only a few layers are offered; `reward-calibrate`
selects those that improve the detectors, and an ONNX export must include them before a calibration exists.
"""

from __future__ import annotations

from service.records import StateTap


def candidate_taps(num_layers: int) -> tuple[StateTap, ...]:
    """Return the candidate taps: the layers at 1/3, 1/2 and 2/3 of the depth and the last one, in both poolings.

    Args:
        num_layers: decoder layers of the model.

    Returns:
        Mean-pooled taps by layer, then last-token taps by layer. The last of them is the state that the head reads.
    """
    layers = sorted({max(1, round(num_layers * part)) for part in (1 / 3, 1 / 2, 2 / 3)} | {num_layers})
    return tuple(StateTap(layer, pooling) for pooling in ("mean", "last") for layer in layers)
