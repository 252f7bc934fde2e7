"""Weights out of ONNX files. Google's protobuf writes them here, by the field numbers of onnx.proto."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

from ml.runtime.errors import ModelFileError
from ml.runtime.onnx_file import float_initializers

FIELD = descriptor_pb2.FieldDescriptorProto
FLOAT, INT64 = 1, 7  # TensorProto.DataType


def _onnx(packed: bool) -> Any:
    """The class ModelProto, as far as these tests need it; real files carry `dims` one by one."""
    package = f"onnx{packed}"
    file = descriptor_pb2.FileDescriptorProto(name=f"{package}.proto", package=package)
    tensor, graph, model = (file.message_type.add(name=name) for name in ("Tensor", "Graph", "Model"))
    many, one = FIELD.LABEL_REPEATED, FIELD.LABEL_OPTIONAL
    dims = tensor.field.add(name="dims", number=1, type=FIELD.TYPE_INT64, label=many)
    dims.options.packed = packed
    tensor.field.add(name="data_type", number=2, type=FIELD.TYPE_INT32, label=one)
    tensor.field.add(name="name", number=8, type=FIELD.TYPE_STRING, label=one)
    tensor.field.add(name="raw_data", number=9, type=FIELD.TYPE_BYTES, label=one)
    tensor.field.add(name="scale", number=100, type=FIELD.TYPE_DOUBLE, label=one)  # unknown to us
    graph.field.add(name="name", number=2, type=FIELD.TYPE_STRING, label=one)
    graph.field.add(name="initializer", number=5, type=FIELD.TYPE_MESSAGE, label=many, type_name=f"{package}.Tensor")
    model.field.add(name="ir_version", number=1, type=FIELD.TYPE_INT64, label=one)
    model.field.add(name="share", number=101, type=FIELD.TYPE_FLOAT, label=one)
    model.field.add(name="graph", number=7, type=FIELD.TYPE_MESSAGE, label=one, type_name=f"{package}.Graph")
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return message_factory.GetMessageClass(pool.FindMessageTypeByName(f"{package}.Model"))


def _written(tensors: dict[str, np.ndarray], packed: bool = False) -> bytes:
    model = _onnx(packed)(ir_version=2**40, share=0.5)
    model.graph.name = "a graph" * 30
    for name, values in tensors.items():
        kind = FLOAT if values.dtype == np.float32 else INT64
        model.graph.initializer.add(
            dims=values.shape, data_type=kind, name=name, raw_data=values.tobytes(), scale=1.5
        )  # fmt: skip
    return bytes(model.SerializeToString())


TENSORS = {
    "layer/weight:0": np.arange(300 * 3 * 2, dtype=np.float32).reshape(300, 3, 2) / 7,
    "layer/bias:0": np.array([-1.5], dtype=np.float32),
    "a scalar": np.array(2.5, dtype=np.float32),
    "integers": np.arange(4),
}


@pytest.mark.parametrize("packed", [False, True])
def test_float_tensors_are_read_with_name_and_shape(packed: bool) -> None:
    found = float_initializers(_written(TENSORS, packed))
    assert found.keys() == TENSORS.keys() - {"integers"}
    for name, values in found.items():
        assert values.dtype == np.float32
        np.testing.assert_array_equal(values, TENSORS[name])


def test_a_file_that_is_cut_off_is_refused_wherever_it_ends() -> None:
    whole = _written(TENSORS)
    for end in range(11, len(whole), 97):  # behind the header's fields
        with pytest.raises(ModelFileError, match="not an ONNX file"):
            float_initializers(whole[:end])


@pytest.mark.parametrize("content", [b"\xff\xff", b"PK\x03\x04 a zip" * 9, b"\x0b\x01"])
def test_other_files_are_refused(content: bytes) -> None:
    with pytest.raises(ModelFileError):
        float_initializers(content)
