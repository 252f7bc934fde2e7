"""LitServe with dynamic batching: `python -m bench.peers.serving.litserve_app PORT`. The engine is ours."""

import base64
import os
import sys
from pathlib import Path
from typing import Any

import litserve
import numpy as np

from ml.image.engines.engine import outputs_of
from ml.image.pixels.decoding import decode
from ml.image.serving.predictor import Predictor


class Api(litserve.LitAPI):
    """JPEG bytes in, probabilities out."""

    def setup(self, device: str) -> None:
        """Load the network."""
        self.predictor = Predictor.load(Path(os.environ["BENCH_MODEL"]))

    def decode_request(self, request):
        """A file's pixels, as the network takes them; the body is JSON, as LitServe has it by itself."""
        return self.predictor.transform.resize(decode(base64.b64decode(request["image"])))

    def batch(self, inputs: list[np.ndarray]) -> np.ndarray:
        """Pictures into one array."""
        return np.stack(inputs)

    def predict(self, x: np.ndarray) -> np.ndarray:
        """Probabilities of a batch, which takes both of the engine's streams; behind the logits is the descriptor."""
        logits = outputs_of(self.predictor.engine, x)[:, : len(self.predictor.classes)]
        return self.predictor.calibration.probabilities(logits)

    def unbatch(self, output: np.ndarray) -> list[list[float]]:
        """One answer a request."""
        return [[float(value) for value in row] for row in output]

    def encode_response(self, output: list[float]) -> dict[str, Any]:
        """By class."""
        return dict(zip(self.predictor.classes, output, strict=True))


if __name__ == "__main__":
    server = litserve.LitServer(Api(max_batch_size=16, batch_timeout=0.1), accelerator="cpu", workers_per_device=1)
    server.run(host="127.0.0.1", port=int(sys.argv[1]), generate_client_file=False, log_level="warning")
