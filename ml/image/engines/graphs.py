"""Layers of torch as a graph of OpenVINO: uint8 pictures in, float32 out, the normalization inside; and its int8 form.

int8 is asked for by a FakeQuantize node on what comes into a convolution or a matrix product, and by weights that are
int8 times the size of a step. OpenVINO's CPU plugin takes the two for an integer product. What comes in keeps one range
for the whole tensor, the weights one for each output channel (Krishnamoorthi 2018, "Quantizing deep convolutional
networks for efficient inference"). The first convolution sees the picture and the last product makes the logits: both
stay as they are, since their rounding would cost most and their work is about a hundredth.
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
"""Lowest and highest value that comes into each layer that is quantized, in the order of the graph."""
_SEEN_AT_ONCE = 4  # pictures; see ml.image.engines.backends.SMALL_BATCH


def graph_of(layers: nn.Sequential, transform: Transform) -> Any:
    """An `openvino.Model` of the layers: uint8 [n, height, width, 3] → float32 [n, …].

    With a `HeadWithDescriptor` at the end it has two outputs, logits and descriptor: behind a Concat the logits would be rounded
    to bf16 wherever the network is.
    """
    leaves = list(_leaves(layers))
    graph = _written(leaves, transform) if all(map(_can_be_written, leaves)) else _traced(layers, transform)
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


def _can_be_written(layer: nn.Module) -> bool:
    if isinstance(layer, HeadWithDescriptor):
        return all(map(_can_be_written, _leaves(layer.head)))
    kinds = nn.Conv2d | nn.ReLU | nn.MaxPool2d | nn.AdaptiveAvgPool2d | nn.Flatten | nn.Linear | nn.Dropout
    return isinstance(layer, kinds)


def _written(layers: Sequence[nn.Module], transform: Transform) -> Any:
    """VGG16's graph, layer by layer from torch's own memory: tracing it takes 3 s and a second copy."""
    ov = openvino_import.openvino()
    from openvino import opset15 as op

    images = op.parameter([-1, transform.height, transform.width, 3], ov.Type.u8, name="images")
    node = op.transpose(op.convert(images, "f32"), np.array([0, 3, 1, 2]))
    mean, std = (255 * np.array(values, np.float32).reshape(1, 3, 1, 1) for values in (transform.mean, transform.std))
    node = op.divide(op.subtract(node, op.constant(mean)), op.constant(std))
    for layer in layers:
        node = _write_layer(op, layer, node)
    return ov.Model([node], [images], "network")


def _write_layer(op: Any, layer: nn.Module, node: Any) -> Any:
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
        return _write_described(op, layer, node)
    side = int(layer.output_size)  # type: ignore[arg-type]
    output = node if hasattr(node, "get_partial_shape") else node.output(0)
    sides = [output.get_partial_shape()[axis].get_length() for axis in (2, 3)]
    return node if sides == [side, side] else op.adaptive_avg_pool(node, op.constant(np.array([side, side])))


def _write_described(op: Any, layer: HeadWithDescriptor, features: Any) -> Any:
    logits = features
    for leaf in _leaves(layer.head):
        logits = _write_layer(op, leaf, logits)
    maps = op.reshape(features, np.array([0, layer.maps, -1]), True)
    return op.concat([logits, op.reduce_mean(maps, np.array([2]))], 1)


def _traced(layers: nn.Sequential, transform: Transform) -> Any:
    """Any other network, by OpenVINO's reader of torch modules: some seconds, once.

    `openvino.convert_model` wraps the same, and tells a statistics service about it (see
    ml.image.engines.openvino_import).
    """
    ov = openvino_import.openvino()
    from openvino.frontend import FrontEndManager
    from openvino.frontend.pytorch.ts_decoder import TorchScriptPythonDecoder

    example = torch.zeros(2, 3, transform.height, transform.width)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # of tracing: shapes that are the same for every picture
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
    """The range of what comes into each layer that `quantize` changes: mean over uint8 pictures [n, height, width, 3].

    Their lowest and highest values' mean, not the extremes: one odd picture must not coarsen all others.
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
    for start in range(0, len(pictures), _SEEN_AT_ONCE):
        found = compiled({0: np.ascontiguousarray(pictures[start : start + _SEEN_AT_ONCE])})
        parts.append(np.stack([found[output].reshape(-1) for output in compiled.outputs], axis=1))
    means = np.concatenate(parts).mean(axis=0).reshape(-1, 2)
    return [(float(low), float(high)) for low, high in means]


def quantize(graph: Any, ranges: Ranges) -> None:
    """Make the graph's products those of integers, in place. ValueError where `ranges` are of another graph."""
    from openvino import opset15 as op

    products = _products(graph)
    if len(products) != len(ranges):
        raise ValueError(f"{len(ranges)} ranges for {len(products)} products")
    for node, (low, high) in zip(products, ranges, strict=True):
        ends = _integers(low, high)
        entering = op.fake_quantize(node.input_value(0), *(op.constant(np.float32(end)) for end in ends * 2), 256)
        steps, size = _stepped(node)
        # Floats behind a FakeQuantize would do as well, but the plugin takes 3 s to turn VGG16's into this.
        weights = op.multiply(op.convert(op.constant(steps), "f32"), op.constant(size))
        node.input(0).replace_source_output(entering.output(0))
        node.input(1).replace_source_output(weights.output(0))
    graph.validate_nodes_and_infer_types()


def _stepped(node: Any) -> tuple[np.ndarray, np.ndarray]:
    """A layer's weights as int8, and the size of a step for each output channel: together the weights, rounded."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of memory that must not be written; torch is four times as fast as numpy here
        weights = torch.from_numpy(node.input_value(1).get_node().data)
    size = weights.abs().amax(dim=_inner_axes(node), keepdim=True).clamp_min(1e-30) / 127
    return (weights / size).round_().to(torch.int8).numpy(), size.numpy()


def _integers(low: float, high: float) -> tuple[float, float]:
    """The ends of 256 even steps: from 0 where nothing is negative, else those of a signed byte."""
    if low >= 0:
        return 0.0, max(high, 1e-12)
    largest = max(-low, high, 1e-12)
    return -largest, largest * 127 / 128


def _products(graph: Any) -> list[Any]:
    """Convolutions and matrix products with weights, but for the first and the last."""
    kinds = ("Convolution", "GroupConvolution", "MatMul")
    found = [node for node in graph.get_ordered_ops() if node.get_type_name() in kinds]
    return [node for node in found if node.input_value(1).get_node().get_type_name() == "Constant"][1:-1]


def _inner_axes(node: Any) -> tuple[int, ...]:
    """The axes of a layer's weights that are not of its outputs."""
    rank = len(node.input_value(1).get_node().data.shape)
    if node.get_type_name() == "MatMul":
        return (rank - 1,) if node.get_attributes()["transpose_b"] else (rank - 2,)
    return tuple(range(2 if node.get_type_name() == "GroupConvolution" else 1, rank))
