"""Models larger than one GPU (docs/scaling.md): tensor parallelism of transformers on two CPU ranks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tensor_parallel_rank

pytestmark = [pytest.mark.slow, pytest.mark.soak]

ROWS = [[1 + row * 10 + column for column in range(10)] for row in range(4)]


@pytest.mark.parametrize("architecture", ["Llama", "Qwen2"])
def test_two_ranks_give_the_rewards_of_one(tmp_path: Path, architecture: str) -> None:
    """A scalar-head classifier on two gloo ranks, half of each projection a rank, equals plain transformers to 1e-6."""
    import torch
    import transformers

    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = getattr(transformers, f"{architecture}Config")(
        vocab_size=64, num_hidden_layers=2, num_labels=1, pad_token_id=0, **sizes
    )
    torch.manual_seed(0)
    model = getattr(transformers, f"{architecture}ForSequenceClassification")(config).eval()
    model.save_pretrained(tmp_path / "model")
    with torch.inference_mode():
        expected = model(input_ids=torch.tensor(ROWS)).logits.flatten().tolist()
    rank = [tensor_parallel_rank.__file__, str(tmp_path / "model"), json.dumps(ROWS), str(tmp_path / "out.json")]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--local-addr", "127.0.0.1"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}

    subprocess.run([*launcher, "--nproc-per-node", "2", *rank], check=True, timeout=180, env=environment)

    found = json.loads((tmp_path / "out.json").read_text())
    assert found["rewards"] == pytest.approx(expected, abs=1e-6)
    projections = [name for name, _ in model.named_parameters() if "_proj.weight" in name]
    whole = dict(model.named_parameters())
    assert all(found["parameters"][name] * 2 == whole[name].numel() for name in projections)
