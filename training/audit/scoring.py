"""Computes the rewards of an audit: with a checkpoint, through the service's own pipeline, or with a running service.

Both report progress by the number of completions that are done.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import numpy as np
from reward_client import RewardClient
from reward_client.errors import ItemsFailed
from reward_client.options import Truncation

from service.assembly import assemble
from service.console import Advance
from service.errors import HttpError, SettingsError
from service.offline import encode_items, score_offline
from service.records import Encoding, Exchange, Item, Score, TokenSequence
from service.settings import Settings
from training.audit.scored_pairs import OutputRewards, ScoredPairs
from training.failures import count_reasons, reason_of
from training.preferences import PreferencePair

ITEMS_PER_CALL = 256


@dataclass(frozen=True, slots=True)
class ScoredCompletion:
    """A completion that has a reward."""

    reward: float

    num_tokens: int | None
    """Tokens of the completion, template suffix included; None where the service does not report them."""

    outputs: Mapping[str, float] = field(default_factory=dict)
    """The outputs of a model with several, by name."""


@dataclass(frozen=True, slots=True)
class UnscoredCompletion:
    """A completion that has no reward."""

    reason: str
    """See `training.failures.reason_of`."""


Outcome: TypeAlias = ScoredCompletion | UnscoredCompletion


class Scorer(Protocol):
    """Something that computes rewards of exchanges."""

    def description(self) -> Mapping[str, Any]:
        """Return a description of the model: at least its ``name`` and ``version``."""
        ...

    def score(self, exchanges: Sequence[Exchange], advance: Advance) -> list[Outcome]:
        """Score exchanges.

        Args:
            exchanges: prompts with completions.
            advance: called with the number of further completions that are done, with or without a reward.

        Returns:
            One entry for each exchange, in order.
        """
        ...


def score_pairs(pairs: Sequence[PreferencePair], scorer: Scorer, advance: Advance) -> ScoredPairs:
    """Score both completions of each pair; a pair in which one has no reward is left out and counted by reason.

    Lengths are tokens, or characters for all if the tokens of any are unknown.
    """
    exchanges = [Exchange(pair.prompt, text, pair.tools) for pair in pairs for text in (pair.chosen, pair.rejected)]
    scores = scorer.score(exchanges, advance)
    complete: list[tuple[PreferencePair, ScoredCompletion, ScoredCompletion]] = []
    reasons: list[str] = []
    for pair, chosen, rejected in zip(pairs, scores[::2], scores[1::2], strict=True):
        if isinstance(chosen, UnscoredCompletion):
            reasons.append(chosen.reason)
        elif isinstance(rejected, UnscoredCompletion):
            reasons.append(rejected.reason)
        else:
            complete.append((pair, chosen, rejected))
    has_token_counts = all(score.num_tokens is not None for _, *both in complete for score in both)
    return ScoredPairs(
        pairs=[pair for pair, _, _ in complete],
        chosen=np.array([chosen.reward for _, chosen, _ in complete], dtype=np.float64),
        rejected=np.array([rejected.reward for _, _, rejected in complete], dtype=np.float64),
        chosen_lengths=np.array(
            [c.num_tokens if has_token_counts else len(pair.texts[0]) for pair, c, _ in complete], np.float64
        ),
        rejected_lengths=np.array(
            [r.num_tokens if has_token_counts else len(pair.texts[1]) for pair, _, r in complete], np.float64
        ),
        outputs=_output_gaps(complete),
        unit="tokens" if has_token_counts else "characters",
        failures=count_reasons(reasons),
    )


def _output_gaps(
    complete: Sequence[tuple[PreferencePair, ScoredCompletion, ScoredCompletion]],
) -> dict[str, OutputRewards]:
    names = complete[0][1].outputs if complete else {}
    return {
        name: OutputRewards(
            np.array([chosen.outputs[name] for _, chosen, _ in complete], dtype=np.float64),
            np.array([rejected.outputs[name] for _, _, rejected in complete], dtype=np.float64),
        )
        for name in names
    }


class CheckpointScorer:
    """Scores with a checkpoint or an ONNX bundle on this machine, through the code that serves it.

    Args:
        settings: ``model`` names the checkpoint; limits of the service do not apply.

    Raises:
        StartupError: the checkpoint is refused, or no forward path agrees with plain transformers.
    """

    def __init__(self, settings: Settings) -> None:
        self._served = assemble(settings, taps=())  # an audit reads rewards alone
        if not self._served.rule.has_reward:
            raise SettingsError(
                f"The model has the outputs {', '.join(self._served.info.outputs)} and no weights of them: give "
                "--weights, as NAME=WEIGHT for each."
            )

    def description(self) -> Mapping[str, Any]:
        """Return name, version, architecture, dtype and number of parameters."""
        served = self._served
        description = {
            "name": served.identity.name,
            "version": served.identity.version,
            "architecture": served.info.architecture,
            "dtype": served.info.dtype,
        }
        return description | ({"parameters": served.checkpoint.num_parameters} if served.checkpoint else {})

    def score(self, exchanges: Sequence[Exchange], advance: Advance) -> list[Outcome]:
        """Score in batches as the service would; see ``Scorer.score``."""
        settings = self._served.settings
        encoding = Encoding(truncation=settings.tokenization.truncation)
        encoded = list(encode_items(self._served.tokenization, map(Item, exchanges), encoding))
        results = score_offline(
            self._served.scorer.pipeline,
            encoded,
            max_batch_sequences=settings.batching.max_batch_sequences,
            advance=advance,
        )
        names = self._served.info.outputs
        scores = {index: _outcome(encoded[index], outcome, names) for index, outcome in results}
        return [scores[index] for index in range(len(exchanges))]


class ServiceScorer:
    """Scores with a running service."""

    def __init__(
        self,
        client: RewardClient,
        truncation: Truncation | None = None,
        weights: Mapping[str, float] | None = None,
    ) -> None:
        self._client = client
        self._weights = weights
        self._truncation = truncation

    def description(self) -> Mapping[str, Any]:
        """Return name, version, architecture and arithmetic, as the service reports them."""
        description = self._client.model().description
        engine = description.get("engine", {})
        return dict(description["model"]) | {name: engine[name] for name in ("architecture", "dtype") if name in engine}

    def score(self, exchanges: Sequence[Exchange], advance: Advance) -> list[Outcome]:
        """Score in calls of ``ITEMS_PER_CALL``; see ``Scorer.score``.

        Raises:
            ClientError: the service refused a call, or could not be reached.
        """
        scores: list[Outcome] = []
        for start in range(0, len(exchanges), ITEMS_PER_CALL):
            part = exchanges[start : start + ITEMS_PER_CALL]
            scores += self._score_call(part)
            advance(len(part))
        return scores

    def _score_call(self, exchanges: Sequence[Exchange]) -> list[Outcome]:
        try:
            scored = self._client.score_items(
                [exchange.as_dict() for exchange in exchanges], truncation=self._truncation, weights=self._weights
            )
        except ItemsFailed as error:
            scorable = [index for index, reward in enumerate(error.rewards) if reward is not None]
            rescored = self._score_call([exchanges[index] for index in scorable]) if scorable else []
            scores: dict[int, Outcome] = dict(zip(scorable, rescored, strict=True))
            for failure in error.failures:
                scores[failure.index] = UnscoredCompletion(reason_of(failure.code, failure.detail))
            return [scores[index] for index in range(len(exchanges))]
        return [
            ScoredCompletion(item.known_reward, _completion_tokens(item.diagnostics), item.rewards) for item in scored
        ]


def load_checkpoint_scorer(model: Path, *, truncation: Truncation, **options: Any) -> CheckpointScorer:
    """Load a checkpoint folder with further settings of ``service.settings.ModelSettings``.

    Raises:
        StartupError: see ``CheckpointScorer``; a setting that is not valid.
    """
    from service.settings import read_settings

    tree = {"model": {"path": str(model), **options}, "tokenization": {"truncation": truncation}}
    return CheckpointScorer(read_settings(tree))


def _outcome(sequence: TokenSequence | HttpError, outcome: Score | HttpError, names: Sequence[str]) -> Outcome:
    if isinstance(outcome, HttpError):
        return UnscoredCompletion(reason_of(outcome.code, outcome.detail))
    assert outcome.reward is not None  # noqa: S101 - the scorer has refused models without a reward
    return ScoredCompletion(
        outcome.reward,
        sequence.num_completion_tokens if isinstance(sequence, TokenSequence) else None,
        dict(zip(names, outcome.outputs, strict=False)),
    )


def _completion_tokens(diagnostics: Mapping[str, Any]) -> int | None:
    length = diagnostics.get("length")
    return length.get("completion_tokens") if isinstance(length, dict) else None
