"""``reward-audit`` from files to a report: the rewards that it judges are those that the service gives."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from misbehaving_server import FakeServer, Request, ok, running, scores
from preference_rows import longer_wins_pairs, polite_pairs, with_slips, write_pairs
from reward_client import RewardClient
from serving import serving
from tiny_models import write_tiny_causal_lm, write_tiny_checkpoint
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from service.checkpoints.adapter import merge_adapter
from service.records import Message
from training.audit.command import audit, main
from training.audit.scoring import ServiceScorer, load_checkpoint_scorer, score_pairs
from training.evaluation import evaluate
from training.pairs import tokenize_pairs
from training.preferences import PreferencePair, read_pairs
from training.recipe import Recipe
from training.train import train

QUIET_PEFT = pytest.mark.filterwarnings("ignore:.*will be removed in v6:FutureWarning")


def silent(_: int) -> None:
    """No progress bar."""


def test_a_checkpoint_is_judged_by_its_served_rewards(tmp_path: Path) -> None:
    """Accuracy and margin equal those of plain transformers on the same pairs; lengths are tokens, nothing fails."""
    checkpoint = write_tiny_checkpoint(tmp_path / "model")
    file = write_pairs(tmp_path / "pairs.jsonl", polite_pairs(40))
    pairs = list(read_pairs([file]))
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    plain = evaluate(AutoModelForSequenceClassification.from_pretrained(checkpoint), tokenize_pairs(pairs, tokenizer))
    counted: list[int] = []

    scored = score_pairs(
        pairs, load_checkpoint_scorer(checkpoint, truncation="error", dtype="float32", num_threads=1), counted.append
    )

    assert (scored.gaps > 0).mean() == plain.accuracy.value
    assert scored.gaps.mean() == pytest.approx(plain.mean_margin, abs=1e-4)
    assert (scored.unit, scored.num_failed, sum(counted)) == ("tokens", 0, 80)
    assert scored.chosen_lengths[0] == len(tokenizer(pairs[0].chosen + "<|im_end|>\n")["input_ids"]) - 1


def test_a_pair_that_is_too_long_is_left_out(tmp_path: Path) -> None:
    """Over the token limit there is no reward, and no made-up one; the progress bar still comes to its end."""
    checkpoint = write_tiny_checkpoint(tmp_path)
    pairs = [PreferencePair("p", "word " * 2000, "no"), PreferencePair("p", "yes", "no")]
    counted: list[int] = []

    scored = score_pairs(pairs, load_checkpoint_scorer(checkpoint, truncation="error", num_threads=1), counted.append)

    assert scored.pairs == pairs[1:]
    assert (scored.num_failed, sum(counted)) == (1, 4)


class Sized(FakeServer):
    """Says how long completions are, in tokens; one that spells 13 has no reward."""

    async def answer(self, request: Request) -> AsyncIterator[bytes]:
        if request.path.startswith("/v1/model"):
            yield ok({"model": {"name": "sized", "version": "v1"}, "engine": {"architecture": "none", "threads": 3}})
            return
        answer = scores(request)
        for result in answer["results"]:
            result["length"] = {"completion_tokens": int(result["reward"]) + 100}
            if result["reward"] == 13:
                del result["reward"]
                result["error"] = {"code": "engine_failed", "detail": "The forward pass failed"}
        yield ok(answer)


def test_a_service_is_judged_by_what_it_answers() -> None:
    """Rewards and lengths come over HTTP in order; an item without a reward takes its pair along and no other."""
    prompt = (Message("user", "why?"),)
    pairs = [PreferencePair(prompt, str(n + 1), str(n)) for n in range(20)]

    with running(Sized()) as world, RewardClient(world.url) as client:
        scorer = ServiceScorer(client)
        scored = score_pairs(pairs, scorer, silent)
        told = scorer.description()

    assert [pair.rejected for pair in scored.pairs] == [str(n) for n in range(20) if n not in {12, 13}]
    assert set(scored.gaps) == {1.0}
    assert scored.chosen_lengths[0] == 101
    assert told == {"name": "sized", "version": "v1", "architecture": "none"}


def test_without_token_counts_lengths_are_characters() -> None:
    """A service that says nothing of lengths is judged by characters, for all pairs alike."""
    with running(FakeServer()) as world, RewardClient(world.url) as client:
        scored = score_pairs([PreferencePair("p", "100", "20")], ServiceScorer(client), silent)

    assert (scored.unit, scored.chosen_lengths.tolist(), scored.rejected_lengths.tolist()) == ("characters", [3], [2])


def test_the_command_writes_the_report_and_says_the_verdicts(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """From a folder and files to the three kinds of output, verdicts on the terminal, and no text of the data there."""
    checkpoint = write_tiny_checkpoint(tmp_path / "model")
    pairs = write_pairs(tmp_path / "pairs.jsonl", polite_pairs(30))
    training = write_pairs(tmp_path / "train.jsonl", [*polite_pairs(10), *polite_pairs(20, seed=1)])
    command = [str(checkpoint), str(pairs), "--out", str(tmp_path / "out"), "--train-pairs", str(training)]

    status = main([*command, "--max-train-pairs", "20", "--hide-texts", "--threads", "1"])

    said = capsys.readouterr().err
    written = json.loads((tmp_path / "out" / "audit.json").read_text())
    assert status == 0
    assert "Length detector: " in said
    assert "Question 0-1" not in said
    assert written["leakage"]["same_prompt"] == 10
    assert written["overtraining"]["num_train_pairs"] == 20
    assert written["data"]["files"][0]["name"] == "pairs.jsonl"
    assert (tmp_path / "out" / "audit.html").is_file()


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["no/such/model", "pairs.jsonl"], "There is no folder no/such/model"),
        (["."], "Give files of held-out pairs"),
        ([".", "pairs.jsonl"], "."),
        (["--url", "http://127.0.0.1:9", "missing.jsonl"], "missing.jsonl does not exist"),
    ],
    ids=["no-model", "no-pairs", "no-checkpoint", "no-file"],
)
def test_what_cannot_be_audited_ends_with_one_sentence(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    complaint: str,
) -> None:
    """Exit status 1 and a sentence, no traceback, and nothing that looks like a report."""
    monkeypatch.chdir(tmp_path)
    write_pairs(tmp_path / "pairs.jsonl", polite_pairs(2))

    status = main([*arguments, "--out", "out"])

    assert status == 1
    assert complaint in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def train_tiny(folder: Path, rows: list[dict[str, object]]) -> Path:
    """A served checkpoint that learned its rule from the rows alone."""
    base = write_tiny_causal_lm(folder / "base")
    recipe = Recipe(
        lora_rank=8, learning_rate=1e-2, epochs=3, max_length=256, batch_pairs=8, hold_out_percent=0, dtype="fp32"
    )
    train([write_pairs(folder / "train.jsonl", rows)], str(base), folder / "adapter", recipe)
    return merge_adapter(folder / "adapter", folder / "model")


@QUIET_PEFT
@pytest.mark.slow
def test_a_model_that_really_learned_length_is_called_a_detector(tmp_path: Path) -> None:
    """Trained where the longer answer wins, audited where length says nothing: over files and over HTTP alike."""
    checkpoint = train_tiny(tmp_path, longer_wins_pairs(240))
    balanced = [*longer_wins_pairs(60, seed=1), *with_slips(longer_wins_pairs(60, seed=2), every=1)]
    pairs = write_pairs(tmp_path / "pairs.jsonl", balanced)

    from_folder = audit(load_checkpoint_scorer(checkpoint, truncation="error"), [pairs], tmp_path / "folder")
    with serving(tmp_path, "--model", str(checkpoint)) as server:
        status = main(["--url", server.url, str(pairs), "--out", str(tmp_path / "url")])

    from_url = json.loads((tmp_path / "url" / "audit.json").read_text())
    assert from_folder.length_bias.is_critical
    assert from_folder.accuracy.prefers_longer.low > 0.9
    assert status == 0
    assert from_url["accuracy"]["accuracy"]["value"] == from_folder.accuracy.accuracy.value
    assert {verdict["question"]: verdict["answer"] for verdict in from_url["verdicts"]}["Length detector"] == "yes"


@QUIET_PEFT
@pytest.mark.slow
def test_a_model_that_really_learned_shuffled_labels_is_at_chance(tmp_path: Path) -> None:
    """Labels without a meaning teach nothing that helps on other pairs, and the audit says chance."""
    checkpoint = train_tiny(tmp_path, with_slips(polite_pairs(240), every=2))
    pairs = write_pairs(tmp_path / "pairs.jsonl", with_slips(polite_pairs(200, seed=1), every=2))

    found = audit(load_checkpoint_scorer(checkpoint, truncation="error"), [pairs], tmp_path / "out")

    assert found.accuracy.accuracy.low < 0.5 < found.accuracy.accuracy.high
