"""OpenVINO graphs of torch layers: uint8 pictures in, float32 out, with the normalization inside; quantization to int8.

int8 is requested by a FakeQuantize node on the input of a convolution or matrix product, and by weights that are int8
times a step size; OpenVINO's CPU plugin fuses these into an integer product. Inputs have one range per tensor, weights
one per output channel (Krishnamoorthi 2018, "Quantizing deep convolutional networks for efficient inference"). The
first convolution, which sees the picture, and the last product, which computes the logits, are not quantized: their
rounding would do the most harm, and they are about a hundredth of the work.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from ml.image.engines import openvino_import
from ml.image.networks.feature_descriptor import HeadWithDescriptor
from ml.image.pixels.transforms import Transform

Ranges = Sequence[tuple[float, float]]
"""The range of the input of each quantized layer, (lowest, highest), in the order of the graph."""
_RANGE_BATCH = 4  # pictures; see ml.image.engines.backends.SMALL_BATCH


def graph_of(layers: nn.Sequential, transform: Transform) -> Any:
    """An `openvino.Model` of the layers: uint8 [n, height, width, 3] → float32 [n, …].

    If it ends in a `HeadWithDescriptor` it has two outputs, logits and descriptor. After a Concat, a bf16 network would
    round the logits to bf16 as well.
    """
    leaves = list(_leaves(layers))
    graph = _build(leaves, transform) if all(map(_can_build, leaves)) else _trace(layers, transform)
    if not any(isinstance(leaf, HeadWithDescriptor) for leaf in leaves):
        return graph
    concat = graph.get_results()[0].input_value(0).get_node()
    return openvino_import.openvino().Model(concat.input_values(), graph.get_parameters(), "network")


# --- layers to nodes -------------------------------------------------------------------------------------------------


def _leaves(module: nn.Module) -> Iterator[nn.Module]:
    if isinstance(module, nn.Sequential):
        for child in module:
            yield from _leaves(child)
    else:
        yield module


def _can_build(layer: nn.Module) -> bool:
    if isinstance(layer, HeadWithDescriptor):
        return all(map(_can_build, _leaves(layer.head)))
    kinds = nn.Conv2d | nn.ReLU | nn.MaxPool2d | nn.AdaptiveAvgPool2d | nn.Flatten | nn.Linear | nn.Dropout
    return isinstance(layer, kinds)


def _build(layers: Sequence[nn.Module], transform: Transform) -> Any:
    """VGG16's graph, layer by layer, on torch's memory. Tracing would take 3 s and a second copy of the weights."""
    ov = openvino_import.openvino()
    from openvino import opset15 as op

    images = op.parameter([-1, transform.height, transform.width, 3], ov.Type.u8, name="images")
    node = op.transpose(op.convert(images, "f32"), np.array([0, 3, 1, 2]))
    mean, std = (255 * np.array(values, np.float32).reshape(1, 3, 1, 1) for values in (transform.mean, transform.std))
    node = op.divide(op.subtract(node, op.constant(mean)), op.constant(std))
    for layer in layers:
        node = _build_layer(op, layer, node)
    return ov.Model([node], [images], "network")


def _build_layer(op: Any, layer: nn.Module, node: Any) -> Any:
    if isinstance(layer, nn.Conv2d):
        weight, bias = layer.weight.detach().numpy(), layer.bias.detach().numpy()  # type: ignore[union-attr]
        node = op.convolution(node, op.constant(weight, shared_memory=True), [1, 1], [1, 1], [1, 1], [1, 1])
        return op.add(node, op.constant(bias.reshape(1, -1, 1, 1)))
    if isinstance(layer, nn.Linear):
        weight = op.constant(layer.weight.detach().numpy(), shared_memory=True)
        product = op.matmul(node, weight, False, True)
        return op.add(product, op.constant(layer.bias.detach().numpy().reshape(1, -1)))
    if isinstance(layer, nn.ReLU):
        return op.relu(node)
    if isinstance(layer, nn.MaxPool2d):
        return op.max_pool(node, [2, 2], [1, 1], [0, 0], [0, 0], [2, 2]).output(0)
    if isinstance(layer, nn.Flatten):
        return op.reshape(node, np.array([0, -1]), True)
    if isinstance(layer, nn.Dropout):
        return node
    if isinstance(layer, HeadWithDescriptor):
        return _build_head(op, layer, node)
    side = int(layer.output_size)  # type: ignore[arg-type]
    output = node if hasattr(node, "get_partial_shape") else node.output(0)
    sides = [output.get_partial_shape()[axis].get_length() for axis in (2, 3)]
    return node if sides == [side, side] else op.adaptive_avg_pool(node, op.constant(np.array([side, side])))


def _build_head(op: Any, layer: HeadWithDescriptor, features: Any) -> Any:
    logits = features
    for leaf in _leaves(layer.head):
        logits = _build_layer(op, leaf, logits)
    maps = op.reshape(features, np.array([0, layer.maps, -1]), True)
    return op.concat([logits, op.reduce_mean(maps, np.array([2]))], 1)


def _trace(layers: nn.Sequential, transform: Transform) -> Any:
    """The graph of any other network, by OpenVINO's frontend for torch; takes some seconds.

    `openvino.convert_model` does the same, but sends telemetry (see ml.image.engines.openvino_import).
    """
    ov = openvino_import.openvino()
    from openvino.frontend import FrontEndManager
    from openvino.frontend.pytorch.ts_decoder import TorchScriptPythonDecoder

    example = torch.zeros(2, 3, transform.height, transform.width)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter(
            "ignore"
        )  # tracing warns about shapes that become constants, but they are the same for every picture
        reader, module = (
            FrontEndManager().load_by_framework("pytorch"),
            TorchScriptPythonDecoder(layers, example_input=example),
        )
        model = reader.convert(reader.load(module))
    model.reshape([-1, 3, transform.height, transform.width])
    steps = ov.preprocess.PrePostProcessor(model)
    steps.input().tensor().set_element_type(ov.Type.u8).set_layout(ov.Layout("NHWC"))
    steps.input().model().set_layout(ov.Layout("NCHW"))
    mean, std = ([255 * value for value in values] for values in (transform.mean, transform.std))
    steps.input().preprocess().convert_element_type(ov.Type.f32).mean(mean).scale(std)
    return steps.build()


# --- int8 ------------------------------------------------------------------------------------------------------------


def activation_ranges(graph: Any, pictures: np.ndarray) -> Ranges:
    """The input range of each layer that `quantize` changes, from pictures uint8 [n, height, width, 3].

    It is the mean of the pictures' minima and maxima, so that an unusual picture does not make all others coarser.
    """
    ov = openvino_import.openvino()
    from openvino import opset15 as op

    ends = []
    for node in _products(graph):
        values = node.input_value(0)
        axes = np.arange(1, values.get_partial_shape().rank.get_length())
        ends += [op.reduce_min(values, axes), op.reduce_max(values, axes)]
    compiled = ov.Core().compile_model(ov.Model(ends, graph.get_parameters(), "ranges"), "CPU")
    parts = []
    for start in range(0, len(pictures), _RANGE_BATCH):
        found = compiled({0: np.ascontiguousarray(pictures[start : start + _RANGE_BATCH])})
        parts.append(np.stack([found[output].reshape(-1) for output in compiled.outputs], axis=1))
    means = np.concatenate(parts).mean(axis=0).reshape(-1, 2)
    return [(float(low), float(high)) for low, high in means]


def quantize(graph: Any, ranges: Ranges) -> None:
    """Quantize the graph to int8, in place. ValueError if `ranges` belong to another graph."""
    from openvino import opset15 as op

    products = _products(graph)
    if len(products) != len(ranges):
        raise ValueError(f"{len(ranges)} ranges for {len(products)} products")
    for node, (low, high) in zip(products, ranges, strict=True):
        ends = _quantized_range(low, high)
        inputs = op.fake_quantize(node.input_value(0), *(op.constant(np.float32(end)) for end in ends * 2), 256)
        steps, size = _quantized_weights(node)
        # Float weights with a FakeQuantize would do too, but the plugin takes 3 s to convert those of VGG16.
        weights = op.multiply(op.convert(op.constant(steps), "f32"), op.constant(size))
        node.input(0).replace_source_output(inputs.output(0))
        node.input(1).replace_source_output(weights.output(0))
    graph.validate_nodes_and_infer_types()


def _quantized_weights(node: Any) -> tuple[np.ndarray, np.ndarray]:
    """A layer's weights as int8, and the step size of each output channel; their product is the rounded weights."""
    with warnings.catch_warnings():
        warnings.simplefilter(
            "ignore"
        )  # the memory is read-only, which torch warns about; torch is four times as fast as numpy here
        weights = torch.from_numpy(node.input_value(1).get_node().data)
    size = weights.abs().amax(dim=_inner_axes(node), keepdim=True).clamp_min(1e-30) / 127
    return (weights / size).round_().to(torch.int8).numpy(), size.numpy()


def _quantized_range(low: float, high: float) -> tuple[float, float]:
    """The ends of 256 even steps: from 0 if nothing is negative, else those of a signed byte."""
    if low >= 0:
        return 0.0, max(high, 1e-12)
    largest = max(-low, high, 1e-12)
    return -largest, largest * 127 / 128


def _products(graph: Any) -> list[Any]:
    """Convolutions and matrix products with constant weights, except for the first and the last one."""
    kinds = ("Convolution", "GroupConvolution", "MatMul")
    found = [node for node in graph.get_ordered_ops() if node.get_type_name() in kinds]
    return [node for node in found if node.input_value(1).get_node().get_type_name() == "Constant"][1:-1]


def _inner_axes(node: Any) -> tuple[int, ...]:
    """The axes of a layer's weights that do not belong to its outputs."""
    rank = len(node.input_value(1).get_node().data.shape)
    if node.get_type_name() == "MatMul":
        return (rank - 1,) if node.get_attributes()["transpose_b"] else (rank - 2,)
    return tuple(range(2 if node.get_type_name() == "GroupConvolution" else 1, rank))
