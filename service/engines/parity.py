"""The start-up probe: does a forward path of ours give the rewards of the plain transformers forward?

What to probe and how far two numbers may differ is decided in pure functions; ``choose_path`` runs the model. It looks
at arithmetic only, not at whether the checkpoint's rewards make sense.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from math import inf, isfinite, isnan
from statistics import median
from typing import Any, Literal, TypeAlias

import torch
from scipy.stats import spearmanr

from service.engines.kernels.bindings import Kernels
from service.engines.model.classifier import Classifier
from service.engines.paths.base import ForwardPath
from service.engines.paths.packed import PackedForward
from service.engines.paths.padded import PaddedForward
from service.engines.rewiring import rewire
from service.errors import ParityError

logger = logging.getLogger(__name__)

PathChoice: TypeAlias = Literal["auto", "packed", "padded"]

SHARING = "packed with shared prefixes"

KEEPING = "packed with shared and kept prefixes"

ON_KERNELS = " on kernels"

KEPT_PASSES = 3
"""Passes over the probes where prompts are kept: the first shows what states look like, the second keeps, the third
uses what is kept."""

LENGTHS = (1, 2, 9, 40, 130)
"""Tokens of the ordinary probes; a window that is small enough adds one beyond it."""

OFFSHOOTS = ((3, 40), (4, 60), (4, 100), (5, -3))
"""Probes that begin as an ordinary one does: its place among ``LENGTHS``, and how much of it they have in common."""

LONGEST_PROBE = 1280
"""No probe is longer, so that the probe of a large model on a CPU takes seconds."""

FP32_TOLERANCE = 1e-4
"""Largest difference in fp32, for rewards up to one in magnitude; in proportion above."""

NOISE_FACTOR = 4.0
"""How many times the noise of half precision a path may differ from plain transformers."""

NOISE_RUNS = (1, 2, 4)
"""Neighbouring numbers of an embedding that move the same way, in each of the ways in which noise is tried. One way
alone may happen to hardly move a row that others move far: one of two tokens, through the demo model, by 0.007, 0.063
and 0.049."""


LEAST_SPEARMAN = 0.95
"""Rank correlation of probes before and after quantization below which the log warns."""


@dataclass(frozen=True, slots=True)
class Parity:
    """What the probe found about the path that serves; rewards and differences in raw logits.

    ``max_difference`` and ``tolerance`` are those of the probe that came nearest to its tolerance, or went beyond.
    ``noise``: how far a plain reward typically moves when each embedding moves by its last bit; 0 in fp32, where it is
    not measured. ``conclusive``: whether plain rewards differ enough from each other for a wrong path to show.
    ``quantization_loss``: as of ``EngineInfo``.
    """

    max_difference: float
    tolerance: float
    noise: float
    conclusive: bool
    num_probes: int
    quantization_loss: Mapping[str, float | int] = field(default_factory=dict)

    @property
    def agrees(self) -> bool:
        """Whether every probe is within its tolerance; a reward that is not finite never is."""
        return isfinite(self.max_difference) and self.max_difference <= self.tolerance


def probe_rows(
    *, vocab_size: int, pad_token_id: int | None, eos_token_id: int | None, window: int | None, max_tokens: int
) -> list[tuple[int, ...]]:
    """Return token ids that try what paths get wrong: lengths, the pooled position, and a sliding window.

    Besides ordinary rows: one that ends in EOS, in two EOS, in EOS and another token, in the pad token, and one of pads
    only. A row beyond ``window`` is there when it is no longer than ``LONGEST_PROBE``; none is beyond ``max_tokens``.
    Some begin as others do, some of those as each other, and one is the whole beginning of another.
    """
    special = {pad_token_id, eos_token_id}
    # Multiples of a large prime visit the whole vocabulary without a pattern, and are the same at every start.
    ordinary = [
        token for token in ((7919 * k + 11) % vocab_size for k in range(2 * LONGEST_PROBE)) if token not in special
    ]
    endings: list[tuple[int, ...]] = []
    if eos_token_id is not None:
        endings += [(eos_token_id,), (eos_token_id, eos_token_id), (eos_token_id, ordinary[5])]
    if pad_token_id is not None:
        endings += [(pad_token_id,)]
    lengths = [*LENGTHS, window + window // 4 + 2] if window is not None else list(LENGTHS)
    rows = [tuple(ordinary[length : 2 * length]) for length in lengths if length <= LONGEST_PROBE]
    stems = [(rows[place][:kept], 20 * place + kept) for place, kept in OFFSHOOTS if place < len(rows)]
    rows += [(*stem, *ordinary[start : start + 21]) for stem, start in stems]
    rows += [(*ordinary[30 * turn : 30 * turn + 23], *ending) for turn, ending in enumerate(endings)]
    if pad_token_id is not None:
        rows.append((pad_token_id,) * 3)
    return [row for row in rows if len(row) <= max_tokens]


def tolerances(dtype: torch.dtype, plain: Sequence[float], noise: Sequence[float]) -> list[float]:
    """Return for each probe the largest difference to its plain reward that rounding alone explains.

    fp32: ``FP32_TOLERANCE``, in proportion to the largest reward above one. Half precision: ``NOISE_FACTOR`` times the
    noise that the plain forward itself has on this probe, or on the median one if that is more, since its rounding
    differs from ours only in where it falls; at least one unit in the last place of the largest reward. Noise goes by
    the probe because some (very short ones) are far more sensitive than real texts and would blunt the rest.
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


def compare(
    rewards: Sequence[float], plain: Sequence[float], noise: Sequence[float], limits: Sequence[float]
) -> Parity:
    """Judge a path's rewards of the probes; all arguments are in the order of the probes."""
    gaps = differences(rewards, plain)
    gap, limit = max(zip(gaps, limits, strict=True), key=lambda found: found[0] / found[1])
    conclusive = median(limits) < max(plain) - min(plain)
    return Parity(gap, limit, median(noise), conclusive, len(plain))


def loss_between(unchanged: Sequence[float], quantized: Sequence[float]) -> dict[str, float | int]:
    """Return how far quantization moved the rewards of the probes: ranks first, since differences may be large.

    It is shown and warned of, not refused: random probes lie close together and say little about texts.
    """
    spearman = float(spearmanr(unchanged, quantized).statistic)
    loss: dict[str, float | int] = {
        "spearman": spearman,
        "max_difference": max(differences(quantized, unchanged)),
        "num_probes": len(unchanged),
    }
    if not spearman >= LEAST_SPEARMAN:
        logger.warning(
            "Quantization changes the order of probes: Spearman %.3f to the same model without; audit it on your texts",
            spearman,
        )
    return loss


def paths_to_try(
    choice: PathChoice, *, share_prefixes: bool, keep_prefixes: bool = False, kernels: bool = False
) -> list[str]:
    """Return the names of the paths that a choice allows, fastest first."""
    packed = [*[KEEPING] * keep_prefixes, *[SHARING] * share_prefixes, "packed"]
    if kernels:
        packed = [*(f"{name}{ON_KERNELS}" for name in packed), *packed]
    return {"auto": [*packed, "padded"], "packed": packed, "padded": ["padded"]}[choice]


def _open_path(
    name: str, classifier: Classifier, *, compiled: bool, kernels: Kernels | None, cache_bytes: int, cascade: bool
) -> ForwardPath:
    plain_name = name.removesuffix(ON_KERNELS)
    if name == "padded":
        return PaddedForward(classifier)
    return PackedForward(
        classifier,
        share_prefixes=plain_name in (KEEPING, SHARING),
        compiled=compiled,
        kernels=kernels if name != plain_name else None,
        cache_bytes=cache_bytes if plain_name == KEEPING else 0,
        cascade=cascade and plain_name != "packed",
    )


def choose_path(
    classifier: Classifier,
    choice: PathChoice,
    max_tokens: int,
    *,
    share_prefixes: bool = True,
    compiled: bool = False,
    kernels: Kernels | None = None,
    cache_bytes: int = 0,
    cascade: bool = False,
    quantize: Callable[[], object] | None = None,
) -> tuple[ForwardPath, Parity]:
    """Return the fastest path that agrees with plain transformers on this classifier, ready to run, and the evidence.

    Args:
        classifier: left with the attention of the path that is returned.
        choice: ``auto``, or the one path to try.
        max_tokens: longest row that may share a pass with any other.
        share_prefixes: whether a packed path may compute common beginnings once.
        compiled: whether only paths with compiled blocks will do.
        kernels: that packed paths may run on; they are tried before those without.
        cache_bytes: what prompts kept between passes may take; 0: none are kept. The path that is returned has kept
            none yet.
        cascade: whether attention to shared beginnings is merged with that to own tokens.
        quantize: changes the classifier's weights in place. A path is then held against the plain forward of the
            changed model, whose noise is larger by itself; what it did is in ``Parity.quantization_loss``.

    Raises:
        ParityError: no path agrees, or the chosen one does not, or plain transformers itself gives NaN or infinity.
    """
    config = classifier.config
    rows = probe_rows(
        vocab_size=config.vocab_size,
        pad_token_id=classifier.pad_token_id,
        eos_token_id=_first(config.eos_token_id),
        window=_window(config),
        max_tokens=max_tokens,
    )
    plain = plain_rewards(classifier, rows)
    loss: dict[str, float | int] = {}
    if quantize is not None:
        quantize()
        unchanged, plain = plain, plain_rewards(classifier, rows)
        loss = loss_between(unchanged, plain)
    if not all(map(isfinite, plain)):
        raise ParityError(
            f"Plain transformers gives {classifier.architecture} no finite reward in {classifier.dtype}: "
            "choose another model.dtype"
        )
    noise = [0.0] * len(rows)
    if classifier.is_half_precision:
        noise = _noise_of(classifier, rows, plain)
    limits = tolerances(classifier.dtype, plain, noise)

    refusals = []
    names = paths_to_try(
        choice, share_prefixes=share_prefixes, keep_prefixes=cache_bytes > 0, kernels=kernels is not None
    )
    for name in names:
        if compiled and name == "padded":
            refusals.append("padded cannot be compiled: leave model.compile out")
            continue
        try:
            path = _open_path(
                name, classifier, compiled=compiled, kernels=kernels, cache_bytes=cache_bytes, cascade=cascade
            )
            parity = max(
                (compare(rewards, plain, noise, limits) for rewards in probed_rewards(path, rows)),
                key=lambda found: found.max_difference / found.tolerance,
            )
            parity = replace(parity, quantization_loss=loss)
        except Exception as error:  # noqa: BLE001 - whatever a foreign model raises here, this path does not carry it
            refusals.append(f"{name} does not run ({type(error).__name__}: {error})")
            continue
        if parity.agrees:
            _report(classifier, name, parity, refusals)
            return path, parity
        refusals.append(f"{name} differs by {parity.max_difference:.3g}, more than {parity.tolerance:.3g}")
    raise ParityError(
        f"No forward path agrees with plain transformers on {classifier.architecture}: {'; '.join(refusals)}"
    )


def probed_rewards(path: ForwardPath, rows: Sequence[tuple[int, ...]]) -> Iterator[Sequence[float]]:
    """Yield what a path says of the probes: once, or where prompts are kept cold and again warm.

    Their prompts are the first halves of the rows.
    """
    if not path.keeps:
        yield path.run(rows).rewards
        return
    for _ in range(KEPT_PASSES):
        yield path.run(rows, prompts=[len(row) // 2 for row in rows]).rewards
    path.forget()


def _report(classifier: Classifier, name: str, parity: Parity, refusals: Sequence[str]) -> None:
    logger.info(
        "%s runs %s in %s: largest difference to plain transformers %.3g, limit %.3g, on %d probes%s",
        classifier.architecture,
        name,
        classifier.dtype,
        parity.max_difference,
        parity.tolerance,
        parity.num_probes,
        "".join(f"; {refusal}" for refusal in refusals),
    )
    if not parity.conclusive:
        logger.warning(
            "The parity probe cannot tell right from wrong here: rounding moves rewards as far as they lie apart; "
            "with model.dtype float32 it is sharper"
        )


@torch.inference_mode()
def plain_rewards(classifier: Classifier, rows: Sequence[Sequence[int]]) -> list[float]:
    """Return the rewards of the plain transformers forward, row by row, with the attention transformers chose itself.

    The weights are the served ones, the head's in fp32. ``last`` pooling is not transformers' own, so there the state
    of the last token is read off transformers' body.
    """
    rewire(classifier, classifier.plain_attention)
    rewards = []
    for row in rows:
        ids = classifier.token_tensor([row])
        if classifier.pooling == "last":
            states = classifier.body(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state
            rewards += classifier.read_rewards(states[:, -1])
        else:
            rewards.append(float(classifier.model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, 0]))
    return rewards


def _noise_of(classifier: Classifier, rows: Sequence[Sequence[int]], plain: Sequence[float]) -> list[float]:
    """Return how far each plain reward moves when embeddings move by their last bit, in the worst of some ways."""
    moved = []
    for run in NOISE_RUNS:
        with _last_bit_moved(classifier, run):
            moved.append(differences(plain_rewards(classifier, rows), plain))
    return [max(gaps) for gaps in zip(*moved, strict=True)]


@contextmanager
def _last_bit_moved(classifier: Classifier, run: int = 1) -> Iterator[None]:
    """Move every embedding by one unit in its last place while the context is open: up and down by turns of ``run``."""

    def move(_module: torch.nn.Module, _inputs: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
        ups_and_downs = 1 - 2 * (torch.arange(output.shape[-1], device=output.device) // run % 2)
        return output * (1 + torch.finfo(output.dtype).eps * ups_and_downs).to(output.dtype)

    handle = classifier.model.get_input_embeddings().register_forward_hook(move)
    try:
        yield
    finally:
        handle.remove()


def _first(token_ids: int | Sequence[int] | None) -> int | None:
    return token_ids if token_ids is None or isinstance(token_ids, int) else token_ids[0]


def _window(config: Any) -> int | None:
    """Return the sliding window of a configuration, under the names that transformers' families give it."""
    window: int | None = getattr(config, "sliding_window", None) or getattr(config, "local_attention", None)
    return window
