"""A plain server in front of a runtime of graphs: starlette, a queue of waiting items, and padded batches.

It has no diagnostics, no prefix cache and no packing, and imports nothing of the service. The model is a folder with
an ONNX graph that ``reward-export`` wrote (onnxruntime), or a checkpoint that is converted at the start (openvino).

    python -m loadtest.peer_servers.graph_server --runtime onnxruntime --model BUNDLE --port 8001 --dtype float32
"""

from __future__ import annotations

import argparse
import asyncio
import os
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route

from loadtest.peer_servers.item_batcher import ItemBatcher
from loadtest.peer_servers.padded_texts import Integers, PaddedTexts

GRAPH_FILE = "model.onnx"

PRECISIONS = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}
"""OpenVINO's names of dtypes."""

Item = Mapping[str, str]


class Scorer(Protocol):
    """Computes rewards of a batch of items."""

    def score(self, items: Sequence[Item]) -> list[float]:
        """Return the raw reward of each item, in order, from one forward pass padded to the longest."""
        ...


class OnnxScorer:
    """Runs an exported graph with ONNX Runtime in float32.

    Args:
        folder: of the graph and its tokenizer.
    """

    def __init__(self, folder: Path) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = len(os.sched_getaffinity(0))
        # Threads that spin after a pass would take the cores from the event loop and the load generator.
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.log_severity_level = 3
        self._session: Any = onnxruntime.InferenceSession(
            folder / GRAPH_FILE, options, providers=["CPUExecutionProvider"]
        )
        self._inputs = [one.name for one in self._session.get_inputs()]
        self._texts = PaddedTexts(folder)

    def score(self, items: Sequence[Item]) -> list[float]:
        """See `Scorer.score`."""
        ids, mask = self._texts.batch(items)
        feed = self._feed(ids, mask)
        (rewards,) = self._session.run(["reward"], {name: feed[name] for name in self._inputs})
        found: list[float] = rewards.tolist()
        return found

    def _feed(self, ids: Integers, mask: Integers) -> dict[str, Any]:
        positions = np.ascontiguousarray(np.broadcast_to(np.arange(ids.shape[1], dtype=np.int64), ids.shape))
        return {
            "input_ids": ids,
            "attention_mask": mask,
            "position_ids": positions,
            "pooled_position": self._texts.last_positions(ids),
            "mean_weights": mask.astype(np.float32),  # of the states of diagnostics, which the graph does not have
        }


class OpenVinoScorer:
    """Runs a classifier that optimum-intel converts for OpenVINO.

    Args:
        folder: of the checkpoint.
        dtype: of the arithmetic, where the processor has it.
    """

    def __init__(self, folder: Path, dtype: str) -> None:
        from optimum.intel import OVModelForSequenceClassification

        options = {"PERFORMANCE_HINT": "LATENCY", "INFERENCE_PRECISION_HINT": PRECISIONS[dtype]}
        self._model: Any = OVModelForSequenceClassification.from_pretrained(
            folder, export=True, load_in_8bit=False, ov_config=options
        )
        self._texts = PaddedTexts(folder)

    def score(self, items: Sequence[Item]) -> list[float]:
        """See `Scorer.score`."""
        ids, mask = self._texts.batch(items)
        logits = self._model(input_ids=ids, attention_mask=mask).logits
        rewards: list[float] = logits[:, 0].tolist()
        return rewards


def make_app(scorer: Scorer) -> Starlette:
    """Return the application of a scorer; responses have the part of the service's wire format that is compared."""
    batcher: ItemBatcher[Item] = ItemBatcher(scorer.score)

    @asynccontextmanager
    async def lifespan(_: Starlette) -> AsyncIterator[None]:
        running = asyncio.create_task(batcher.run())
        yield
        running.cancel()

    async def ready(_: Request) -> JSONResponse:
        return JSONResponse({"ready": True})

    async def score(request: Request) -> JSONResponse:
        rewards = await batcher.score((await request.json())["items"])
        return JSONResponse({"results": [{"index": index, "reward": reward} for index, reward in enumerate(rewards)]})

    routes = [Route("/readyz", ready), Route("/v1/score", score, methods=["POST"])]
    return Starlette(routes=routes, lifespan=lifespan)


def load_scorer(runtime: str, folder: Path, dtype: str) -> Scorer:
    """Return the scorer of a runtime, ``onnxruntime`` or ``openvino``."""
    return OnnxScorer(folder) if runtime == "onnxruntime" else OpenVinoScorer(folder, dtype)


def main() -> None:
    """Load the model and serve it on loopback until a signal stops the process."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--runtime", choices=("onnxruntime", "openvino"), required=True)
    parser.add_argument("--model", type=Path, required=True)
    parser.add_argument("--dtype", choices=list(PRECISIONS), required=True)
    parser.add_argument("--port", type=int, required=True)
    options = parser.parse_args()
    app = make_app(load_scorer(options.runtime, options.model, options.dtype))
    uvicorn.run(app, host="127.0.0.1", port=options.port, log_level="warning")


if __name__ == "__main__":
    main()
