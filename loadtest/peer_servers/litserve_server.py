"""A reward server as LitServe's documentation writes one: a LitAPI around transformers, with its dynamic batching.

It imports LitServe, torch and transformers, and nothing of the service.

    python -m loadtest.peer_servers.litserve_server --model FOLDER --port 8001 --dtype bfloat16
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

import litserve
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from loadtest.peer_servers.item_batcher import MAX_BATCH_ITEMS
from loadtest.peer_servers.rendering import adds_special_tokens, render

BATCH_TIMEOUT_S = 0.005
"""For so long LitServe waits for further requests of a batch."""

DTYPES = ("float32", "bfloat16", "float16")


class RewardApi(litserve.LitAPI):  # type: ignore[misc]  # LitServe is in the peer's environment only
    """Scores requests that have one item or many.

    Args:
        folder: of the checkpoint.
        dtype: of weights and arithmetic.
    """

    def __init__(self, folder: Path, dtype: str) -> None:
        super().__init__(max_batch_size=MAX_BATCH_ITEMS, batch_timeout=BATCH_TIMEOUT_S)
        self._folder = folder
        self._dtype = dtype

    def setup(self, device: str) -> None:
        """Load tokenizer and model; LitServe calls it in the process that computes."""
        self._tokenizer: Any = AutoTokenizer.from_pretrained(self._folder, padding_side="right")
        model: Any = AutoModelForSequenceClassification.from_pretrained(
            self._folder, num_labels=1, dtype=getattr(torch, self._dtype)
        )
        self._model = model.eval().to(device)

    # LitServe makes the route's schema of the annotations of the next two methods; without any it reads plain JSON.

    def decode_request(self, request):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN201 - as above
        """Return the texts of the items of a request."""
        return [render(self._tokenizer, item["prompt"], item["completion"]) for item in request["items"]]

    def encode_response(self, output):  # type: ignore[no-untyped-def]  # noqa: ANN001, ANN201 - as above
        """Return the body of a response."""
        return {"rewards": output}

    def batch(self, requests: Sequence[list[str]]) -> list[list[str]]:
        """Return the texts of several requests, which remain apart."""
        return list(requests)

    def predict(self, requests: Sequence[list[str]]) -> list[list[float]]:
        """Return the rewards of each request; texts share forward passes whatever their request is."""
        texts = [text for request in requests for text in request]
        starts = range(0, len(texts), MAX_BATCH_ITEMS)
        rewards = [reward for start in starts for reward in self._forward(texts[start : start + MAX_BATCH_ITEMS])]
        ends = list(accumulate(map(len, requests)))
        return [rewards[begin:end] for begin, end in zip([0, *ends], ends, strict=False)]

    def unbatch(self, output: list[list[float]]) -> list[list[float]]:
        """Return the rewards of each request."""
        return output

    @torch.inference_mode()
    def _forward(self, texts: list[str]) -> list[float]:
        batch = self._tokenizer(
            texts, add_special_tokens=adds_special_tokens(self._tokenizer), padding=True, return_tensors="pt"
        )
        rewards: list[float] = self._model(**batch.to(self._model.device)).logits[:, 0].float().tolist()
        return rewards


def main() -> None:
    """Serve the model on loopback until a signal stops the process."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--dtype", choices=DTYPES, required=True)
    parser.add_argument("--port", type=int, required=True)
    options = parser.parse_args()
    api = RewardApi(options.model, options.dtype)
    server = litserve.LitServer(api, accelerator="cpu", workers_per_device=1, timeout=False)
    server.run(host="127.0.0.1", port=options.port, log_level="warning", generate_client_file=False)


if __name__ == "__main__":
    main()
