"""A plain reward server to compare the service with: FastAPI, transformers and padded batches.

It is what people write first, done correctly: one pydantic model an item, a queue from which up to sixteen items are
taken in arrival order, and one padded forward pass for each batch. It shares no code with the service.
"""

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import torch
import uvicorn
from fastapi import FastAPI
from pydantic import BaseModel
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from loadtest.peer_servers.item_batcher import ItemBatcher
from loadtest.peer_servers.rendering import adds_special_tokens, render


class Item(BaseModel):
    """A prompt and the completion that answers it."""

    prompt: str
    completion: str


class ScoreRequest(BaseModel):
    """The body of ``POST /v1/score``."""

    items: list[Item]


class PaddedScorer:
    """Runs transformers' classifier on padded batches.

    Args:
        folder: of the checkpoint.
        dtype: of weights and arithmetic.
    """

    def __init__(self, folder: Path, dtype: torch.dtype) -> None:
        self._tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="right")
        self._model = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1, dtype=dtype).eval()

    def render(self, item: Item) -> str:
        """Return the input text: the rendered chat template, or prompt and completion joined where there is none."""
        return render(self._tokenizer, item.prompt, item.completion)

    def score(self, items: list[Item]) -> list[float]:
        """Return the raw logit of each item, in order, from one forward pass padded to the longest."""
        batch = self._tokenizer(
            [self.render(item) for item in items],
            add_special_tokens=adds_special_tokens(self._tokenizer),
            padding=True,
            return_tensors="pt",
        )
        with torch.inference_mode():
            rewards: list[float] = self._model(**batch).logits[:, 0].float().tolist()
        return rewards


def make_app(scorer: PaddedScorer) -> FastAPI:
    """Return the application of a scorer; responses have the part of the service's wire format that is compared."""
    batcher = ItemBatcher(scorer.score)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        running = asyncio.create_task(batcher.run())
        yield
        running.cancel()

    app = FastAPI(lifespan=lifespan)

    @app.get("/readyz")
    async def ready() -> dict[str, bool]:
        return {"ready": True}

    @app.post("/v1/score")
    async def score(request: ScoreRequest) -> dict[str, list[dict[str, float]]]:
        rewards = await batcher.score(request.items)
        return {"results": [{"index": index, "reward": reward} for index, reward in enumerate(rewards)]}

    return app


def serve(folder: Path, port: int, dtype: str) -> None:
    """Load the model and serve it on loopback until a signal stops the process."""
    app = make_app(PaddedScorer(folder, getattr(torch, dtype)))
    uvicorn.run(app, host="127.0.0.1", port=port, log_level="warning")
