"""The calibration artifact: what was fitted to a model's own scores, in one safetensors file with a JSON header.

The reader owns the format, so writing stands here too; what is written is decided in ``export``. A calibration speaks
for one model under one set of settings: it is bound to them by hash and by value, and is not used for any other.
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
from reward_client.options import TemplateChoice
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from service.diagnostics.conformal import Scores, TailMap
from service.diagnostics.detectors import ShrunkGaussian, TestBank, TreeEnsemble
from service.diagnostics.lexicon import LEXICON_VERSION
from service.diagnostics.monitors.reference import MonitorReference
from service.diagnostics.ngrams import NgramCounts
from service.diagnostics.ood import Component, Detectors, Ranking
from service.diagnostics.reference import LengthCurve, Reference
from service.diagnostics.states import LaplaceFactor, StateForm, StateReader
from service.errors import CalibrationError
from service.records import Pooling, StateTap

FORMAT = "reward-calibration/1"

Arrays = Mapping[str, NDArray[Any]]


@dataclass(frozen=True, slots=True)
class Binding:
    """What a calibration speaks for; anything else, and its p-values would mean nothing.

    ``weights``, ``config``, ``tokenizer``, ``chat_template``: sha256, hexadecimal. ``template``: how a plain prompt is
    rendered. ``lexicon``: version of the tells.
    """

    weights: str
    config: str
    tokenizer: str
    chat_template: str
    template: TemplateChoice
    max_input_tokens: int
    pooling: Pooling
    vocab_size: int
    lexicon: str = LEXICON_VERSION

    def differences(self, other: Binding) -> list[str]:
        """Return the names of the facts in which the two differ."""
        return [fact.name for fact in fields(self) if getattr(self, fact.name) != getattr(other, fact.name)]


@dataclass(frozen=True, slots=True)
class Calibration:
    """A calibration, ready for use.

    ``id``: ``sha256:`` and the hash of the file; empty before it is written. ``arithmetic``: engine, dtype and forward
    path that it was scored with; another one is worth a warning. ``facts``: how it was made and what was measured,
    JSON-ready.
    """

    binding: Binding
    arithmetic: dict[str, str]
    facts: dict[str, Any] = field(repr=False)
    rewards: Reference
    lengths: Reference
    length_curve: LengthCurve
    ngrams: NgramCounts
    states: StateReader
    detectors: Detectors
    ranking: Ranking
    monitors: MonitorReference
    id: str = ""


def write_calibration(calibration: Calibration, path: Path) -> str:
    """Write the artifact in one rename and return its id.

    Raises:
        OSError: the file cannot be written.
    """
    arrays, shapes = _pack(calibration)
    header = {
        "format": FORMAT,
        "binding": asdict(calibration.binding),
        "arithmetic": calibration.arithmetic,
        "facts": calibration.facts,
        "shapes": shapes,
    }
    unfinished = path.with_name(f".{path.name}.unfinished")
    contiguous = {name: np.ascontiguousarray(array) for name, array in sorted(arrays.items())}
    save_file(contiguous, unfinished, {"calibration": json.dumps(header, sort_keys=True)})
    unfinished.chmod(0o644)  # safetensors leaves it to its owner alone, but a replica may run as somebody else
    unfinished.replace(path)
    return _id_of(path)


def read_calibration(path: Path) -> Calibration:
    """Read an artifact; whether it suits the served model is the caller's to check, by its binding.

    Raises:
        CalibrationError: it cannot be read, or is of another format.
    """
    try:
        with safe_open(path, framework="numpy") as file:
            header = json.loads((file.metadata() or {}).get("calibration", "{}"))
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
    except (OSError, SafetensorError, ValueError) as error:
        raise CalibrationError(f"{path} cannot be read as a calibration ({type(error).__name__}).") from error
    if header.get("format") != FORMAT:
        raise CalibrationError(f"{path} is of format {header.get('format')}; this service reads {FORMAT}.")
    try:
        return _unpack(header, arrays, _id_of(path))
    except (KeyError, ValueError, TypeError) as error:
        raise CalibrationError(f"{path} is damaged: {type(error).__name__} {error}.") from error


def _id_of(path: Path) -> str:
    return f"sha256:{hashlib.sha256(path.read_bytes()).hexdigest()}"


# --- Arrays and the few numbers that go with them --------------------------------------------------------------------


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
        "maps": {name: _pack_map(f"combine_scores_{name}", map_, arrays) for name, map_ in ranking.maps.items()},
        "bank": [_pack_map(f"bank_{place:02}", test, arrays) for place, test in enumerate(detectors.bank.maps)],
    }
    if states.laplace is not None:
        arrays["laplace_chol"] = states.laplace.cholesky
        shapes["laplace_lambda"] = states.laplace.prior
    for name in ("feature", "style", "siblings"):
        gaussian = getattr(detectors, name)
        if gaussian is not None:
            _pack_gaussian(name, gaussian, arrays)
    if detectors.trees is not None:
        _pack_trees(detectors.trees, arrays)
        shapes["tree_depth"] = detectors.trees.depth
    return arrays, shapes


def _unpack(header: Mapping[str, Any], arrays: Arrays, id_: str) -> Calibration:
    shapes = header["shapes"]
    return Calibration(
        binding=Binding(**header["binding"]),
        arithmetic=header["arithmetic"],
        facts=header["facts"],
        rewards=_unpack_reference(shapes["rewards"], arrays["ref_reward_q"]),
        lengths=_unpack_reference(shapes["lengths"], arrays["ref_loglen_q"]),
        length_curve=LengthCurve(arrays["len_knots_x"], arrays["len_knots_y"], shapes["length_curve_mean"]),
        ngrams=NgramCounts(arrays["unigram_count"], arrays["bigram_slot"], arrays["bigram_count"]),
        states=_unpack_states(shapes, arrays),
        detectors=_unpack_detectors(shapes, arrays),
        ranking=_unpack_ranking(shapes, arrays),
        monitors=MonitorReference.from_arrays(arrays),
        id=id_,
    )


def _unpack_reference(facts: Sequence[float], quantiles: Scores) -> Reference:
    mean, sd = facts
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
        bank=TestBank([_unpack_map(f"bank_{place:02}", facts, arrays) for place, facts in enumerate(shapes["bank"])]),
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
        cast("Component", name): _unpack_map(f"combine_scores_{name}", facts, arrays)
        for name, facts in shapes["maps"].items()
    }
    return Ranking(maps, references)


def _pack_map(name: str, map_: TailMap, arrays: dict[str, NDArray[Any]]) -> dict[str, float]:
    arrays[name] = map_.reference
    facts = {"num_reference": map_.num_reference, "num_tail": map_.num_tail, "threshold": map_.threshold}
    return facts | {"scale": map_.scale, "max_excess": map_.max_excess}


def _unpack_map(name: str, facts: Mapping[str, Any], arrays: Arrays) -> TailMap:
    return TailMap(arrays[name], **facts)


def _pack_gaussian(name: str, gaussian: ShrunkGaussian, arrays: dict[str, NDArray[Any]]) -> None:
    arrays[f"{name}_columns"], arrays[f"{name}_mean"] = gaussian.columns, gaussian.mean
    arrays[f"{name}_sd"], arrays[f"{name}_prec"] = gaussian.sd, gaussian.precision


def _unpack_gaussian(name: str, arrays: Arrays) -> ShrunkGaussian:
    return ShrunkGaussian(*(arrays[f"{name}_{part}"] for part in ("columns", "mean", "sd", "prec")))


def _pack_trees(trees: TreeEnsemble, arrays: dict[str, NDArray[Any]]) -> None:
    arrays["oe_columns"], arrays["oe_feature"], arrays["oe_threshold"] = trees.columns, trees.feature, trees.threshold
    arrays["oe_children"], arrays["oe_value"] = trees.children, trees.value
