"""The calibration artifact: statistics fitted to a model's own scores, in one safetensors file with a JSON header.

Reading and writing are both defined here, because the service defines the format; ``export`` fits the content. A
calibration is valid for one model under one set of settings: it is bound to them by hash and by value, and is not used
for others.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from service.diagnostics.calibration_facts import CalibrationFacts
from service.diagnostics.conformal import Scores, TailMap
from service.diagnostics.detectors import OneSidedTests, ShrunkGaussian
from service.diagnostics.lexicon import LEXICON_VERSION
from service.diagnostics.monitors.drift_reference import DriftReference
from service.diagnostics.monitors.reference import MonitorReference
from service.diagnostics.ngrams import NgramCounts
from service.diagnostics.ood import Component, Detectors, Ranking
from service.diagnostics.reference import LengthCurve, Reference
from service.diagnostics.resampled_heads import ResampledHeads
from service.diagnostics.states import LaplaceFactor, StateForm, StateReader
from service.diagnostics.trees import TreeEnsemble
from service.edits.probe import Probe
from service.errors import CalibrationError
from service.outputs import new_file
from service.records import Pooling, StateTap

FORMAT = "reward-calibration/2"

CHECKSUM = "sha256"
"""Name of the checksum in the header. It is no second entry of the metadata, whose order safetensors does not keep."""

Arrays = Mapping[str, NDArray[Any]]


@dataclass(frozen=True, slots=True)
class Binding:
    """The model and settings that a calibration is valid for; for any other its p-values are not calibrated."""

    weights: str
    """sha256, hexadecimal."""

    config: str
    """sha256, hexadecimal."""

    tokenizer: str
    """sha256, hexadecimal."""

    chat_template: str
    """sha256, hexadecimal."""

    template: str
    """Name of the text rule."""

    max_input_tokens: int
    pooling: Pooling
    vocab_size: int

    lexicon: str = LEXICON_VERSION
    """Version of the lexicon of style markers."""

    reward_weights: str = ""
    """Weights of several outputs that the settings gave, as JSON; empty where they gave none."""

    def differences(self, other: Binding) -> list[str]:
        """Return the names of the fields in which the two differ."""
        return [entry.name for entry in fields(self) if getattr(self, entry.name) != getattr(other, entry.name)]


@dataclass(frozen=True, slots=True)
class Calibration:
    """A calibration, ready for use."""

    binding: Binding

    arithmetic: dict[str, str]
    """Engine, dtype and forward path that its items were scored with; serving with others causes a warning."""

    facts: CalibrationFacts = field(repr=False)

    rewards: Reference
    """Distribution of the raw rewards."""

    lengths: Reference
    """Distribution of ln(1 + completion tokens)."""

    length_curve: LengthCurve
    ngrams: NgramCounts
    states: StateReader
    detectors: Detectors
    ranking: Ranking

    monitors: MonitorReference
    """Reference of the monitors."""

    drift: DriftReference | None = None
    """Means of the drift monitor's statistics; None: runs are compared with their own start only."""

    heads: ResampledHeads | None = None
    """None where the calibration was not made from preference pairs, or before there were such heads."""

    probe: Probe | None = None
    """What the reward pays for; None in a calibration that was made without it."""

    id: str = ""
    """``sha256:`` and the hash of the file; empty before it is written."""


def write_calibration(calibration: Calibration, path: Path) -> str:
    """Write the artifact atomically (by one rename) and return its id.

    Raises:
        OutputError: the file cannot be written, or the disk is full.
    """
    arrays, shapes = _pack(calibration)
    header = {
        "format": FORMAT,
        "binding": asdict(calibration.binding),
        "arithmetic": calibration.arithmetic,
        "facts": calibration.facts.as_json(),
        "shapes": shapes,
        "probe": None if calibration.probe is None else calibration.probe.as_json(),
    }
    contiguous = {name: np.ascontiguousarray(array) for name, array in sorted(arrays.items())}
    header[CHECKSUM] = _checksum(header, contiguous)
    with new_file(path) as unfinished:
        save_file(contiguous, unfinished, {"calibration": json.dumps(header, sort_keys=True)})
        unfinished.chmod(0o644)  # safetensors restricts it to its owner, but a replica may run as another user
    return _id_of(path)


def read_calibration(path: Path) -> Calibration:
    """Read an artifact; the caller must compare its binding with the served model.

    Raises:
        CalibrationError: it cannot be read, is of another format, or is damaged.
    """
    try:
        with safe_open(path, framework="numpy") as file:
            header = json.loads((file.metadata() or {}).get("calibration", "{}"))
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
    except (OSError, SafetensorError, ValueError, RecursionError) as error:
        raise CalibrationError(f"{path} cannot be read as a calibration ({type(error).__name__}).") from error
    found = header.get("format") if isinstance(header, dict) else None
    if found != FORMAT:
        raise CalibrationError(f"{path} is of format {found}; this service reads {FORMAT}.")
    # Calibrations that were made before there was a checksum have none.
    if CHECKSUM in header and header[CHECKSUM] != _checksum(header, arrays):
        raise CalibrationError(f"{path} is damaged: its content differs from what reward-calibrate wrote.")
    try:
        return _unpack(header, arrays, _id_of(path))
    except (LookupError, ValueError, TypeError, AttributeError, ArithmeticError) as error:
        raise CalibrationError(f"{path} is damaged: {type(error).__name__} {error}.") from error


def _checksum(header: Mapping[str, Any], arrays: Arrays) -> str:
    """Return the sha256, hexadecimal, of the header without it and of every array's name, dtype, shape and content."""
    summed = {name: value for name, value in header.items() if name != CHECKSUM}
    digest = hashlib.sha256(json.dumps(summed, sort_keys=True).encode())
    for name, array in sorted(arrays.items()):
        digest.update(f"{name} {array.dtype.str} {array.shape}".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()


def _id_of(path: Path) -> str:
    return f"sha256:{hashlib.sha256(path.read_bytes()).hexdigest()}"


# --- Arrays, and the scalars that belong to them ---------------------------------------------------------------------


def _pack(calibration: Calibration) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
    states, detectors, ranking = calibration.states, calibration.detectors, calibration.ranking
    arrays: dict[str, NDArray[Any]] = {
        "mu": np.stack([form.mean for form in states.forms]),
        "V": np.stack([form.axes for form in states.forms]),
        "lambda": np.stack([form.variances for form in states.forms]),
        "sigma2": np.array([form.residual for form in states.forms], np.float64),
        "ref_reward_q": calibration.rewards.quantiles,
        "ref_loglen_q": calibration.lengths.quantiles,
        "len_knots_x": calibration.length_curve.x,
        "len_knots_y": calibration.length_curve.y,
        "unigram_count": calibration.ngrams.unigrams,
        "bigram_slot": calibration.ngrams.slots,
        "bigram_count": calibration.ngrams.counts,
        **calibration.monitors.as_arrays(),
        **({} if calibration.heads is None else calibration.heads.as_arrays()),
        **{f"cal_scores_{name}": scores for name, scores in ranking.references.items()},
    }
    shapes: dict[str, Any] = {
        "taps": [asdict(tap) for tap in states.taps],
        "head_tap": states.head_tap,
        "mid_tap": detectors.mid_tap,
        "last_tap": detectors.last_tap,
        "rewards": [calibration.rewards.mean, calibration.rewards.sd],
        "lengths": [calibration.lengths.mean, calibration.lengths.sd],
        "length_curve_mean": calibration.length_curve.mean,
        "maps": {name: _pack_map(f"select_scores_{name}", map_, arrays) for name, map_ in ranking.maps.items()},
        "text_tests": [
            _pack_map(f"text_test_{index:02}", test, arrays) for index, test in enumerate(detectors.text_tests.maps)
        ],
    }
    if states.laplace is not None:
        arrays["laplace_chol"] = states.laplace.cholesky
        shapes["laplace_lambda"] = states.laplace.prior
    for name in ("feature", "style", "siblings"):
        gaussian = getattr(detectors, name)
        if gaussian is not None:
            _pack_gaussian(name, gaussian, arrays)
    if calibration.drift is not None:
        calibration.drift.pack(arrays, shapes)
    if detectors.trees is not None:
        _pack_trees(detectors.trees, arrays)
        shapes["tree_depth"] = detectors.trees.depth
    return arrays, shapes


def _unpack(header: Mapping[str, Any], arrays: Arrays, id_: str) -> Calibration:
    shapes = header["shapes"]
    states = _unpack_states(shapes, arrays)
    return Calibration(
        binding=Binding(**header["binding"]),
        arithmetic=header["arithmetic"],
        facts=CalibrationFacts.from_json(header["facts"]),
        rewards=_unpack_reference(shapes["rewards"], arrays["ref_reward_q"]),
        lengths=_unpack_reference(shapes["lengths"], arrays["ref_loglen_q"]),
        length_curve=LengthCurve(arrays["len_knots_x"], arrays["len_knots_y"], shapes["length_curve_mean"]),
        ngrams=NgramCounts(arrays["unigram_count"], arrays["bigram_slot"], arrays["bigram_count"]),
        states=states,
        detectors=_unpack_detectors(shapes, arrays),
        ranking=_unpack_ranking(shapes, arrays),
        monitors=MonitorReference.from_arrays(arrays),
        drift=DriftReference.unpack(arrays, shapes),
        heads=ResampledHeads.from_arrays(arrays, states.forms[states.head_tap].mean),
        probe=None if header.get("probe") is None else Probe.from_json(header["probe"]),
        id=id_,
    )


def _unpack_reference(scalars: Sequence[float], quantiles: Scores) -> Reference:
    mean, sd = scalars
    return Reference(mean, sd, quantiles)


def _unpack_states(shapes: Mapping[str, Any], arrays: Arrays) -> StateReader:
    forms = [
        StateForm(mean, axes, variances, float(residual))
        for mean, axes, variances, residual in zip(
            arrays["mu"], arrays["V"], arrays["lambda"], arrays["sigma2"], strict=True
        )
    ]
    laplace = None
    if "laplace_chol" in arrays:
        laplace = LaplaceFactor(forms[shapes["head_tap"]], arrays["laplace_chol"], shapes["laplace_lambda"])
    taps = tuple(StateTap(**tap) for tap in shapes["taps"])
    if len(taps) != len(forms):
        raise ValueError("taps and forms differ in number")
    return StateReader(taps, forms, laplace, shapes["head_tap"])


def _unpack_detectors(shapes: Mapping[str, Any], arrays: Arrays) -> Detectors:
    trees = None
    if "oe_feature" in arrays:
        trees = TreeEnsemble(
            arrays["oe_columns"],
            arrays["oe_feature"],
            arrays["oe_threshold"],
            arrays["oe_children"],
            arrays["oe_value"],
            shapes["tree_depth"],
        )
    return Detectors(
        text_tests=OneSidedTests(
            [
                _unpack_map(f"text_test_{index:02}", scalars, arrays)
                for index, scalars in enumerate(shapes["text_tests"])
            ]
        ),
        feature=_unpack_gaussian("feature", arrays),
        style=_unpack_gaussian("style", arrays),
        mid_tap=shapes["mid_tap"],
        last_tap=shapes["last_tap"],
        trees=trees,
        siblings=_unpack_gaussian("siblings", arrays) if "siblings_mean" in arrays else None,
    )


def _unpack_ranking(shapes: Mapping[str, Any], arrays: Arrays) -> Ranking:
    prefix = "cal_scores_"
    references: dict[str, Scores] = {
        name.removeprefix(prefix): array for name, array in arrays.items() if name.startswith(prefix)
    }
    maps = {
        cast("Component", name): _unpack_map(f"select_scores_{name}", scalars, arrays)
        for name, scalars in shapes["maps"].items()
    }
    return Ranking(maps, references)


def _pack_map(name: str, map_: TailMap, arrays: dict[str, NDArray[Any]]) -> dict[str, float]:
    arrays[name] = map_.reference
    return {entry.name: getattr(map_, entry.name) for entry in fields(map_) if entry.name != "reference"}


def _unpack_map(name: str, scalars: Mapping[str, Any], arrays: Arrays) -> TailMap:
    return TailMap(arrays[name], **scalars)


def _pack_gaussian(name: str, gaussian: ShrunkGaussian, arrays: dict[str, NDArray[Any]]) -> None:
    arrays[f"{name}_columns"], arrays[f"{name}_mean"] = gaussian.columns, gaussian.mean
    arrays[f"{name}_sd"], arrays[f"{name}_prec"] = gaussian.sd, gaussian.precision


def _unpack_gaussian(name: str, arrays: Arrays) -> ShrunkGaussian:
    return ShrunkGaussian(*(arrays[f"{name}_{part}"] for part in ("columns", "mean", "sd", "prec")))


def _pack_trees(trees: TreeEnsemble, arrays: dict[str, NDArray[Any]]) -> None:
    arrays["oe_columns"], arrays["oe_feature"], arrays["oe_threshold"] = trees.columns, trees.feature, trees.threshold
    arrays["oe_children"], arrays["oe_value"] = trees.children, trees.value
