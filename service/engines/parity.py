"""The start-up probe: does a forward path give the outputs of the plain transformers forward?

Of a head with several outputs all are compared, each output by itself: they may have different scales.

What to probe and how far two numbers may differ is decided in pure functions; ``choose_path`` runs the model. The probe
compares arithmetic only; it does not check whether the checkpoint's rewards make sense.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import inf, isfinite, isnan
from statistics import median
from typing import Any

import torch

from service.engines.invariance import InvarianceProbe
from service.engines.model.classifier import Classifier
from service.engines.paths.base import ForwardPath, PathSpec
from service.engines.paths.packed import PackedForward
from service.engines.paths.padded import PaddedForward
from service.engines.rewiring import rewire
from service.errors import InvarianceError, ParityError, SettingsError
from service.records import TextProbe

logger = logging.getLogger(__name__)

CACHED_PASSES = 3
"""Passes over the probes where prefixes are cached: the first determines the shapes of keys and values, the second
fills the cache, the third reads it."""

LENGTHS = (1, 2, 9, 40, 130)
"""Tokens of the ordinary probes; a sliding window that is small enough adds one longer than it."""

SHARED_PREFIXES = ((3, 40), (4, 60), (4, 100), (5, -3))
"""Probes that share a prefix with an ordinary one: its index in ``LENGTHS``, and the slice end of the prefix."""

GATE_PREFIX = 12
"""Tokens of a probe before those that a gate reads; shorter than the prefixes that probes share."""

MAX_PROBE_TOKENS = 1280
"""No probe is longer, so that probing a large model on a CPU takes seconds."""

FP32_TOLERANCE = 1e-4
"""Largest difference in fp32, for rewards up to one in magnitude; in proportion above."""

NOISE_FACTOR = 4.0
"""The accepted difference between a path and plain transformers in half precision, as a multiple of the noise."""

NOISE_RUN_LENGTHS = (1, 2, 4)
"""Adjacent elements of an embedding that are perturbed in the same direction, in each perturbation that is tried. A
single perturbation may by chance hardly change the reward of a sequence that others change much: one of two tokens,
through the demo model, by 0.007, 0.063 and 0.049."""

MIN_SPEARMAN = 0.95
"""Rank correlation of probes before and after quantization below which the log warns."""


@dataclass(frozen=True, slots=True)
class Parity:
    """What the probe measured on the path that serves; rewards and differences in raw logits."""

    max_difference: float
    """Difference to plain transformers of the probe that is closest to its tolerance, or exceeds it most."""

    tolerance: float
    """The tolerance of that probe."""

    noise: float
    """How far a plain reward typically moves when each embedding moves by its last bit; 0 in fp32, not measured there.
    """

    conclusive: bool
    """Whether plain rewards differ enough from each other for a wrong path to be detected."""

    num_probes: int
    """Sequences that were compared."""

    @property
    def agrees(self) -> bool:
        """Whether every probe is within its tolerance; a reward that is not finite never is."""
        return isfinite(self.max_difference) and self.max_difference <= self.tolerance

    @property
    def relative_difference(self) -> float:
        """The difference as a fraction of the tolerance."""
        return self.max_difference / self.tolerance


@dataclass(frozen=True, slots=True)
class Reference:
    """The plain transformers forward on the probes; all fields are in their order."""

    probes: Sequence[tuple[int, ...]]
    """Token ids."""

    outputs: Sequence[Sequence[float]]
    """The plain outputs of each probe."""

    noise: Sequence[Sequence[float]]
    """How far each output moves when the embeddings move by their last bit; zeros in fp32."""

    tolerances: Sequence[Sequence[float]]
    """Largest difference to each output that rounding alone explains."""

    def with_texts(self, outputs: Sequence[Sequence[float]]) -> Reference:
        """Return the reference with other plain outputs of the last probes, which are texts."""
        return replace(self, outputs=[*self.outputs[: len(self.outputs) - len(outputs)], *outputs])

    def compare(self, outputs: Sequence[Sequence[float]]) -> Parity:
        """Compare a path's outputs of the probes with the plain ones; the least favourable output counts."""
        plain, found, noise, tolerances = (
            list(zip(*values, strict=True)) for values in (self.outputs, outputs, self.noise, self.tolerances)
        )
        compared = [_compare(*one) for one in zip(found, plain, noise, tolerances, strict=True)]
        worst = max(compared, key=lambda parity: parity.relative_difference)
        return replace(worst, conclusive=all(parity.conclusive for parity in compared))


def _compare(
    found: Sequence[float], plain: Sequence[float], noise: Sequence[float], tolerances: Sequence[float]
) -> Parity:
    """Compare one output of all probes."""
    gaps = differences(found, plain)
    gap, tolerance = max(zip(gaps, tolerances, strict=True), key=lambda pair: pair[0] / pair[1])
    return Parity(gap, tolerance, median(noise), median(tolerances) < max(plain) - min(plain), len(plain))


def probe_sequences(
    *, vocab_size: int, pad_token_id: int | None, eos_token_id: int | None, window: int | None, max_tokens: int
) -> list[tuple[int, ...]]:
    """Return token ids that cover what paths get wrong: lengths, the pooled position, windows and shared prefixes.

    Besides ordinary sequences: one that ends in EOS, in two EOS, in EOS and another token, in the pad token, and one of
    pads only. One is longer than ``window`` if that stays within ``MAX_PROBE_TOKENS``; none is longer than
    ``max_tokens``. Some share a prefix with others, some of those with each other, and one is a prefix of another.
    """
    special = {pad_token_id, eos_token_id}
    # Multiples of a large prime visit the whole vocabulary without a pattern, and are the same at every start.
    ordinary = [
        token for token in ((7919 * k + 11) % vocab_size for k in range(2 * MAX_PROBE_TOKENS)) if token not in special
    ]
    endings: list[tuple[int, ...]] = []
    if eos_token_id is not None:
        endings += [(eos_token_id,), (eos_token_id, eos_token_id), (eos_token_id, ordinary[5])]
    if pad_token_id is not None:
        endings += [(pad_token_id,)]
    lengths = [*LENGTHS, window + window // 4 + 2] if window is not None else list(LENGTHS)
    probes = [tuple(ordinary[length : 2 * length]) for length in lengths if length <= MAX_PROBE_TOKENS]
    prefixes = [(probes[index][:end], 20 * index + end) for index, end in SHARED_PREFIXES if index < len(probes)]
    probes += [(*prefix, *ordinary[start : start + 21]) for prefix, start in prefixes]
    probes += [(*ordinary[30 * turn : 30 * turn + 23], *ending) for turn, ending in enumerate(endings)]
    if pad_token_id is not None:
        probes.append((pad_token_id,) * 3)
    return [probe for probe in probes if len(probe) <= max_tokens]


def tolerances_of(dtype: torch.dtype, plain: Sequence[float], noise: Sequence[float]) -> list[float]:
    """Return for each probe the largest difference to its plain output that rounding alone explains; for one output.

    fp32: ``FP32_TOLERANCE``, in proportion to the largest reward above one. Half precision: ``NOISE_FACTOR`` times the
    noise of the plain forward on this probe, or on the median probe if that is more, since the path's rounding differs
    from the plain forward's only in where it occurs; at least one unit in the last place of the largest reward. Noise
    is taken per probe because some (very short ones) are far more sensitive than real texts and would loosen the rest.
    """
    magnitude = max(abs(reward) for reward in plain)
    if dtype == torch.float32:
        return [FP32_TOLERANCE * max(1.0, magnitude)] * len(plain)
    last_place, typical = torch.finfo(dtype).eps * magnitude, median(noise)
    return [max(NOISE_FACTOR * max(own, typical), last_place, torch.finfo(dtype).tiny) for own in noise]


def differences(rewards: Sequence[float], plain: Sequence[float]) -> list[float]:
    """Return the absolute difference of each reward to the plain one; infinity where either is NaN."""
    gaps = [abs(reward - reference) for reward, reference in zip(rewards, plain, strict=True)]
    return [inf if isnan(gap) else gap for gap in gaps]


def quantization_error(
    unquantized: Sequence[Sequence[float]], quantized: Sequence[Sequence[float]]
) -> dict[str, float | int]:
    """Return how far quantization moved the outputs of the probes: rank correlation and largest difference.

    Of several outputs the lowest correlation and the largest difference count.

    A large error is reported and logged, not refused: rewards of random probes lie close together, so their order says
    little about real texts.
    """
    from scipy.stats import spearmanr  # half a second, which a start without quantization does not wait for

    pairs = list(zip(zip(*unquantized, strict=True), zip(*quantized, strict=True), strict=True))
    spearman = min(float(spearmanr(before, after).statistic) for before, after in pairs)
    error: dict[str, float | int] = {
        "spearman": spearman,
        "max_difference": max(gap for before, after in pairs for gap in differences(after, before)),
        "num_probes": len(unquantized),
    }
    if not spearman >= MIN_SPEARMAN:
        logger.warning(
            "Quantization changes the order of probes: Spearman %.3f to the same model without; audit it on your texts",
            spearman,
        )
    return error


def probes_for(classifier: Classifier, max_tokens: int) -> list[tuple[int, ...]]:
    """Return the probes of a classifier, none longer than ``max_tokens``.

    Where its head has a gate, each probe has the tokens that the gate reads, within the prefix that probes share.
    """
    config, pattern = classifier.config, classifier.gate_pattern
    probes = probe_sequences(
        vocab_size=config.vocab_size,
        pad_token_id=classifier.pad_token_id,
        eos_token_id=_first(getattr(config, "eos_token_id", None)),
        window=_window(config),
        max_tokens=max_tokens - len(pattern),
    )
    return [(*probe[:GATE_PREFIX], *pattern, *probe[GATE_PREFIX:]) for probe in probes] if pattern else probes


def reference_of(
    classifier: Classifier, probes: Sequence[tuple[int, ...]], plain: Sequence[Sequence[float]] | None = None
) -> Reference:
    """Measure what a path is compared with: plain outputs of the probes, their noise and their tolerances.

    Args:
        classifier: left with the attention that transformers chose.
        probes: token ids.
        plain: plain outputs of the probes, where they are already computed.

    Raises:
        ParityError: plain transformers itself gives NaN or infinity.
    """
    plain = plain_outputs(classifier, probes) if plain is None else plain
    if not all(isfinite(value) for values in plain for value in values):
        raise ParityError(
            f"Plain transformers gives {classifier.architecture} no finite reward in {classifier.dtype}: "
            "choose another model.dtype"
        )
    noise = _noise_of(classifier, probes) if classifier.is_half_precision else [[0.0] * len(values) for values in plain]
    by_output = zip(zip(*plain, strict=True), zip(*noise, strict=True), strict=True)
    tolerances = [tolerances_of(classifier.dtype, *one) for one in by_output]
    return Reference(probes, plain, noise, list(zip(*tolerances, strict=True)))


def choose_path(
    classifier: Classifier,
    candidates: Sequence[PathSpec],
    reference: Reference,
    invariance: InvarianceProbe | None = None,
) -> tuple[ForwardPath, Parity]:
    """Return the first candidate that agrees with plain transformers on this classifier, and the evidence.

    Args:
        classifier: left with the attention and the modules of the path that is returned.
        candidates: fastest first. The path that is returned has an empty prefix cache.
        reference: reference of the classifier in its present state, quantized or not.
        invariance: a further check that a path must pass; None: there is none.

    Raises:
        InvarianceError: some agree, and none of these passes the further check.
        ParityError: none agrees.
    """
    refusals: list[str] = []
    is_variant = False
    for spec in candidates:
        try:
            path = open_path(classifier, spec)
            outputs_of_passes = probed_outputs(path, reference.probes)
            parity = max(map(reference.compare, outputs_of_passes), key=lambda found: found.relative_difference)
            if parity.agrees and invariance is not None:
                invariance.check(path)
        except InvarianceError as error:
            is_variant = True
            refusals.append(f"{spec.description} is not batch-invariant ({error})")
            continue
        except Exception as error:  # noqa: BLE001 - a model that raises here, for any reason, does not run on this path
            refusals.append(f"{spec.description} does not run ({type(error).__name__}: {error})")
            continue
        if parity.agrees:
            _log_choice(classifier, spec, parity, refusals)
            if is_variant:
                logger.warning("A faster path is not batch-invariant, so this one serves: %s", spec.description)
            return path, parity
        refusals.append(f"{spec.description} differs by {parity.max_difference:.3g}, more than {parity.tolerance:.3g}")
    logger.info("No forward path agrees on %s: %s", classifier.architecture, "; ".join(refusals))
    if is_variant:
        raise InvarianceError(
            f"{classifier.architecture} cannot be served with batching.batch_invariant: {'; '.join(refusals)}. Use "
            "batching.deterministic instead."
        )
    raise ParityError(
        f"{classifier.architecture} cannot be served, because its rewards in batches are not those of plain "
        f"transformers: {refusals[-1]}"
    )


def open_path(classifier: Classifier, spec: PathSpec) -> ForwardPath:
    """Return the forward path of a specification, after rewiring the classifier for it.

    Raises:
        PackingUnsupportedError: the architecture cannot run packed.
        SettingsError: the path cannot run compiled.
    """
    if spec.name == "packed":
        return PackedForward(classifier, spec)
    if spec.compiled:
        raise SettingsError("padded batches cannot be compiled: leave model.compile out")
    return PaddedForward(classifier, batch_invariant=spec.batch_invariant)


def probed_outputs(path: ForwardPath, probes: Sequence[tuple[int, ...]]) -> Iterator[Sequence[Sequence[float]]]:
    """Yield a path's outputs of the probes: once, or with a prefix cache from a cold and a warm cache.

    The first half of each probe is its prompt.
    """
    if not path.caches_prefixes:
        yield path.run(probes).at_pooled
        return
    for _ in range(CACHED_PASSES):
        yield path.run(probes, prompts=[len(probe) // 2 for probe in probes]).at_pooled
    path.clear_cache()


def _log_choice(classifier: Classifier, spec: PathSpec, parity: Parity, refusals: Sequence[str]) -> None:
    logger.info(
        "%s runs %s in %s: largest difference to plain transformers %.3g, limit %.3g, on %d probes%s",
        classifier.architecture,
        spec.description,
        classifier.dtype,
        parity.max_difference,
        parity.tolerance,
        parity.num_probes,
        "".join(f"; {refusal}" for refusal in refusals),
    )
    if not parity.conclusive:
        logger.warning(
            "The parity probe is inconclusive: rounding moves rewards as far as they differ from each other; "
            "with model.dtype float32 it is more sensitive"
        )


@torch.inference_mode()
def plain_outputs(classifier: Classifier, sequences: Sequence[Sequence[int]]) -> list[list[float]]:
    """Return the outputs of the plain transformers forward, one sequence at a time, with its default attention.

    The weights are the served ones, the head's in fp32. ``last`` pooling is not transformers' own, so there the state
    of the last token is read from the output of transformers' body.

    Args:
        classifier: left with the attention that transformers chose.
        sequences: rows.

    Raises:
        ParityError: transformers itself does not run the model.
    """
    return _plain_outputs(classifier, [classifier.inputs_of([row]) for row in sequences])


def plain_rewards(classifier: Classifier, sequences: Sequence[Sequence[int]]) -> list[float]:
    """Return the first output of each sequence; see ``plain_outputs``."""
    return [outputs[0] for outputs in plain_outputs(classifier, sequences)]


@torch.inference_mode()
def plain_outputs_of_texts(classifier: Classifier, texts: Sequence[TextProbe]) -> list[list[float]]:
    """Return the outputs of the plain transformers forward on what the tokenizer's own call gives for these texts."""
    read = inspect.signature(classifier.model.forward).parameters
    return _plain_outputs(
        classifier,
        [{name: classifier.token_tensor([ids]) for name, ids in text.inputs.items() if name in read} for text in texts],
    )


def _plain_outputs(classifier: Classifier, inputs: Sequence[dict[str, torch.Tensor]]) -> list[list[float]]:
    return [outputs[0] for outputs in _plain_batches(classifier, inputs)]


def _plain_batches(classifier: Classifier, inputs: Sequence[dict[str, torch.Tensor]]) -> list[list[list[float]]]:
    """Return the outputs of each batch; the rows of a batch are the same sequence."""
    rewire(classifier, classifier.plain_attention)
    try:
        return [_plain_batch(classifier, {"attention_mask": torch.ones_like(one["input_ids"])} | one) for one in inputs]
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # a model's code may raise anything
        raise ParityError(
            f"Plain transformers does not run {classifier.architecture} in {classifier.dtype} on token ids alone "
            f"({type(error).__name__}: {error}): choose another model.dtype, or correct its configuration"
        ) from error


def _plain_batch(classifier: Classifier, inputs: dict[str, torch.Tensor]) -> list[list[float]]:
    if classifier.pooling == "last" or classifier.gate_pattern:
        ids = inputs["input_ids"][0].tolist()
        states = classifier.body(**inputs).last_hidden_state
        gates = states[:, classifier.gate_position(ids)] if classifier.gate_pattern else None
        outputs = classifier.outputs_of(states[:, classifier.pooled_position(ids)], gates)
    else:
        outputs = classifier.model(**inputs).logits
    values: list[list[float]] = outputs.tolist()
    return values


@torch.inference_mode()
def _noise_of(classifier: Classifier, probes: Sequence[Sequence[int]]) -> list[list[float]]:
    """Return how far each plain output moves when embeddings move by their last bit: the most of some perturbations.

    A pass has a probe once as it is and once for each perturbation: rows of equal length, so nothing is padded.
    """
    copies = 1 + len(NOISE_RUN_LENGTHS)
    with _perturbed_embeddings(classifier):
        outputs = _plain_batches(classifier, [classifier.inputs_of([row] * copies) for row in probes])
    return [
        [max(gaps) for gaps in zip(*(differences(perturbed, plain) for perturbed in moved), strict=True)]
        for plain, *moved in outputs
    ]


@contextmanager
def _perturbed_embeddings(classifier: Classifier) -> Iterator[None]:
    """Move the embeddings of all rows but the first while the context is open, by one unit in their last place.

    Elements move up and down in turns; ``NOISE_RUN_LENGTHS`` has for each row how many adjacent ones move together.
    """

    def move(_module: torch.nn.Module, _inputs: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
        index = torch.arange(output.shape[-1], device=output.device)
        signs = torch.stack([torch.zeros_like(index), *(1 - 2 * (index // run % 2) for run in NOISE_RUN_LENGTHS)])
        return output * (1 + torch.finfo(output.dtype).eps * signs[:, None]).to(output.dtype)

    handle = classifier.model.get_input_embeddings().register_forward_hook(move)
    try:
        yield
    finally:
        handle.remove()


def _first(token_ids: int | Sequence[int] | None) -> int | None:
    return token_ids if token_ids is None or isinstance(token_ids, int) else token_ids[0]


def _window(config: Any) -> int | None:
    """Return the sliding window of a configuration, under the names that model families of transformers use."""
    window: int | None = getattr(config, "sliding_window", None) or getattr(config, "local_attention", None)
    return window
