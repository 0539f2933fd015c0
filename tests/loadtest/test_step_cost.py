"""Steps are read from states that are computed anyway: the passes compute and share the same tokens."""

from __future__ import annotations

from pathlib import Path

from tiny_models import write_tiny_checkpoint

from loadtest.step_cost import NUM_STEPS, measure, sequences_of_turn, with_steps
from service.checkpoints.configuration import read_config
from service.engines.torch import load_torch_engine
from service.settings import BatchingSettings, ModelSettings


def test_steps_compute_no_further_token(tmp_path: Path) -> None:
    """Items with 16 steps compute as many tokens as those with none, and take as many from the prefix cache."""
    folder = write_tiny_checkpoint(tmp_path, "llama")
    config = read_config(folder)
    engine = load_torch_engine(
        folder,
        ModelSettings.model_validate({"device": "cpu", "dtype": "float32", "num_threads": 1}),
        BatchingSettings(),
        pad_token_id=config.pad_token_id,
        max_input_tokens=512,
    )

    cost = measure(engine, config.vocab_size, num_turns=2)
    output = engine.forward(with_steps(sequences_of_turn(config.vocab_size, seed=99)))

    assert cost.computed_tokens[0] == cost.computed_tokens[1] > 0
    assert cost.cached_tokens[0] == cost.cached_tokens[1] > 0
    assert output.outputs is not None
    assert all(len(values) == NUM_STEPS + 1 for values in output.outputs)
