"""The fp32 matrix products of CPU libraries behind one interface: states [rows, in] by a weight [out, in]."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import numpy as np
import torch

from service.engines.kernels.choice import kernels_for
from service.errors import StartupError

Product: TypeAlias = Callable[[torch.Tensor], torch.Tensor]
"""Multiplies contiguous states [rows, in]: [rows, out]."""

Library: TypeAlias = Callable[[torch.Tensor, int], Product]
"""Prepares the product with a weight [out, in] for a number of rows."""

BASELINE = "torch, MKL"


class LibraryMissing(StartupError):
    """This environment does not have the library; the message states what is missing."""


def torch_mkl(weight: torch.Tensor, _num_rows: int) -> Product:
    """Torch's own linear layer, as transformers calls it."""
    return lambda states: torch.nn.functional.linear(states, weight)


def torch_mkl_packed(weight: torch.Tensor, num_rows: int) -> Product:
    """MKL on a weight that is packed for one number of rows."""
    packed = torch.ops.mkl._mkl_reorder_linear_weight(weight, num_rows)  # noqa: SLF001 - torch has no public name
    multiply = torch.ops.mkl._mkl_linear  # noqa: SLF001 - as above
    return lambda states: multiply(states, packed, weight, None, num_rows)


def torch_onednn_packed(weight: torch.Tensor, num_rows: int) -> Product:
    """The product of oneDNN on a packed weight."""
    packed = torch.ops.mkldnn._reorder_linear_weight(weight, num_rows)  # noqa: SLF001 - torch has no public name
    multiply = torch.ops.mkldnn._linear_pointwise  # noqa: SLF001 - as above
    return lambda states: multiply(states, packed, None, "none", [], "")


def onnx_runtime(weight: torch.Tensor, num_rows: int) -> Product:
    """MLAS, through a graph of one MatMul whose weight is constant, so that it is packed."""
    try:
        import onnxruntime
        from onnx import TensorProto, helper, numpy_helper
    except ImportError as error:
        raise LibraryMissing(f"{error.name} is not installed") from None
    out_features, in_features = weight.shape
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["states", "weight"], ["product"])],
        "product",
        [helper.make_tensor_value_info("states", TensorProto.FLOAT, ["rows", in_features])],
        [helper.make_tensor_value_info("product", TensorProto.FLOAT, ["rows", out_features])],
        [numpy_helper.from_array(weight.T.contiguous().numpy(), "weight")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # it would slow the others down
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    output = torch.empty(num_rows, out_features)

    def multiply(states: torch.Tensor) -> torch.Tensor:
        binding: Any = session.io_binding()
        binding.bind_input("states", "cpu", 0, np.float32, tuple(states.shape), states.data_ptr())
        binding.bind_output("product", "cpu", 0, np.float32, tuple(output.shape), output.data_ptr())
        session.run_with_iobinding(binding)
        return output

    return multiply


def numpy_blas(weight: torch.Tensor, num_rows: int) -> Product:
    """The BLAS of numpy: OpenBLAS in numpy's own wheels, on all cores unless OPENBLAS_NUM_THREADS says otherwise."""
    transposed, output = weight.numpy().T, torch.empty(num_rows, weight.shape[0])

    def multiply(states: torch.Tensor) -> torch.Tensor:
        np.matmul(states.numpy(), transposed, out=output.numpy())
        return output

    return multiply


def own_kernels(weight: torch.Tensor, _num_rows: int) -> Product:
    """The packed linear layer of this project's CPU kernels."""
    kernels, reason = kernels_for("auto", torch.device("cpu"), torch.float32)
    if kernels is None:
        raise LibraryMissing(reason)
    packed = kernels.pack_weight(weight)
    return lambda states: kernels.linear(states, packed)


LIBRARIES: Mapping[str, Library] = {
    BASELINE: torch_mkl,
    "torch, MKL, packed": torch_mkl_packed,
    "torch, oneDNN, packed": torch_onednn_packed,
    "ONNX Runtime (MLAS)": onnx_runtime,
    "numpy (OpenBLAS)": numpy_blas,
    "CPU kernels of this project": own_kernels,
}
