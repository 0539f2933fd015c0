"""``reward-audit`` from files to a report: it uses the rewards that the service returns."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest
from misbehaving_server import FakeServer, Request, ok, running, scores
from preference_rows import longer_wins_pairs, polite_pairs, with_slips, write_pairs
from reward_client import RewardClient
from serving import serving
from tiny_bundles import write_tiny_bundle
from tiny_models import refuse_system_messages, write_tiny_causal_lm, write_tiny_checkpoint
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from service.assembly import assemble
from service.checkpoints.adapter import merge_adapter
from service.records import Exchange, Message
from service.settings import read_settings
from training.audit import command
from training.audit.command import main
from training.audit.data import read_data
from training.audit.run import audit
from training.audit.scoring import ScoredCompletion, ServiceScorer, load_checkpoint_scorer, score_pairs
from training.evaluation import evaluate
from training.pairs import tokenize_pairs
from training.preferences import PreferencePair, read_pairs
from training.recipe import Recipe
from training.train import train

QUIET_PEFT = pytest.mark.filterwarnings("ignore:.*will be removed in v6:FutureWarning")


def silent(_: int) -> None:
    """No progress bar."""


def test_a_checkpoint_is_scored_as_the_service_scores(tmp_path: Path) -> None:
    """Accuracy and margin equal those of plain transformers on the same pairs; lengths are in tokens."""
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
    assert scored.chosen_lengths[0] == len(tokenizer(pairs[0].texts[0] + "<|im_end|>\n")["input_ids"]) - 1


def test_a_pair_that_is_too_long_is_left_out(tmp_path: Path) -> None:
    """A pair above the token limit has no reward, and the progress bar counts it all the same."""
    checkpoint = write_tiny_checkpoint(tmp_path)
    pairs = [PreferencePair("p", "word " * 2000, "no"), PreferencePair("p", "yes", "no")]
    counted: list[int] = []

    scored = score_pairs(pairs, load_checkpoint_scorer(checkpoint, truncation="error", num_threads=1), counted.append)

    assert scored.pairs == pairs[1:]
    assert (scored.failures, sum(counted)) == ({"The item has too many tokens": 1}, 4)


def test_the_reasons_of_missing_rewards_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Pairs that the chat template refuses are counted by reason, in the message and in the report; nothing is nan."""
    checkpoint = write_tiny_checkpoint(tmp_path / "model")
    refuse_system_messages(checkpoint)
    system = {"role": "system", "content": "Be brief."}
    refused = [row | {"prompt": [system, *row["prompt"]]} for row in polite_pairs(20)]
    ties = [row | {"chosen": row["rejected"]} for row in polite_pairs(20, seed=1)]
    options = ["--out", str(tmp_path / "out"), "--threads", "1"]

    too_few = main([str(checkpoint), str(write_pairs(tmp_path / "refused.jsonl", refused)), *options])
    assert too_few == 1
    message = capsys.readouterr().err
    assert "0 pairs have rewards, and 20 have none (20: The model's chat template" in message

    status = main([str(checkpoint), str(write_pairs(tmp_path / "pairs.jsonl", [*refused[:4], *ties])), *options])

    printed = capsys.readouterr().err
    assert status == 0
    assert "4 pairs have no reward: 4: The model's chat template" in printed
    assert "pairs.jsonl: 20 pairs of identical completions (not left out)" in printed
    assert "nan" not in printed
    written = json.loads((tmp_path / "out" / "audit.json").read_text())
    assert list(written["data"]["pairs_without_reward"].values()) == [4]
    assert written["data"]["pairs_of_identical_completions"] == 20
    html = (tmp_path / "out" / "audit.html").read_text()
    assert ">nan" not in html
    assert "nan%" not in html


@pytest.mark.parametrize("write", [write_tiny_checkpoint, write_tiny_bundle], ids=["checkpoint", "onnx-bundle"])
def test_an_audit_names_the_version_that_is_served(tmp_path: Path, write: Callable[[Path], object]) -> None:
    """A checkpoint and an ONNX bundle are audited by the engine that serves them, under the served version."""
    folder = tmp_path / "model"
    write(folder)
    scorer = load_checkpoint_scorer(folder, truncation="error", num_threads=1)

    (score,) = scorer.score([Exchange("Why?", "Because.")], silent)

    served = assemble(read_settings({"model": {"path": str(folder), "num_threads": 1}}))
    description = scorer.description()
    assert isinstance(score, ScoredCompletion)
    assert (description["name"], description["version"]) == (served.identity.name, served.identity.version)


def test_a_probe_is_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """With ``--probe`` terminal, JSON and page say how each edit moves the reward; without it the JSON has null."""
    checkpoint = write_tiny_checkpoint(tmp_path / "model")
    pairs = str(write_pairs(tmp_path / "pairs.jsonl", polite_pairs(20)))
    options = [str(checkpoint), pairs, "--threads", "1", "--out"]

    assert main([*options, str(tmp_path / "with"), "--probe", "--probe-completions", "5"]) == 0
    printed = capsys.readouterr().err
    assert main([*options, str(tmp_path / "without")]) == 0

    probe = json.loads((tmp_path / "with" / "audit.json").read_text())["probe"]
    assert probe["num_completions"] == 5
    assert {one["num_items"] for one in probe["effects"] if one["edit"] == "praise"} == {5}
    assert "It pays for: " in printed
    page = (tmp_path / "with" / "audit.html").read_text()
    assert all(one["description"] in page and one["description"] in printed for one in probe["effects"])
    assert json.loads((tmp_path / "without" / "audit.json").read_text())["probe"] is None


class Sized(FakeServer):
    """Reports the lengths of completions in tokens; the completion "13" has no reward."""

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


def test_a_service_is_scored_over_http() -> None:
    """Rewards and lengths are in order; an item without a reward excludes its pair and no other."""
    prompt = (Message("user", "why?"),)
    pairs = [PreferencePair(prompt, str(n + 1), str(n)) for n in range(20)]

    with running(Sized()) as world, RewardClient(world.url) as client:
        scorer = ServiceScorer(client)
        scored = score_pairs(pairs, scorer, silent)
        description = scorer.description()

    assert scored.failures == {"The forward pass failed on this item": 2}
    assert [pair.rejected for pair in scored.pairs] == [str(n) for n in range(20) if n not in {12, 13}]
    assert set(scored.gaps) == {1.0}
    assert scored.chosen_lengths[0] == 101
    assert description == {"name": "sized", "version": "v1", "architecture": "none"}


def test_without_token_counts_lengths_are_characters() -> None:
    """Where the service reports no lengths, characters are counted, for all pairs."""
    with running(FakeServer()) as world, RewardClient(world.url) as client:
        scored = score_pairs([PreferencePair("p", "100", "20")], ServiceScorer(client), silent)

    assert (scored.unit, scored.chosen_lengths.tolist(), scored.rejected_lengths.tolist()) == ("characters", [3], [2])


def test_the_command_writes_the_report_and_prints_the_conclusions(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """HTML, JSON and pictures are written; the terminal shows the conclusions and no text of the data."""
    checkpoint = write_tiny_checkpoint(tmp_path / "model")
    pairs = write_pairs(tmp_path / "pairs.jsonl", polite_pairs(30))
    training = write_pairs(tmp_path / "train.jsonl", [*polite_pairs(10), *polite_pairs(20, seed=1)])
    command = [str(checkpoint), str(pairs), "--out", str(tmp_path / "out"), "--train-pairs", str(training)]

    status = main([*command, "--max-train-pairs", "20", "--hide-texts", "--threads", "1"])

    printed = capsys.readouterr().err
    written = json.loads((tmp_path / "out" / "audit.json").read_text())
    assert status == 0
    assert "Measures mostly length: " in printed
    assert "Question 0-1" not in printed
    assert written["leakage"]["same_prompt"] == 10
    assert written["overtraining"]["num_train_pairs"] == 20
    assert written["data"]["files"][0]["name"] == "pairs.jsonl"
    assert (tmp_path / "out" / "audit.html").is_file()


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["no/such/model", "pairs.jsonl"], "There is no folder no/such/model"),
        (["model"], "Give files of held-out pairs"),
        ([".", "pairs.jsonl"], ". is not a checkpoint: it has no config.json"),
        (["model", "few.jsonl"], "There are 2 held-out pairs; an audit needs at least 20"),
        (["model", "pairs.jsonl", "--url", "127.0.0.1:9"], "must start with http:// or https://"),
        (["--url", "http://127.0.0.1:9", "missing.jsonl"], "missing.jsonl does not exist"),
        (
            ["--url", "http://127.0.0.1:9", "pairs.jsonl"],
            "No reward service answers at http://127.0.0.1:9 (connection",
        ),
        (["--url", "http://127.0.0.1:9/v1/score", "pairs.jsonl"], "Give the root URL of the service"),
    ],
    ids=["no-model", "no-pairs", "no-checkpoint", "few-pairs", "no-url", "no-file", "no-service", "no-root"],
)
def test_an_error_ends_the_command_with_one_sentence(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    complaint: str,
) -> None:
    """The exit status is 1, one sentence is printed, and no report is written."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(command, "START_WAIT_S", 0.1)
    write_pairs(tmp_path / "few.jsonl", polite_pairs(2))
    write_pairs(tmp_path / "pairs.jsonl", polite_pairs(20))
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")

    status = main([*arguments, "--out", "out"])

    assert status == 1
    assert complaint in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def train_tiny(folder: Path, rows: list[dict[str, object]]) -> Path:
    """Train a checkpoint on the rows and return its folder."""
    base = write_tiny_causal_lm(folder / "base")
    recipe = Recipe(
        lora_rank=8, learning_rate=1e-2, epochs=3, max_length=256, batch_pairs=8, hold_out_percent=0, dtype="fp32"
    )
    train([write_pairs(folder / "train.jsonl", rows)], str(base), folder / "adapter", recipe)
    return merge_adapter(folder / "adapter", folder / "model")


@QUIET_PEFT
@pytest.mark.slow
def test_a_model_trained_on_length_is_recognised(tmp_path: Path) -> None:
    """Trained on pairs whose longer answer is chosen and audited on balanced pairs, from files and over HTTP."""
    checkpoint = train_tiny(tmp_path, longer_wins_pairs(240))
    balanced = [*longer_wins_pairs(60, seed=1), *with_slips(longer_wins_pairs(60, seed=2), every=1)]
    pairs = write_pairs(tmp_path / "pairs.jsonl", balanced)

    from_folder = audit(load_checkpoint_scorer(checkpoint, truncation="error"), read_data([pairs]), tmp_path / "folder")
    with serving(tmp_path, "--model", str(checkpoint)) as server:
        status = main(["--url", server.url, str(pairs), "--out", str(tmp_path / "url")])

    from_url = json.loads((tmp_path / "url" / "audit.json").read_text())
    assert from_folder.length_bias.is_critical
    assert from_folder.accuracy.prefers_longer.low > 0.9
    assert status == 0
    assert from_url["accuracy"]["accuracy"]["value"] == from_folder.accuracy.accuracy.value
    assert {conclusion["question"]: conclusion["answer"] for conclusion in from_url["conclusions"]}[
        "Measures mostly length"
    ] == "yes"


@QUIET_PEFT
@pytest.mark.slow
def test_a_model_trained_on_shuffled_labels_is_at_chance(tmp_path: Path) -> None:
    """Nothing that is learned from random labels helps on other pairs, and the audit reports chance."""
    checkpoint = train_tiny(tmp_path, with_slips(polite_pairs(240), every=2))
    pairs = write_pairs(tmp_path / "pairs.jsonl", with_slips(polite_pairs(200, seed=1), every=2))

    found = audit(load_checkpoint_scorer(checkpoint, truncation="error"), read_data([pairs]), tmp_path / "out")

    assert found.accuracy.accuracy.low < 0.5 < found.accuracy.accuracy.high
