"""Where the rewards of an audit come from: a checkpoint, through the service's own pipeline, or a running service.

Completions of one prompt stay together, so that whatever shares prefixes can. It counts as it goes, for a progress bar.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import numpy as np
from reward_client import RewardClient
from reward_client.errors import ItemsFailed
from reward_client.options import Truncation

from service.assembly import judge
from service.checkpoints.checkpoint import model_version
from service.errors import HttpError
from service.pipeline import Pipeline
from service.records import Encoding, Exchange, Item, Message, TokenSequence
from service.scheduling.budget import BatchBudget, batch_cost
from service.settings import Settings
from service.tokenization import Tokenization
from training.audit.scored_pairs import ScoredPairs
from training.preferences import PreferencePair

Advance: TypeAlias = Callable[[int], None]
"""Told how many more completions have been dealt with."""

ITEMS_PER_CALL = 256
ITEMS_PER_ENCODING = 1024


@dataclass(frozen=True, slots=True)
class ScoredCompletion:
    """``num_tokens``: of the completion, template suffix included; None where the service does not say."""

    reward: float
    num_tokens: int | None


class Scorer(Protocol):
    """Something that has a reward for an exchange."""

    def description(self) -> Mapping[str, Any]:
        """Return what scores: at least the model's ``name`` and ``version``."""
        ...

    def score(self, exchanges: Sequence[Exchange], advance: Advance) -> list[ScoredCompletion | None]:
        """Return a reward for each exchange, in order; None for one that cannot be scored."""
        ...


def score_pairs(pairs: Sequence[PreferencePair], scorer: Scorer, advance: Advance) -> ScoredPairs:
    """Score both completions of each pair; a pair of which one has no reward is left out and counted.

    Lengths are tokens, or characters for all if the tokens of any are unknown.
    """
    exchanges = [Exchange(pair.prompt, text) for pair in pairs for text in (pair.chosen, pair.rejected)]
    scores = scorer.score(exchanges, advance)
    whole = [
        (pair, chosen, rejected)
        for pair, chosen, rejected in zip(pairs, scores[::2], scores[1::2], strict=True)
        if chosen is not None and rejected is not None
    ]
    knows_tokens = all(score.num_tokens is not None for _, *both in whole for score in both)
    return ScoredPairs(
        pairs=[pair for pair, _, _ in whole],
        chosen=np.array([chosen.reward for _, chosen, _ in whole], dtype=np.float64),
        rejected=np.array([rejected.reward for _, _, rejected in whole], dtype=np.float64),
        chosen_lengths=np.array(
            [c.num_tokens if knows_tokens else len(pair.chosen) for pair, c, _ in whole], np.float64
        ),
        rejected_lengths=np.array(
            [r.num_tokens if knows_tokens else len(pair.rejected) for pair, _, r in whole], np.float64
        ),
        unit="tokens" if knows_tokens else "characters",
        num_failed=len(pairs) - len(whole),
    )


class CheckpointScorer:
    """Scores with a checkpoint on this machine, through the code that serves it.

    Args:
        settings: ``model`` names the checkpoint; limits of the service do not apply.

    Raises:
        StartupError: the checkpoint is refused, or no forward path agrees with plain transformers.
    """

    def __init__(self, settings: Settings) -> None:
        from service.engines.torch import load_torch_engine

        self._settings = settings
        self._checkpoint = judge(settings.model)
        self._tokenization = Tokenization(
            self._checkpoint.tokenizer,
            settings.tokenization,
            max_input_tokens=self._checkpoint.max_input_tokens,
            vocab_size=self._checkpoint.embedding_size,
        )
        engine = load_torch_engine(
            self._checkpoint.path,
            settings.model,
            settings.batching,
            pad_token_id=self._checkpoint.pad_token_id,
            max_input_tokens=self._checkpoint.max_input_tokens,
        )
        self._pipeline = Pipeline(engine)
        info = engine.info
        self._budget = BatchBudget(info.cost, info.max_batch_tokens, settings.batching.max_batch_sequences)

    def description(self) -> Mapping[str, Any]:
        """Return name, version, architecture and arithmetic."""
        info = self._pipeline.engine.info
        identity = model_version(
            self._checkpoint,
            dtype=info.dtype,
            pooling=self._settings.model.pooling,
            template=self._tokenization.template_for(Encoding()),
        )
        return {
            "name": identity.name,
            "version": identity.version,
            "architecture": info.architecture,
            "dtype": info.dtype,
            "parameters": self._checkpoint.num_parameters,
        }

    def score(self, exchanges: Sequence[Exchange], advance: Advance) -> list[ScoredCompletion | None]:
        """Score batches of neighbours in prompt and length; see ``Scorer.score``."""
        sequences = self._encode(exchanges)
        advance(sum(sequence is None for sequence in sequences))
        scores: list[ScoredCompletion | None] = [None] * len(exchanges)
        for places, batch in _batches(exchanges, sequences, self._budget):
            outcomes = self._pipeline.run(batch, ["none"] * len(batch)).outcomes
            for place, sequence, outcome in zip(places, batch, outcomes, strict=True):
                if not isinstance(outcome, HttpError):
                    scores[place] = ScoredCompletion(outcome.reward, sequence.num_completion_tokens)
            advance(len(places))
        return scores

    def _encode(self, exchanges: Sequence[Exchange]) -> list[TokenSequence | None]:
        encoding = Encoding(truncation=self._settings.tokenization.truncation)
        sequences: list[TokenSequence | None] = []
        for start in range(0, len(exchanges), ITEMS_PER_ENCODING):
            items = [Item(exchange) for exchange in exchanges[start : start + ITEMS_PER_ENCODING]]
            outcomes = self._tokenization.encode(items, encoding)
            sequences += [None if isinstance(outcome, HttpError) else outcome for outcome in outcomes]
        return sequences


class ServiceScorer:
    """Scores with a running service."""

    def __init__(self, client: RewardClient, truncation: Truncation | None = None) -> None:
        self._client = client
        self._truncation = truncation

    def description(self) -> Mapping[str, Any]:
        """Return name, version, architecture and arithmetic, as the service tells them."""
        told = self._client.model()
        engine = told.get("engine", {})
        return dict(told["model"]) | {name: engine[name] for name in ("architecture", "dtype") if name in engine}

    def score(self, exchanges: Sequence[Exchange], advance: Advance) -> list[ScoredCompletion | None]:
        """Score in calls of ``ITEMS_PER_CALL``; see ``Scorer.score``.

        Raises:
            ClientError: the service refused a call, or could not be reached.
        """
        scores: list[ScoredCompletion | None] = []
        for start in range(0, len(exchanges), ITEMS_PER_CALL):
            part = exchanges[start : start + ITEMS_PER_CALL]
            scores += self._score_call(part)
            advance(len(part))
        return scores

    def _score_call(self, exchanges: Sequence[Exchange]) -> list[ScoredCompletion | None]:
        try:
            scored = self._client.score_items(map(_wire_item, exchanges), truncation=self._truncation)
        except ItemsFailed as error:
            kept = [place for place, reward in enumerate(error.rewards) if reward is not None]
            scores: list[ScoredCompletion | None] = [None] * len(exchanges)
            for place, score in zip(kept, self._score_call([exchanges[place] for place in kept]), strict=True):
                scores[place] = score
            return scores
        return [ScoredCompletion(item.reward, _completion_tokens(item.diagnostics)) for item in scored]


def load_checkpoint_scorer(model: Path, *, truncation: Truncation, **options: Any) -> CheckpointScorer:
    """Load a checkpoint folder with further settings of ``service.settings.ModelSettings``.

    Raises:
        StartupError: see ``CheckpointScorer``; a setting that is not valid.
    """
    from service.settings import read_settings

    tree = {"model": {"path": str(model), **options}, "tokenization": {"truncation": truncation}}
    return CheckpointScorer(read_settings(tree))


def _batches(
    exchanges: Sequence[Exchange], sequences: Sequence[TokenSequence | None], budget: BatchBudget
) -> Iterator[tuple[list[int], list[TokenSequence]]]:
    """Places and sequences of each pass: prompts in order of length, completions of one together if they fit."""
    by_prompt: dict[object, list[tuple[int, TokenSequence]]] = {}
    for place, (exchange, sequence) in enumerate(zip(exchanges, sequences, strict=True)):
        if sequence is not None:
            by_prompt.setdefault(exchange.prompt, []).append((place, sequence))
    batch: list[tuple[int, TokenSequence]] = []
    for group in sorted(by_prompt.values(), key=lambda group: max(sequence.num_tokens for _, sequence in group)):
        if batch and not _fit([*batch, *group], budget):
            yield _unzip(batch)
            batch = []
        for entry in group:
            if batch and not _fit([*batch, entry], budget):
                yield _unzip(batch)
                batch = []
            batch.append(entry)
    if batch:
        yield _unzip(batch)


def _fit(batch: Sequence[tuple[int, TokenSequence]], budget: BatchBudget) -> bool:
    lengths = [sequence.num_tokens for _, sequence in batch]
    return len(batch) <= budget.max_sequences and batch_cost(lengths, budget.cost) <= budget.max_tokens


def _unzip(batch: Sequence[tuple[int, TokenSequence]]) -> tuple[list[int], list[TokenSequence]]:
    return [place for place, _ in batch], [sequence for _, sequence in batch]


def _wire_item(exchange: Exchange) -> dict[str, Any]:
    prompt = exchange.prompt
    return {
        "prompt": prompt if isinstance(prompt, str) else [_wire_message(turn) for turn in prompt],
        "completion": exchange.completion,
    }


def _wire_message(turn: Message) -> dict[str, str]:
    return {"role": turn.role, "content": turn.content}


def _completion_tokens(diagnostics: Mapping[str, Any]) -> int | None:
    length = diagnostics.get("length")
    return length.get("completion_tokens") if isinstance(length, dict) else None
