"""Rewrites a graph so that its matrix multiplications with weights run in int8, each token scaled by itself.

ONNX Runtime's own dynamic quantization scales a whole batch by its largest number, so that a reward would depend on its
neighbours. Here every row of an activation has a scale of its own and every column of a weight too, with the same
integer kernel below. A few channels of an activation are a hundred times larger than the rest and would take all eight
bits, so part of their size is moved into the weights first (SmoothQuant, Xiao et al., arXiv 2211.10438, equation 4).
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

MICROSOFT = "com.microsoft"
SMALLEST_SCALE = 1e-12
"""A row of zeros has to be divided by something."""
NARROWEST = 16
"""Weights with fewer columns are left as they are: the head above all."""
LARGEST_INTEGER = 127
"""Of a quantized weight. Seven bits would serve CPUs without VNNI too, but lower the demo model's rank correlation from
0.984 to 0.968; there the engine lets ONNX Runtime multiply without saturation instead (``session_options``)."""
MIGRATION = 0.65
"""How much of a channel's size moves from the activation into the weights, as a power; 0 leaves it where it is."""


def quantize_graph(folder: Path, feeds: Iterable[Feed]) -> int:
    """Replace the graph in the folder by its int8 twin and return how many multiplications were replaced.

    Args:
        folder: holds the graph, in fp32.
        feeds: inputs of the graph, which show how large each channel gets; one text each, since filling counts too.
    """
    sizes = channel_sizes(folder, feeds)
    model = onnx.load(folder / GRAPH_FILE)
    rewriting = _Rewriting(model.graph, sizes)
    count = rewriting.run()
    if all(imported.domain != MICROSOFT for imported in model.opset_import):
        model.opset_import.append(helper.make_opsetid(MICROSOFT, 1))
    is_apart = (folder / GRAPH_DATA_FILE).is_file()
    for file in (GRAPH_FILE, GRAPH_DATA_FILE):
        (folder / file).unlink(missing_ok=True)
    onnx.save(model, folder / GRAPH_FILE, save_as_external_data=is_apart, location=GRAPH_DATA_FILE)
    return count


def quantize_weight(weight: NDArray[np.float32]) -> tuple[NDArray[np.int8], NDArray[np.float32]]:
    """Return the weight [in, out] as integers from -127 to 127, and the scale of each column [out]."""
    scale = np.maximum(np.abs(weight).max(axis=0) / LARGEST_INTEGER, SMALLEST_SCALE).astype(np.float32)
    return np.rint(weight / scale).astype(np.int8), scale


def smoothing(activation: NDArray[np.float32], weight: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return by how much to divide each channel of an activation, and multiply the rows of its weights, float32 [in].

    Args:
        activation: the largest magnitude that each channel was seen with, [in].
        weight: the largest magnitude in the rows that each channel is multiplied with, [in].
    """
    moved = np.maximum(activation, SMALLEST_SCALE) ** MIGRATION / np.maximum(weight, SMALLEST_SCALE) ** (1 - MIGRATION)
    # A channel that was never seen alive keeps its size.
    return np.where((activation > 0) & (weight > 0), moved, 1.0).astype(np.float32)


def channel_sizes(folder: Path, feeds: Iterable[Feed]) -> dict[str, NDArray[np.float32]]:
    """Return the largest magnitude of each channel of the activations that are multiplied with weights, by name."""
    import onnxruntime

    model = onnx.load(folder / GRAPH_FILE)
    names = list(dict.fromkeys(node.input[0] for node in _products(model.graph, _initializers(model.graph))))
    del model.graph.output[:]
    model.graph.output.extend(helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in names)
    sizes: dict[str, NDArray[np.float32]] = {}
    with tempfile.TemporaryDirectory(dir=folder.parent) as workplace:
        listening = Path(workplace) / GRAPH_FILE
        onnx.save(model, listening, save_as_external_data=(folder / GRAPH_DATA_FILE).is_file())
        session = onnxruntime.InferenceSession(listening, session_options(None), providers=["CPUExecutionProvider"])
        inputs = {graph_input.name for graph_input in session.get_inputs()}
        for feed in feeds:
            for name, values in zip(names, session.run(names, {key: feed[key] for key in inputs}), strict=True):
                seen = np.abs(values.reshape(-1, values.shape[-1])).max(axis=0)
                sizes[name] = np.maximum(sizes.get(name, 0.0), seen)
    return sizes


def _initializers(graph: onnx.GraphProto) -> dict[str, TensorProto]:
    return {tensor.name: tensor for tensor in graph.initializer}


def _products(graph: onnx.GraphProto, weights: Mapping[str, TensorProto]) -> list[NodeProto]:
    """Return the multiplications with a weight that are worth it."""
    return [
        node
        for node in graph.node
        if node.op_type == "MatMul"
        and (weight := weights.get(node.input[1])) is not None
        and weight.data_type == TensorProto.FLOAT
        and len(weight.dims) == 2
        and weight.dims[1] >= NARROWEST
    ]


class _Rewriting:
    """One graph on its way from fp32 to int8."""

    def __init__(self, graph: onnx.GraphProto, sizes: Mapping[str, NDArray[np.float32]]) -> None:
        self._graph = graph
        self._sizes = sizes
        self._weights = _initializers(graph)
        self._constants: dict[str, TensorProto] = {}
        self._nodes: list[NodeProto] = []
        self._smoothings: dict[str, NDArray[np.float32]] = {}

    def run(self) -> int:
        """Rewrite the graph in place; return how many multiplications were replaced."""
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
        self._settle()
        return len(products)

    def _replace(self, node: NodeProto) -> None:
        """Put in the place of x @ w: rows of x to integers, one integer product, and both scales on the way back."""
        x, name = node.input
        result = node.output[0]
        weight, own = numpy_helper.to_array(self._weights[name]), f"{result}.weight"
        integers, scale = quantize_weight(weight * self._smoothings[x][:, None])
        self._keep(f"{own}.int8", integers)
        self._keep(f"{own}.scale", scale)
        # One zero point per weight: without VNNI ONNX Runtime converts weights to uint8, but no zero point twice.
        self._keep(f"{own}.zero", np.asarray(np.int8(0)))
        self._add(
            "MatMulIntegerToFloat",
            [
                f"{x}.int8",
                f"{own}.int8",
                self._scalar("one", np.float32(1)),
                f"{own}.scale",
                self._scalar("middle", np.uint8(128)),
                f"{own}.zero",
            ],
            f"{result}.unscaled",
            domain=MICROSOFT,
        )
        self._add("Mul", [f"{result}.unscaled", f"{x}.scale_column"], f"{result}.rows")
        num_out = weight.shape[1]
        width = self._scalar(f"width_{num_out}", np.array([num_out], dtype=np.int64))
        self._add("Concat", [f"{x}.leading", width], f"{result}.shape", axis=0)
        self._add("Reshape", [f"{result}.rows", f"{result}.shape"], result)

    def _quantize_rows(self, x: str, weights: Sequence[str]) -> None:
        """Turn x into uint8 rows around 128, smoothed, once for all the weights that it is multiplied with."""
        if x in self._smoothings:
            return
        rows = [np.abs(numpy_helper.to_array(self._weights[name])).max(axis=1) for name in weights]
        self._smoothings[x] = smoothing(self._sizes[x], np.max(rows, axis=0))
        num_in = len(self._smoothings[x])
        self._keep(f"{x}.smoothing", 1 / self._smoothings[x])
        as_rows = self._scalar(f"rows_of_{num_in}", np.array([-1, num_in], dtype=np.int64))
        axis = self._scalar("axis_1", np.array([1], dtype=np.int64))
        self._add("Reshape", [x, as_rows], f"{x}.rows_in")
        self._add("Mul", [f"{x}.rows_in", f"{x}.smoothing"], f"{x}.smooth")
        self._add("Abs", [f"{x}.smooth"], f"{x}.magnitudes")
        self._add("ReduceMax", [f"{x}.magnitudes", axis], f"{x}.largest", keepdims=0)
        self._add("Mul", [f"{x}.largest", self._scalar("step", np.float32(1 / 127))], f"{x}.raw_scale")
        self._add("Max", [f"{x}.raw_scale", self._scalar("smallest", np.float32(SMALLEST_SCALE))], f"{x}.scale")
        self._add("Shape", [f"{x}.scale"], f"{x}.num_rows")
        middle = helper.make_tensor("value", TensorProto.UINT8, [1], [128])
        self._add("ConstantOfShape", [f"{x}.num_rows"], f"{x}.middles", value=middle)
        self._add("QuantizeLinear", [f"{x}.smooth", f"{x}.scale", f"{x}.middles"], f"{x}.int8", axis=0)
        self._add("Unsqueeze", [f"{x}.scale", axis], f"{x}.scale_column")
        self._add("Shape", [x], f"{x}.leading", start=0, end=-1)

    def _scalar(self, name: str, value: NDArray[np.generic] | np.generic) -> str:
        self._keep(f"int8.{name}", np.asarray(value))
        return f"int8.{name}"

    def _keep(self, name: str, value: NDArray[np.generic]) -> None:
        if name not in self._constants:
            self._constants[name] = numpy_helper.from_array(value, name)

    def _add(self, operator: str, inputs: list[str], output: str, *, domain: str = "", **attributes: object) -> None:
        name = f"{output}/{operator}"
        self._nodes.append(helper.make_node(operator, inputs, [output], name=name, domain=domain, **attributes))

    def _settle(self) -> None:
        used = {name for node in self._nodes for name in node.input}
        retained = [tensor for name, tensor in self._weights.items() if name in used]
        self._put(self._graph.node, self._nodes)
        self._put(self._graph.initializer, [*retained, *self._constants.values()])

    @staticmethod
    def _put(field: object, values: Collection[object]) -> None:
        del field[:]  # type: ignore[attr-defined]  # a repeated field of a protocol buffer
        field.extend(values)  # type: ignore[attr-defined]
