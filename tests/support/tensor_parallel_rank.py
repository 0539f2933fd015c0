"""One rank of a tensor-parallel classifier; ``torch.distributed.run`` starts it once for each rank."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path


def main() -> None:
    """Compute the rewards of a few sequences; rank 0 writes them, with the sizes of its part of each parameter."""
    import torch
    from transformers import AutoModelForSequenceClassification
    from transformers.distributed import DistributedConfig

    torch.set_num_threads(1)
    folder, rows, out = sys.argv[1:]
    plan = DistributedConfig(tp_plan="auto")
    model = AutoModelForSequenceClassification.from_pretrained(folder, distributed_config=plan, dtype=torch.float32)
    with torch.inference_mode():
        rewards = model.eval()(input_ids=torch.tensor(json.loads(rows))).logits.flatten().tolist()
    local = {
        name: (parameter.to_local() if hasattr(parameter, "to_local") else parameter).numel()
        for name, parameter in model.named_parameters()
    }
    if os.environ["RANK"] == "0":
        Path(out).write_text(json.dumps({"rewards": rewards, "parameters": local}))
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
