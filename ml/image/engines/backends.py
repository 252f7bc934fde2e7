"""Frozen layers, or a whole network, on the fastest engine that is here: uint8 pixels in, float32 out.

| engine | where | images/s here (VGG16 on 2 cores with AMX) |
|---|---|---|
| torch-cuda-bf16 | a CUDA device | – |
| openvino-int8 | x86-64 with AMX or AVX-512 VNNI; predictions only, see ml.image.engines.admission | – |
| openvino-bf16 | x86-64 with AMX or AVX-512 bf16 | 80; 15 without AMX |
| openvino-fp32 | x86-64 without them | 10 |
| torch-fp32 | everywhere; the reference | 6 |

`stream` keeps two batches in flight, so that the caller decodes or augments the next one meanwhile.
"""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from ml.image.engines import openvino_import
from ml.image.engines.engine import Dtype, Engine, Precision
from ml.image.engines.graphs import Ranges, graph_of, quantize
from ml.image.engines.oom_fallback import OomFallbackEngine
from ml.image.pixels.transforms import Transform
from ml.spec.image import Params

SMALL_BATCH = 4
"""Images for one call where a core has no matrix unit. There 1 to 16 are equally fast (14.8 a second in bf16),
and whoever wants the device in between, such as an urgent scan, waits for a batch: 0.5 s, not 2.4."""
STREAMS = 2
"""Batches that OpenVINO takes at the same time, each on its share of the cores."""


def open_engine(
    layers: nn.Sequential,
    transform: Transform,
    precision: Precision = "auto",
    ranges: Ranges | None = None,
    streams: int = STREAMS,
) -> Engine:
    """The fastest engine on this machine for layers that do not learn (see `ml.image.networks.architectures.cut`).

    `precision` auto takes bf16 where the device multiplies it natively; fp32 is the reference; bf16 and int8 are taken
    at the caller's word, the latter with `ranges` (ml.image.engines.graphs). Batches that are too large for the
    device are halved. `streams` 1 is for who asks for one picture at a time: all cores work at it, where an engine
    has streams at all. The engines keep a copy of the weights, but for torch-fp32 on the CPU, which shares them.
    """
    return OomFallbackEngine(_engine(layers.eval(), transform, default_dtype(precision), ranges, streams))


def default_dtype(precision: Precision) -> Dtype:
    """The form that is opened for this precision where nothing was tried; auto never means int8."""
    return next(form for form in supported_dtypes() if form != "int8") if precision == "auto" else precision


def training_precision(params: Params) -> Precision:
    """The precision of the frozen layers during training.

    bf16 rounds the output of each layer by 0.4 %. Trained networks, VGG16 and the vision transformer hardly change, but
    in the deeper networks with random weights the error grows to 16 %, so these use fp32.
    """
    if params.precision == "auto" and params.weights == "none" and params.network not in ("vgg16", "vit_b_16"):
        return "fp32"
    return params.precision


def _engine(layers: nn.Sequential, transform: Transform, form: Dtype, ranges: Ranges | None, streams: int) -> Engine:
    if torch.cuda.is_available():
        return TorchEngine(layers, transform, "cuda", form)
    if openvino_import.is_here():
        return OpenVinoEngine(layers, transform, form, ranges, streams)
    return TorchEngine(layers, transform, "cpu", form)


def engine_name(form: Dtype) -> str:
    """What the engine of this form is called here."""
    if torch.cuda.is_available():
        return f"torch-cuda-{form}"
    return f"openvino-{form}" if openvino_import.is_here() else f"torch-{form}"


def supported_dtypes() -> tuple[Dtype, ...]:
    """What is computed in hardware here, fastest first. The last one is fp32."""
    if torch.cuda.is_available():
        return ("bf16", "fp32") if torch.cuda.is_bf16_supported() else ("fp32",)
    if not openvino_import.is_here():
        return ("fp32",)
    int8: tuple[Dtype, ...] = ("int8",) if cpu_flags() & {"amx_int8", "avx512_vnni", "avx_vnni"} else ()
    bf16: tuple[Dtype, ...] = ("bf16",) if cpu_has_bf16() else ()
    return *int8, *bf16, "fp32"


def device_name() -> str:
    """What networks will run on, in words (for `renalq doctor` and the model's metadata)."""
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


class TorchEngine:
    """torch itself: bf16 in channels_last on CUDA, eager fp32 on the CPU as the reference."""

    streams = 1

    def __init__(self, layers: nn.Sequential, transform: Transform, device: str, form: Dtype) -> None:
        if form == "int8":
            raise ValueError("torch has no int8 engine here")
        self.name = f"torch-{'cuda-' if device == 'cuda' else ''}{form}"
        self._dtype = torch.bfloat16 if form == "bf16" else torch.float32
        self.batch = 128 if device == "cuda" else SMALL_BATCH
        self._layers, self._transform, self._device = layers, transform, device
        if form == "bf16" or device == "cuda":
            self._layers = copy.deepcopy(layers).to(device, self._dtype, memory_format=torch.channels_last)  # type: ignore[call-overload]

    def stream(self, batches: Iterable[np.ndarray]) -> Iterator[np.ndarray]:
        """See `Engine.stream`. CUDA queues the work, so the batch before is read back while the next one runs."""
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
        if self._device == "cuda":  # a pinned batch is copied while the device computes the one before
            pixels = pixels.pin_memory().to("cuda", non_blocking=True)
        images = self._transform.normalize(pixels).to(self._dtype)
        return self._layers(images.contiguous(memory_format=torch.channels_last)).float()  # type: ignore[no-any-return]


class OpenVinoEngine:
    """OpenVINO: streams share the cores, any batch size up to what is asked, the normalization inside the graph."""

    def __init__(
        self,
        layers: nn.Sequential,
        transform: Transform,
        form: Dtype,
        ranges: Ranges | None = None,
        streams: int = STREAMS,
    ) -> None:
        self.name, self.streams = f"openvino-{form}", streams
        self.batch = 16 if form != "fp32" and cpu_flags() & {"amx_tile"} else SMALL_BATCH
        options = {
            "INFERENCE_PRECISION_HINT": "f32" if form == "fp32" or not cpu_has_bf16() else "bf16",
            "NUM_STREAMS": self.streams,
            "PERFORMANCE_HINT": "THROUGHPUT",
            **_shared_cores(),
        }
        graph = graph_of(layers, transform)
        if form == "int8":
            if ranges is None:
                raise ValueError("int8 needs the ranges of what comes into the layers")
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
        finally:  # the caller may stop early: no request may still run when the next stream begins
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
    """Of processes that train together (ml.runtime.process_group) each would else take all cores, and pin itself to
    the same ones."""
    if not torch.distributed.is_initialized():
        return {}
    return {"INFERENCE_NUM_THREADS": torch.get_num_threads(), "ENABLE_CPU_PINNING": False}
