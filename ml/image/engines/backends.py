"""The backends: CUDA by torch, x86 CPUs by OpenVINO, other CPUs by torch; and the choice of the fastest one.

| engine | where | images/s (VGG16 on 2 cores with AMX) |
|---|---|---|
| torch-cuda-bf16 | a CUDA device | – |
| openvino-int8 | x86-64 with AMX or AVX-512 VNNI; predictions only, see ml.image.engines.admission | – |
| openvino-bf16 | x86-64 with AMX or AVX-512 bf16 | 80; 15 without AMX |
| openvino-fp32 | x86-64 without them | 10 |
| torch-fp32 | everywhere; the reference | 6 |

Engines keep two batches in flight, so that the caller can decode or augment the next one meanwhile.
"""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import torch
from torch import nn

from ml.image.engines import openvino_import
from ml.image.engines.engine import Dtype, Engine, Precision
from ml.image.engines.graphs import Ranges, graph_of, quantize
from ml.image.engines.hardware import cpu_flags, cpu_has_bf16, supported_dtypes
from ml.image.engines.oom_fallback import OomFallbackEngine
from ml.image.pixels.transforms import Transform
from ml.spec.image import Params

SMALL_BATCH = 4
"""Batch size on CPUs without a matrix unit. There 1 to 16 images per batch are equally fast (14.8 images/s in bf16),
and an urgent scan waits 0.5 s for the current batch instead of 2.4 s."""
STREAMS = 2
"""Batches that OpenVINO computes at the same time, each on its share of the cores."""


def open_engine(
    layers: nn.Sequential,
    transform: Transform,
    precision: Precision = "auto",
    ranges: Ranges | None = None,
    streams: int = STREAMS,
    graph: Any = None,
) -> Engine:
    """The fastest engine on this machine for frozen layers (see `ml.image.networks.architectures.cut`).

    Engines copy the weights, except for torch-fp32 on the CPU. Batches that are too large for the device are halved.

    Args:
        layers: from normalized images to features or logits.
        transform: normalizes the pixels.
        precision: auto: bf16 if the device multiplies it natively, else fp32. bf16 and int8 are used without a check.
        ranges: the activation ranges for int8 (see `ml.image.engines.graphs`).
        streams: batches at the same time, on OpenVINO; 1 gives a single picture all cores.
        graph: the layers' `shared_graph`, if it is at hand; it stays as it is.
    """
    return OomFallbackEngine(_engine(layers.eval(), transform, default_dtype(precision), ranges, streams, graph))


def shared_graph(layers: nn.Sequential, transform: Transform) -> Any:
    """The graph of layers from which several engines are opened: tracing takes up to 10 s. None without OpenVINO."""
    return None if torch.cuda.is_available() or not openvino_import.is_installed() else graph_of(layers, transform)


def default_dtype(precision: Precision) -> Dtype:
    """The dtype for a precision without an admission; auto never means int8."""
    return next(dtype for dtype in supported_dtypes() if dtype != "int8") if precision == "auto" else precision


def training_precision(params: Params) -> Precision:
    """The precision of the frozen layers during training.

    bf16 rounds the output of each layer by 0.4 %. Trained networks, VGG16 and the vision transformer hardly change, but
    in the deeper networks with random weights the error grows to 16 %, so these use fp32.
    """
    if params.precision == "auto" and params.weights == "none" and params.network not in ("vgg16", "vit_b_16"):
        return "fp32"
    return params.precision


def _engine(
    layers: nn.Sequential, transform: Transform, dtype: Dtype, ranges: Ranges | None, streams: int, graph: Any
) -> Engine:
    if torch.cuda.is_available():
        return TorchEngine(layers, transform, "cuda", dtype)
    if openvino_import.is_installed():
        return OpenVinoEngine(layers, transform, dtype, ranges, streams, graph)
    return TorchEngine(layers, transform, "cpu", dtype)


def engine_name(dtype: Dtype) -> str:
    """The name of the engine that this machine uses for a dtype."""
    if torch.cuda.is_available():
        return f"torch-cuda-{dtype}"
    return f"openvino-{dtype}" if openvino_import.is_installed() else f"torch-{dtype}"


class TorchEngine:
    """torch: bf16 in channels_last on CUDA, eager fp32 on the CPU, which is the reference."""

    streams = 1

    def __init__(self, layers: nn.Sequential, transform: Transform, device: str, dtype: Dtype) -> None:
        if dtype == "int8":
            raise ValueError("torch has no int8 engine here")
        self.name = f"torch-{'cuda-' if device == 'cuda' else ''}{dtype}"
        self._dtype = torch.bfloat16 if dtype == "bf16" else torch.float32
        self.batch = 128 if device == "cuda" else SMALL_BATCH
        self._layers, self._transform, self._device = layers, transform, device
        if dtype == "bf16" or device == "cuda":
            self._layers = copy.deepcopy(layers).to(device, self._dtype, memory_format=torch.channels_last)  # type: ignore[call-overload]

    def stream(self, batches: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        """See `Engine.stream`. CUDA is asynchronous: a batch is copied back while the next one is computed."""
        pending: deque[torch.Tensor] = deque()
        for batch in batches:
            pending.append(self._forward(batch))
            if len(pending) == 2:
                yield pending.popleft().cpu().numpy()
        while pending:
            yield pending.popleft().cpu().numpy()

    @torch.inference_mode()
    def _forward(self, batch: np.ndarray) -> torch.Tensor:
        pixels = torch.from_numpy(batch)
        if self._device == "cuda":  # pinned memory is copied while the device computes the previous batch
            pixels = pixels.pin_memory().to("cuda", non_blocking=True)
        images = self._transform.normalize(pixels).to(self._dtype)
        return self._layers(images.contiguous(memory_format=torch.channels_last)).float()  # type: ignore[no-any-return]


class OpenVinoEngine:
    """OpenVINO: the normalization is part of the graph, the batch size is dynamic, and streams share the cores."""

    def __init__(
        self,
        layers: nn.Sequential,
        transform: Transform,
        dtype: Dtype,
        ranges: Ranges | None = None,
        streams: int = STREAMS,
        graph: Any = None,
    ) -> None:
        self.name, self.streams = f"openvino-{dtype}", streams
        self.batch = 16 if dtype != "fp32" and cpu_flags() & {"amx_tile"} else SMALL_BATCH
        options = {
            "INFERENCE_PRECISION_HINT": "f32" if dtype == "fp32" or not cpu_has_bf16() else "bf16",
            "NUM_STREAMS": self.streams,
            "PERFORMANCE_HINT": "THROUGHPUT",
            **_shared_cores(),
        }
        graph = graph_of(layers, transform) if graph is None else graph.clone()
        if dtype == "int8":
            if ranges is None:
                raise ValueError("int8 needs activation ranges")
            quantize(graph, ranges)
        compiled = openvino_import.openvino().Core().compile_model(graph, "CPU", options)
        self._requests = [compiled.create_infer_request() for _ in range(self.streams)]

    def stream(self, batches: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        """See `Engine.stream`. One stream at a time: the requests are shared."""
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
        finally:  # the caller may stop early; no request may be running when the next stream begins
            for request in running:
                request.wait()

    @staticmethod
    def _collect(free: deque[Any], running: deque[Any]) -> np.ndarray:
        request = running.popleft()
        request.wait()
        outputs = [tensor.data for tensor in request.output_tensors]
        features: np.ndarray = outputs[0].copy() if len(outputs) == 1 else np.concatenate(outputs, axis=1)
        free.append(request)
        return features


def _shared_cores() -> dict[str, object]:
    """In DDP workers, each process would otherwise use all cores and pin its threads to the same ones."""
    if not torch.distributed.is_initialized():
        return {}
    return {"INFERENCE_NUM_THREADS": torch.get_num_threads(), "ENABLE_CPU_PINNING": False}
