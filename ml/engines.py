"""The frozen backbone on the fastest engine that is here. All of them take uint8 pixels and give float32 features.

| engine | where | images/s here (2 cores with AMX) |
|---|---|---|
| torch-cuda-bf16 | a CUDA device | – |
| openvino-bf16 | x86-64 with AMX or AVX-512 bf16 | 80; 15 without AMX |
| openvino-fp32 | x86-64 without them | 10 |
| torch-fp32 | everywhere; the reference | 6 |

`stream` keeps two batches in flight, so that the caller decodes or augments the next one meanwhile.
"""

from __future__ import annotations

import copy
import warnings
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import torch
from torch import nn

from ml import openvino_door
from ml.halving import HalvingBackbone
from ml.transforms import Transform

Precision = Literal["auto", "fp32", "bf16"]
SMALL_BATCH = 4
"""Images for one call where a core has no matrix unit. There 1 to 16 are equally fast (14.8 a second in bf16),
and whoever wants the device in between, such as an urgent scan, waits for a batch: 0.5 s, not 2.4."""


class Backbone(Protocol):
    """Pixels to features, never with gradients. `batch`: how many images it likes at once; more is no faster."""

    name: str
    batch: int

    def stream(self, batches: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        """uint8 [n, height, width, 3] batches (n may differ) → float32 [n, …], in the same order."""
        ...


def features_of(backbone: Backbone, images: np.ndarray) -> np.ndarray:
    """Features of images that are all at hand: uint8 [N, height, width, 3] → float32 [N, …]."""
    size = backbone.batch
    batches = (images[start : start + size] for start in range(0, len(images), size))
    return np.concatenate(list(backbone.stream(batches)))


def open_backbone(below: nn.Sequential, transform: Transform, precision: Precision = "auto") -> Backbone:
    """The fastest engine on this machine for the frozen part of a network (see `ml.architectures.cut`).

    `precision` auto takes bf16 where the device multiplies it natively; fp32 is the reference; bf16 is taken at the
    caller's word. Batches that are too large for the device are halved. The engines keep a copy of the weights, but for
    torch-fp32 on the CPU, which shares them.
    """
    return HalvingBackbone(_fastest(below.eval(), transform, precision))


def _fastest(below: nn.Sequential, transform: Transform, precision: Precision) -> Backbone:
    if torch.cuda.is_available():
        return TorchBackbone(below, transform, "cuda", bf16=precision != "fp32")
    if precision != "fp32" and openvino_door.is_here() and (precision == "bf16" or cpu_has_bf16()):
        return OpenVinoBackbone(below, transform, bf16=True)
    if openvino_door.is_here():
        return OpenVinoBackbone(below, transform, bf16=False)
    return TorchBackbone(below, transform, "cpu", bf16=precision == "bf16")


def device_name() -> str:
    """What the backbone will run on, in words (for `renalq doctor` and the model's metadata)."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"CPU, {torch.get_num_threads()} threads" + (", bf16" if cpu_has_bf16() else "")


def device_has_bf16() -> bool:
    """Whether bf16 is multiplied in hardware where learning happens."""
    return torch.cuda.is_bf16_supported() if torch.cuda.is_available() else cpu_has_bf16()


def cpu_has_bf16() -> bool:
    """Whether this CPU multiplies bf16 in hardware; emulated bf16 is slower than fp32."""
    return bool(cpu_flags() & {"amx_bf16", "avx512_bf16"})


@cache
def cpu_flags() -> frozenset[str]:
    """What the CPU can do, in Linux' words; nothing where nobody says."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="ascii", errors="ignore").splitlines()
    except OSError:
        return frozenset()
    return frozenset(next((line for line in lines if line.startswith("flags")), "").split())


class TorchBackbone:
    """torch itself: bf16 in channels_last on CUDA, eager fp32 on the CPU as the reference."""

    def __init__(self, below: nn.Sequential, transform: Transform, device: str, bf16: bool) -> None:
        self.name = f"torch-{'cuda-' if device == 'cuda' else ''}{'bf16' if bf16 else 'fp32'}"
        self._dtype = torch.bfloat16 if bf16 else torch.float32
        self.batch = 128 if device == "cuda" else SMALL_BATCH
        self._layers, self._transform, self._device = below, transform, device
        if bf16 or device == "cuda":
            self._layers = copy.deepcopy(below).to(device, self._dtype, memory_format=torch.channels_last)  # type: ignore[call-overload]

    def stream(self, batches: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        """See `Backbone.stream`. CUDA queues the work, so the batch before is read back while the next one runs."""
        pending: deque[torch.Tensor] = deque()
        for batch in batches:
            pending.append(self._forward(batch))
            if len(pending) == 2:
                yield pending.popleft().cpu().numpy()
        while pending:
            yield pending.popleft().cpu().numpy()

    @torch.inference_mode()
    def _forward(self, batch: np.ndarray) -> torch.Tensor:
        images = self._transform.normalize(torch.from_numpy(batch).to(self._device)).to(self._dtype)
        return self._layers(images.contiguous(memory_format=torch.channels_last)).float()  # type: ignore[no-any-return]


class OpenVinoBackbone:
    """OpenVINO: two streams, any batch size up to what is asked, the normalization inside the graph."""

    STREAMS = 2

    def __init__(self, below: nn.Sequential, transform: Transform, bf16: bool) -> None:
        ov = openvino_door.openvino()
        self.name = "openvino-bf16" if bf16 else "openvino-fp32"
        self.batch = 16 if bf16 and cpu_flags() & {"amx_bf16"} else SMALL_BATCH
        options = {
            "INFERENCE_PRECISION_HINT": "bf16" if bf16 else "f32",
            "NUM_STREAMS": self.STREAMS,
            "PERFORMANCE_HINT": "THROUGHPUT",
            **_shared_cores(),
        }
        layers = list(_leaves(below))
        model = _written(layers, transform) if all(map(_can_be_written, layers)) else _traced(below, transform)
        compiled = ov.Core().compile_model(model, "CPU", options)
        self._requests = [compiled.create_infer_request() for _ in range(self.STREAMS)]

    def stream(self, batches: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        """See `Backbone.stream`. One stream at a time: the requests are shared."""
        free, running = deque(self._requests), deque[Any]()
        try:
            for batch in batches:
                if not free:
                    yield self._collect(free, running)
                request = free.popleft()
                request.start_async({0: np.ascontiguousarray(batch)})
                running.append(request)
            while running:
                yield self._collect(free, running)
        finally:  # the caller may stop early: no request may still run when the next stream begins
            for request in running:
                request.wait()

    @staticmethod
    def _collect(free: deque[Any], running: deque[Any]) -> np.ndarray:
        request = running.popleft()
        request.wait()
        features: np.ndarray = request.get_output_tensor(0).data.copy()
        free.append(request)
        return features


def _shared_cores() -> dict[str, object]:
    """Of processes that train together (ml.team) each would else take all cores, and pin itself to the same ones."""
    if not torch.distributed.is_initialized():
        return {}
    return {"INFERENCE_NUM_THREADS": torch.get_num_threads(), "ENABLE_CPU_PINNING": False}


# --- graphs ----------------------------------------------------------------------------------------------------------


def _leaves(module: nn.Module) -> Iterator[nn.Module]:
    if isinstance(module, nn.Sequential):
        for child in module:
            yield from _leaves(child)
    else:
        yield module


def _can_be_written(layer: nn.Module) -> bool:
    return isinstance(layer, nn.Conv2d | nn.ReLU | nn.MaxPool2d | nn.AdaptiveAvgPool2d | nn.Flatten)


def _written(layers: Sequence[nn.Module], transform: Transform) -> Any:
    """VGG16's graph, layer by layer from torch's weights: tracing it takes 3 s and a second copy in memory."""
    ov = openvino_door.openvino()
    from openvino import opset15 as op

    images = op.parameter([-1, transform.height, transform.width, 3], ov.Type.u8, name="images")
    node = op.transpose(op.convert(images, "f32"), np.array([0, 3, 1, 2]))
    mean, std = (255 * np.array(values, np.float32).reshape(1, 3, 1, 1) for values in (transform.mean, transform.std))
    node = op.divide(op.subtract(node, op.constant(mean)), op.constant(std))
    for layer in layers:
        node = _write_layer(op, layer, node)
    return ov.Model([node], [images], "backbone")


def _write_layer(op: Any, layer: nn.Module, node: Any) -> Any:
    if isinstance(layer, nn.Conv2d):
        weight, bias = layer.weight.detach().numpy(), layer.bias.detach().numpy()  # type: ignore[union-attr]
        node = op.convolution(node, op.constant(weight), [1, 1], [1, 1], [1, 1], [1, 1])
        return op.add(node, op.constant(bias.reshape(1, -1, 1, 1)))
    if isinstance(layer, nn.ReLU):
        return op.relu(node)
    if isinstance(layer, nn.MaxPool2d):
        return op.max_pool(node, [2, 2], [1, 1], [0, 0], [0, 0], [2, 2]).output(0)
    if isinstance(layer, nn.Flatten):
        return op.reshape(node, np.array([0, -1]), True)
    side = int(layer.output_size)  # type: ignore[arg-type]
    output = node if hasattr(node, "get_partial_shape") else node.output(0)
    sides = [output.get_partial_shape()[axis].get_length() for axis in (2, 3)]
    return node if sides == [side, side] else op.adaptive_avg_pool(node, op.constant(np.array([side, side])))


def _traced(below: nn.Sequential, transform: Transform) -> Any:
    """Any other network, by OpenVINO's reader of torch modules: some seconds, once.

    `openvino.convert_model` wraps the same, and tells a statistics service about it (see ml.openvino_door).
    """
    ov = openvino_door.openvino()
    from openvino.frontend import FrontEndManager
    from openvino.frontend.pytorch.ts_decoder import TorchScriptPythonDecoder

    example = torch.zeros(2, 3, transform.height, transform.width)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # of tracing: shapes that are the same for every picture
        reader, module = (
            FrontEndManager().load_by_framework("pytorch"),
            TorchScriptPythonDecoder(below, example_input=example),
        )
        model = reader.convert(reader.load(module))
    model.reshape([-1, 3, transform.height, transform.width])
    steps = ov.preprocess.PrePostProcessor(model)
    steps.input().tensor().set_element_type(ov.Type.u8).set_layout(ov.Layout("NHWC"))
    steps.input().model().set_layout(ov.Layout("NCHW"))
    mean, std = ([255 * value for value in values] for values in (transform.mean, transform.std))
    steps.input().preprocess().convert_element_type(ov.Type.f32).mean(mean).scale(std)
    return steps.build()
