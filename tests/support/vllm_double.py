"""A server with vLLM's command line and ``/classify`` route, which scores with plain transformers.

Run as a program instead of an interpreter that has vLLM; its messages are those of vLLM 0.32.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
import uvicorn
from fastapi import FastAPI
from transformers import AutoModelForSequenceClassification, AutoTokenizer


def make_app(folder: Path, *, wrong_rewards: bool) -> FastAPI:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1, dtype=torch.float32).eval()
    app = FastAPI()

    @torch.inference_mode()
    def reward(text: str, *, add_special_tokens: bool) -> float:
        if wrong_rewards:
            return len(text) / 1000
        return model(**tokenizer(text, add_special_tokens=add_special_tokens, return_tensors="pt")).logits.item()

    @app.get("/health")
    def health() -> None:
        return None

    @app.post("/classify")
    def classify(request: dict[str, Any]) -> dict[str, Any]:
        assert request["use_activation"] is False
        rewards = [reward(text, add_special_tokens=request["add_special_tokens"]) for text in request["input"]]
        data = [
            {"index": index, "label": "LABEL_0", "probs": [one], "num_classes": 1} for index, one in enumerate(rewards)
        ]
        return {"object": "list", "data": data}

    return app


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--wrong-rewards", action="store_true")
    parser.add_argument("-m", dest="module", required=True)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--host", required=True)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--dtype", choices=["float32"], required=True)
    options, _ = parser.parse_known_args()
    app = make_app(options.model, wrong_rewards=options.wrong_rewards)
    uvicorn.run(app, host=options.host, port=options.port, log_level="warning")


if __name__ == "__main__":
    main()
