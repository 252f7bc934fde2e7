"""Reads the weights of an ONNX file: as much of Protocol Buffers' wire format as that takes, and no code of the file.

Field numbers: onnx/onnx.proto of https://github.com/onnx/onnx (ModelProto, GraphProto, TensorProto). Wire format:
https://protobuf.dev/programming-guides/encoding.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np

from ml.runtime.errors import ModelFileError

_GRAPH, _INITIALIZER = 7, 5  # of ModelProto, of GraphProto
_DIMS, _DATA_TYPE, _NAME, _RAW_DATA = 1, 2, 8, 9  # of TensorProto
_FLOAT = 1  # TensorProto.DataType
_VARINT, _FIXED64, _LENGTH, _FIXED32 = 0, 1, 2, 5  # wire types

Value = int | memoryview


def float_initializers(content: bytes) -> dict[str, np.ndarray]:
    """The float32 tensors that the graph holds as raw data, by name; they share the memory of `content`.

    Raises:
        ModelFileError: this is no ONNX file, or it is cut off.
    """
    try:
        return dict(_tensors(memoryview(content)))
    except (IndexError, ValueError) as error:
        raise ModelFileError("This is not an ONNX file, or it is damaged.") from error


def _tensors(model: memoryview) -> Iterator[tuple[str, np.ndarray]]:
    for graph in _messages(model, _GRAPH):
        for tensor in _messages(graph, _INITIALIZER):
            fields = list(_fields(tensor))
            if (_DATA_TYPE, _FLOAT) in fields:
                yield _named_array(fields)


def _named_array(fields: list[tuple[int, Value]]) -> tuple[str, np.ndarray]:
    known = dict(fields)
    shape = [size for number, value in fields if number == _DIMS for size in _integers(value)]
    values = np.frombuffer(_bytes(known.get(_RAW_DATA, memoryview(b""))), "<f4")
    if math.prod(shape) != len(values):
        raise ValueError("the tensor's shape and its data differ")
    return bytes(_bytes(known[_NAME])).decode(), values.reshape(shape)


def _integers(value: Value) -> list[int]:
    """One number, or several in one field ("packed")."""
    if isinstance(value, int):
        return [value]
    numbers, at = [], 0
    while at < len(value):
        number, at = _varint(value, at)
        numbers.append(number)
    return numbers


def _messages(message: memoryview, wanted: int) -> Iterator[memoryview]:
    return (_bytes(value) for number, value in _fields(message) if number == wanted)


def _bytes(value: Value) -> memoryview:
    if isinstance(value, int):
        raise ValueError("a number where bytes are expected")
    return value


def _fields(message: memoryview) -> Iterator[tuple[int, Value]]:
    """The fields of a message: (number, value), nested messages as bytes."""
    at = 0
    while at < len(message):
        tag, at = _varint(message, at)
        number, wire = tag >> 3, tag & 7
        if wire == _VARINT:
            value, at = _varint(message, at)
            yield number, value
        else:
            size, at = _size(message, at, wire)
            if at + size > len(message):
                raise ValueError("the message is cut off")
            yield number, message[at : at + size]
            at += size


def _size(message: memoryview, at: int, wire: int) -> tuple[int, int]:
    if wire == _LENGTH:
        return _varint(message, at)
    if wire in (_FIXED32, _FIXED64):
        return (4 if wire == _FIXED32 else 8), at
    raise ValueError("an unknown wire type")


def _varint(message: memoryview, at: int) -> tuple[int, int]:
    """The number at this place, seven bits a byte, lowest first, and the place behind it."""
    number = shift = 0
    while message[at] & 0x80:
        number |= (message[at] & 0x7F) << shift
        at, shift = at + 1, shift + 7
    return number | message[at] << shift, at + 1
