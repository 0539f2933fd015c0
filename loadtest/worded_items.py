"""Items for the measurement of slow drift: good completions and their edits, as what the drift monitor compares.

They are measured once, with or without a model, and stored without any text.
"""

from __future__ import annotations

import json
import random
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from rich.console import Console

from loadtest.plausible_hacks import EDITS
from loadtest.state_cache import StateCache
from service.console import progress_bar
from service.data.holdout import is_held_out
from service.data.reading import read_examples
from service.diagnostics.monitors.observation import Observation
from service.diagnostics.phrasing import Wording
from service.diagnostics.text import wording_of
from service.errors import CalibrationError, DatasetError
from service.records import Exchange, Item, Score, StateTap, TokenSequence

if TYPE_CHECKING:
    from service.assembly import ServedModel

CLEAN = "clean"


@dataclass(frozen=True, slots=True)
class Kind:
    """Clean completions, or a variant of a hack."""

    name: str
    of_prompt: Mapping[int, Sequence[Observation]] = field(repr=False)
    """The completions of each prompt."""


@dataclass(frozen=True, slots=True)
class WordedItems:
    """All items of a measurement."""

    kinds: Mapping[str, Kind]
    taps: tuple[StateTap, ...]
    """Taps of the hidden states; none where no model scored the items."""


def read_exchanges(paths: Sequence[Path], held_out: Sequence[Path]) -> list[tuple[int, Exchange]]:
    """Return all completions with numbers of their prompts; of ``held_out`` only prompts that no training has seen.

    Raises:
        DatasetError: a row is not valid, or there is none.
    """
    numbers: dict[object, int] = {}
    found = []
    for path in (*paths, *held_out):
        for _, parsed in read_examples(path):
            if path in held_out and not is_held_out(parsed.prompt):
                continue
            number = numbers.setdefault(parsed.prompt, len(numbers))
            found += [(number, exchange) for exchange in parsed.exchanges()]
    if not found:
        raise DatasetError("The files have no row.")
    return found


def edited(exchanges: Sequence[tuple[int, Exchange]], num_prompts: int | None) -> Iterator[tuple[str, int, Exchange]]:
    """Yield clean completions, and the edits of those of some prompts, with the names of their kinds."""
    yield from ((CLEAN, number, exchange) for number, exchange in exchanges)
    numbers = list(dict.fromkeys(number for number, _ in exchanges))
    random.Random("edited").shuffle(numbers)  # noqa: S311 - a choice of items, not a secret
    chosen = set(numbers[:num_prompts])
    for hack, variants in EDITS.items():
        for variant, edit in enumerate(variants):
            rng = random.Random(f"{hack} {variant}")  # noqa: S311
            for number, exchange in exchanges:
                if number in chosen:
                    text = edit(_question(exchange), exchange.completion_text, rng)
                    yield f"{hack} {variant + 1}", number, Exchange(exchange.prompt, text)


def measure(rows: Sequence[tuple[str, int, Exchange]], served: ServedModel | None, output: Path) -> None:
    """Measure items and store them as arrays.

    Args:
        rows: kind, number of the prompt and item.
        served: a model with a calibration, which scores the items; None: texts only.
        output: an ``.npz`` file. What the model computes is stored beside it, in a file that ends in ``.states``, as
            the measurement goes on.

    Raises:
        CalibrationError: the model has no calibration, or cannot score an item.
    """
    exchanges = [exchange for _, _, exchange in rows]
    if served is None:
        wordings, traits = [wording_of(entry) for entry in exchanges], None
        taps: tuple[StateTap, ...] = ()
    else:
        wordings, traits, taps = _scored(exchanges, served, output.with_suffix(".states"))
    np.savez_compressed(
        output,
        kinds=np.array([kind for kind, _, _ in rows]),
        prompts=np.array([number for _, number, _ in rows]),
        values=np.stack([wording.values for wording in wordings]).astype(np.float32),
        sizes=np.array([len(wording.phrases) for wording in wordings]),
        phrases=np.concatenate([wording.phrases for wording in wordings]),
        phrase_kinds=np.concatenate([wording.kinds for wording in wordings]),
        traits=np.empty((len(rows), 0), np.float32) if traits is None else np.array(traits, np.float32),
        taps=np.array(json.dumps([[tap.layer, tap.pooling] for tap in taps])),
    )


def read_measured(path: Path) -> WordedItems:
    """Return what `measure` stored."""
    with np.load(path) as arrays:
        ends = np.cumsum(arrays["sizes"])
        spans = list(zip(ends - arrays["sizes"], ends, strict=True))
        phrases, phrase_kinds, traits = (arrays[name] for name in ("phrases", "phrase_kinds", "traits"))
        found: defaultdict[str, defaultdict[int, list[Observation]]] = defaultdict(lambda: defaultdict(list))
        rows = zip(arrays["kinds"].tolist(), arrays["prompts"].tolist(), arrays["values"], spans, traits, strict=True)
        for kind, prompt, values, (begin, end), states in rows:
            wording = Wording(values.astype(np.float64), phrases[begin:end], phrase_kinds[begin:end], prompt)
            score = Score(0.0, traits=tuple(states.tolist()) if len(states) else None)
            found[kind][prompt].append(Observation(score, prompt, wording=wording))
        taps = tuple(StateTap(layer, pooling) for layer, pooling in json.loads(str(arrays["taps"])))
    return WordedItems({kind: Kind(kind, dict(of_prompt)) for kind, of_prompt in found.items()}, taps)


def _question(exchange: Exchange) -> str:
    return exchange.prompt if isinstance(exchange.prompt, str) else exchange.prompt[-1].text


def _scored(
    exchanges: Sequence[Exchange], served: ServedModel, cache_path: Path
) -> tuple[list[Wording], list[tuple[float, ...]], tuple[StateTap, ...]]:
    """Return wording and state statistics of each item, as the service computes them at level ``full``."""
    from service.offline import encode_items, score_offline
    from service.records import Encoding

    calibration = served.lookup.calibration
    if calibration is None:
        raise CalibrationError(str(served.lookup.reason))
    items = [Item(exchange) for exchange in exchanges]
    encoded = list(encode_items(served.tokenization, items, Encoding(truncation="prompt_left")))
    sequences = [sequence for sequence in encoded if isinstance(sequence, TokenSequence)]
    if len(sequences) < len(items):
        raise CalibrationError(f"{len(items) - len(sequences)} items cannot be encoded.")
    pipeline = served.scorer.pipeline
    cache = StateCache(cache_path, [served.identity.version, calibration.id])
    score = partial(score_offline, pipeline, level="full")
    with progress_bar(Console(stderr=True), "Scoring", len({sequence.row for sequence in sequences})) as advance:
        traits = cache.complete(sequences, score, advance)
    reader = pipeline.diagnostician.text_reader
    facts = reader.read_all(list(zip(items, sequences, strict=True)), full=True)
    wordings = [one.wording for one in facts if one is not None and one.wording is not None]
    if len(wordings) < len(items):
        raise CalibrationError("The tokenizer does not show where a completion begins.")
    return wordings, traits, calibration.states.taps
