"""Rewrites a graph so that its matrix products with weights run in int8, with one activation scale per token.

ONNX Runtime's own dynamic quantization has one scale for the activations of a whole batch, so that a reward would
depend on the batch composition. Here every row of an activation and every column of a weight has its own scale; the
integer kernel is the same. A few channels of an activation are a hundred times larger than the rest and would use most
of the eight bits, so a part of their magnitude is moved into the weights first (SmoothQuant, Xiao et al., arXiv
2211.10438, equation 4).
"""

from __future__ import annotations

import tempfile
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import NodeProto, TensorProto, helper, numpy_helper

from service.checkpoints.bundle import GRAPH_DATA_FILE, GRAPH_FILE
from service.engines.onnx import Feed
from service.engines.onnx_session import session_options

MICROSOFT_DOMAIN = "com.microsoft"
MIN_SCALE = 1e-12
"""Lower limit of a scale, so that a row of zeros is not divided by zero."""
MIN_COLUMNS = 16
"""Weights with fewer columns are not quantized, in particular the scalar head."""
MAX_INT8 = 127
"""Largest quantized weight. Weights of seven bits would not saturate on CPUs without VNNI, but lower the demo model's
rank correlation from 0.984 to 0.968. Instead the engine selects ONNX Runtime's mode without saturation there
(``session_options``)."""
MIGRATION_STRENGTH = 0.65
"""SmoothQuant's migration strength alpha: the exponent of the activation's magnitudes; 0 moves nothing."""


def quantize_graph(folder: Path, feeds: Iterable[Feed]) -> int:
    """Quantize the graph in the folder to int8, in place, and return how many matrix products were replaced.

    Args:
        folder: holds the graph, in fp32.
        feeds: inputs of the graph, on which channel magnitudes are measured; one text each, because padding would be
            measured too.
    """
    magnitudes = channel_magnitudes(folder, feeds)
    model = onnx.load(folder / GRAPH_FILE)
    rewriter = _Int8Rewriter(model.graph, magnitudes)
    count = rewriter.run()
    if all(imported.domain != MICROSOFT_DOMAIN for imported in model.opset_import):
        model.opset_import.append(helper.make_opsetid(MICROSOFT_DOMAIN, 1))
    has_external_data = (folder / GRAPH_DATA_FILE).is_file()
    for file in (GRAPH_FILE, GRAPH_DATA_FILE):
        (folder / file).unlink(missing_ok=True)
    onnx.save(model, folder / GRAPH_FILE, save_as_external_data=has_external_data, location=GRAPH_DATA_FILE)
    return count


def quantize_weight(weight: NDArray[np.float32]) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Return the weight [in, out] as integers from -127 to 127, and the scale of each column [out]."""
    scale = np.maximum(np.abs(weight).max(axis=0) / MAX_INT8, MIN_SCALE).astype(np.float32)
    return np.rint(weight / scale).astype(np.int8), scale


def smoothing_factors(activation: NDArray[np.float32], weight: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return the factors that divide the channels of an activation and multiply the rows of its weights, float32 [in].

    Args:
        activation: the largest measured magnitude of each channel, [in].
        weight: the largest magnitude of the weights that each channel is multiplied with, [in].
    """
    moved = np.maximum(activation, MIN_SCALE) ** MIGRATION_STRENGTH / np.maximum(weight, MIN_SCALE) ** (
        1 - MIGRATION_STRENGTH
    )
    # A channel that was zero in all measured texts is not scaled.
    return np.where((activation > 0) & (weight > 0), moved, 1.0).astype(np.float32)


def channel_magnitudes(folder: Path, feeds: Iterable[Feed]) -> dict[str, NDArray[np.float32]]:
    """Return the largest magnitude of each channel of the activations that are multiplied with weights, by name."""
    import onnxruntime

    model = onnx.load(folder / GRAPH_FILE)
    names = list(dict.fromkeys(node.input[0] for node in _products(model.graph, _initializers(model.graph))))
    del model.graph.output[:]
    model.graph.output.extend(helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in names)
    magnitudes: dict[str, NDArray[np.float32]] = {}
    with tempfile.TemporaryDirectory(dir=folder.parent) as work_dir:
        instrumented = Path(work_dir) / GRAPH_FILE
        onnx.save(model, instrumented, save_as_external_data=(folder / GRAPH_DATA_FILE).is_file())
        session = onnxruntime.InferenceSession(instrumented, session_options(None), providers=["CPUExecutionProvider"])
        inputs = {graph_input.name for graph_input in session.get_inputs()}
        for feed in feeds:
            for name, values in zip(names, session.run(names, {key: feed[key] for key in inputs}), strict=True):
                seen = np.abs(values.reshape(-1, values.shape[-1])).max(axis=0)
                magnitudes[name] = np.maximum(magnitudes.get(name, 0.0), seen)
    return magnitudes


def _initializers(graph: onnx.GraphProto) -> dict[str, TensorProto]:
    return {tensor.name: tensor for tensor in graph.initializer}


def _products(graph: onnx.GraphProto, weights: Mapping[str, TensorProto]) -> list[NodeProto]:
    """Return the matrix products that are quantized: those with a weight of enough columns."""
    return [
        node
        for node in graph.node
        if node.op_type == "MatMul"
        and (weight := weights.get(node.input[1])) is not None
        and weight.data_type == TensorProto.FLOAT
        and len(weight.dims) == 2
        and weight.dims[1] >= MIN_COLUMNS
    ]


class _Int8Rewriter:
    """Rewrites one graph from fp32 to int8."""

    def __init__(self, graph: onnx.GraphProto, magnitudes: Mapping[str, NDArray[np.float32]]) -> None:
        self._graph = graph
        self._magnitudes = magnitudes
        self._weights = _initializers(graph)
        self._constants: dict[str, TensorProto] = {}
        self._nodes: list[NodeProto] = []
        self._smoothing: dict[str, NDArray[np.float32]] = {}

    def run(self) -> int:
        """Rewrite the graph in place; return how many matrix products were replaced."""
        products = _products(self._graph, self._weights)
        outputs = {node.output[0] for node in products}
        weights_of: dict[str, list[str]] = defaultdict(list)
        for node in products:
            weights_of[node.input[0]].append(node.input[1])
        for node in self._graph.node:
            if node.output and node.output[0] in outputs:
                self._quantize_rows(node.input[0], weights_of[node.input[0]])
                self._replace(node)
            else:
                self._nodes.append(node)
        self._write_back()
        return len(products)

    def _replace(self, node: NodeProto) -> None:
        """Replace x @ w by the product of quantized rows and a quantized weight, rescaled by both scales."""
        x, name = node.input
        result = node.output[0]
        weight, prefix = numpy_helper.to_array(self._weights[name]), f"{result}.weight"
        integers, scale = quantize_weight(weight * self._smoothing[x][:, None])
        self._add_constant(f"{prefix}.int8", integers)
        self._add_constant(f"{prefix}.scale", scale)
        # One zero point per weight: without VNNI ONNX Runtime converts each weight and its zero point to uint8, and
        # cannot convert a shared zero point twice.
        self._add_constant(f"{prefix}.zero", np.asarray(np.int8(0)))
        self._add_node(
            "MatMulIntegerToFloat",
            [
                f"{x}.int8",
                f"{prefix}.int8",
                self._shared_constant("one", np.float32(1)),
                f"{prefix}.scale",
                self._shared_constant("middle", np.uint8(128)),
                f"{prefix}.zero",
            ],
            f"{result}.unscaled",
            domain=MICROSOFT_DOMAIN,
        )
        self._add_node("Mul", [f"{result}.unscaled", f"{x}.scale_column"], f"{result}.rows")
        num_out = weight.shape[1]
        width = self._shared_constant(f"width_{num_out}", np.array([num_out], dtype=np.int64))
        self._add_node("Concat", [f"{x}.leading", width], f"{result}.shape", axis=0)
        self._add_node("Reshape", [f"{result}.rows", f"{result}.shape"], result)

    def _quantize_rows(self, x: str, weights: Sequence[str]) -> None:
        """Smooth x and quantize its rows to uint8 around 128, once for all weights that it is multiplied with."""
        if x in self._smoothing:
            return
        rows = [np.abs(numpy_helper.to_array(self._weights[name])).max(axis=1) for name in weights]
        self._smoothing[x] = smoothing_factors(self._magnitudes[x], np.max(rows, axis=0))
        num_in = len(self._smoothing[x])
        self._add_constant(f"{x}.smoothing", 1 / self._smoothing[x])
        as_rows = self._shared_constant(f"rows_of_{num_in}", np.array([-1, num_in], dtype=np.int64))
        axis = self._shared_constant("axis_1", np.array([1], dtype=np.int64))
        self._add_node("Reshape", [x, as_rows], f"{x}.rows_in")
        self._add_node("Mul", [f"{x}.rows_in", f"{x}.smoothing"], f"{x}.smooth")
        self._add_node("Abs", [f"{x}.smooth"], f"{x}.magnitudes")
        self._add_node("ReduceMax", [f"{x}.magnitudes", axis], f"{x}.largest", keepdims=0)
        self._add_node("Mul", [f"{x}.largest", self._shared_constant("step", np.float32(1 / 127))], f"{x}.raw_scale")
        self._add_node(
            "Max", [f"{x}.raw_scale", self._shared_constant("smallest", np.float32(MIN_SCALE))], f"{x}.scale"
        )
        self._add_node("Shape", [f"{x}.scale"], f"{x}.num_rows")
        middle = helper.make_tensor("value", TensorProto.UINT8, [1], [128])
        self._add_node("ConstantOfShape", [f"{x}.num_rows"], f"{x}.middles", value=middle)
        self._add_node("QuantizeLinear", [f"{x}.smooth", f"{x}.scale", f"{x}.middles"], f"{x}.int8", axis=0)
        self._add_node("Unsqueeze", [f"{x}.scale", axis], f"{x}.scale_column")
        self._add_node("Shape", [x], f"{x}.leading", start=0, end=-1)

    def _shared_constant(self, name: str, value: NDArray[np.generic] | np.generic) -> str:
        self._add_constant(f"int8.{name}", np.asarray(value))
        return f"int8.{name}"

    def _add_constant(self, name: str, value: NDArray[np.generic]) -> None:
        if name not in self._constants:
            self._constants[name] = numpy_helper.from_array(value, name)

    def _add_node(
        self, operator: str, inputs: list[str], output: str, *, domain: str = "", **attributes: object
    ) -> None:
        name = f"{output}/{operator}"
        self._nodes.append(helper.make_node(operator, inputs, [output], name=name, domain=domain, **attributes))

    def _write_back(self) -> None:
        used = {name for node in self._nodes for name in node.input}
        remaining = [tensor for name, tensor in self._weights.items() if name in used]
        self._replace_all(self._graph.node, self._nodes)
        self._replace_all(self._graph.initializer, [*remaining, *self._constants.values()])

    @staticmethod
    def _replace_all(field: object, values: Collection[object]) -> None:
        del field[:]  # type: ignore[attr-defined]  # a repeated field of a protocol buffer
        field.extend(values)  # type: ignore[attr-defined]
