"""The int8 graph is close to its fp32 twin, keeps rows apart, and leaves alone what is not worth it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from export.onnx.quantization import MIGRATION, channel_sizes, quantize_graph, quantize_weight, smoothing
from service.checkpoints.bundle import GRAPH_DATA_FILE, GRAPH_FILE
from service.engines.onnx_session import session_options

DICE = np.random.default_rng(5)
WIDE = DICE.standard_normal((32, 48)).astype(np.float32)
ALSO_WIDE = DICE.standard_normal((32, 16)).astype(np.float32)
FEEDS = [{"x": DICE.standard_normal((1, 6, 32)).astype(np.float32)} for _ in range(3)]
NARROW = DICE.standard_normal((48, 1)).astype(np.float32)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Holds a graph with two wide multiplications of one input, and a head of one column."""
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", "length", 32])
    outputs = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", "length", width])
        for name, width in (("a", 48), ("b", 16), ("head", 1))
    ]
    nodes = [
        helper.make_node("MatMul", ["x", "wide"], ["a"]),
        helper.make_node("MatMul", ["x", "also_wide"], ["b"]),
        helper.make_node("MatMul", ["a", "narrow"], ["head"]),
    ]
    weights = [
        numpy_helper.from_array(weight, name)
        for name, weight in (("wide", WIDE), ("also_wide", ALSO_WIDE), ("narrow", NARROW))
    ]
    graph = helper.make_graph(nodes, "graph", [x], outputs, weights)
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=10), tmp_path / GRAPH_FILE
    )
    return tmp_path


def run(folder: Path, x: NDArray[np.float32]) -> list[NDArray[np.float32]]:
    session = onnxruntime.InferenceSession(
        folder / GRAPH_FILE, session_options(None), providers=["CPUExecutionProvider"]
    )
    outputs: list[NDArray[np.float32]] = session.run(["a", "b", "head"], {"x": x})
    return outputs


def texts(*shape: int) -> NDArray[np.float32]:
    return np.random.default_rng(6).standard_normal((*shape, 32)).astype(np.float32)


def operators(folder: Path) -> list[str]:
    return [node.op_type for node in onnx.load(folder / GRAPH_FILE).graph.node]


def test_products_stay_within_a_percent(folder: Path) -> None:
    """Eight bits per row and per column: the typical error is below two percent of the typical value."""
    x = texts(3, 7)

    assert quantize_graph(folder, FEEDS) == 2
    a, b, _ = run(folder, x)

    for product, exact in ((a, x @ WIDE), (b, x @ ALSO_WIDE)):
        assert np.sqrt(((product - exact) ** 2).mean()) < 0.02 * exact.std()


def test_the_graph_is_the_same_without_vnni(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """ONNX Runtime's mode for CPUs without VNNI takes the graph and gives the same bits: integers do not round."""
    quantize_graph(folder, FEEDS)
    x = texts(3, 7)
    exact = run(folder, x)

    monkeypatch.setattr("service.engines.devices.device.multiplies_int8_exactly", lambda: False)

    for other, product in zip(run(folder, x), exact, strict=True):
        assert np.array_equal(other, product)


def test_a_row_does_not_depend_on_its_neighbours(folder: Path) -> None:
    """A neighbour a thousand times larger changes no bit, which one scale per batch could not promise."""
    quantize_graph(folder, FEEDS)
    x = texts(2, 5)
    alone = run(folder, x[:1])
    x[1] *= 1000

    for beside, own in zip(run(folder, x), alone, strict=True):
        assert np.array_equal(beside[:1], own)


def test_rows_of_zeros_stay_zero(folder: Path) -> None:
    """Nothing is divided by zero."""
    quantize_graph(folder, FEEDS)

    for product in run(folder, np.zeros((1, 2, 32), dtype=np.float32)):
        assert (product == 0).all()


def test_the_head_is_left_in_fp32_and_inputs_are_quantized_once(folder: Path) -> None:
    """A column or two are not worth the rounding; multiplications of the same input share its integers."""
    quantize_graph(folder, FEEDS)

    found = operators(folder)
    assert found.count("MatMul") == 1
    assert found.count("MatMulIntegerToFloat") == 2
    assert found.count("QuantizeLinear") == 1


def test_fp32_weights_do_not_remain(folder: Path) -> None:
    """What was replaced is gone from the file, else int8 would be larger than fp32."""
    quantize_graph(folder, FEEDS)

    names = {tensor.name for tensor in onnx.load(folder / GRAPH_FILE).graph.initializer}
    assert "narrow" in names
    assert not {"wide", "also_wide"} & names


def test_integers_use_their_range_and_no_more() -> None:
    """Each column's largest weight becomes the largest integer, and scales bring it back."""
    integers, scale = quantize_weight(WIDE)

    assert (np.abs(integers).max(axis=0) == 127).all()
    assert np.abs(integers * scale - WIDE).max() <= scale.max() / 2 + 1e-6


def test_weights_in_a_file_of_their_own_stay_there(folder: Path) -> None:
    """A graph too large for one file is still two files afterwards, and no stale weights remain."""
    model = onnx.load(folder / GRAPH_FILE)
    (folder / GRAPH_FILE).unlink()
    onnx.save(model, folder / GRAPH_FILE, save_as_external_data=True, location=GRAPH_DATA_FILE, size_threshold=0)
    exact = run(folder, texts(1, 4))[0]

    quantize_graph(folder, FEEDS)

    assert (folder / GRAPH_DATA_FILE).is_file()
    assert np.abs(run(folder, texts(1, 4))[0] - exact).max() < 0.2


def test_a_channel_that_towers_above_the_rest_spoils_nothing(folder: Path) -> None:
    """Its size moves into the weights, so that the others keep their bits: a third of the error that it would cost."""
    tower = np.ones(32, dtype=np.float32)
    tower[3] = 100.0
    x = texts(3, 7) * tower
    exact = run(folder, x)[0]

    quantize_graph(folder, [{"x": feed["x"] * tower} for feed in FEEDS])
    error = np.sqrt(((run(folder, x)[0] - exact) ** 2).mean())

    scale = np.abs(x).max(axis=-1, keepdims=True) / 127
    plain_error = np.sqrt((((np.rint(x / scale) * scale) @ WIDE - exact) ** 2).mean())
    assert error < plain_error / 3


def test_channels_are_measured_where_they_are_multiplied(folder: Path) -> None:
    """The largest magnitude over all texts and tokens, by the name of the activation; narrow weights do not count."""
    sizes = channel_sizes(folder, FEEDS)

    assert set(sizes) == {"x"}
    assert np.allclose(sizes["x"], np.abs(np.concatenate([feed["x"] for feed in FEEDS])).max(axis=(0, 1)))


def test_a_channel_that_was_never_seen_alive_keeps_its_size() -> None:
    """Nothing is known of it, so nothing is moved; of the others, the power that is to be moved."""
    factors = smoothing(np.array([0.0, 4.0, 9.0], dtype=np.float32), np.array([1.0, 1.0, 0.0], dtype=np.float32))

    assert factors.tolist() == pytest.approx([1.0, 4.0**MIGRATION, 1.0])
