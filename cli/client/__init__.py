"""The Python client of the REST API: `Client(url, key)` and what its methods return and raise."""

from cli.client.client import Client, Epoch, Job, Prediction
from cli.client.transport import ApiError, Json, default_key, default_url
from cli.client.uploads import MultipartUpload, ProgressListener

__all__ = [
    "ApiError",
    "Client",
    "Epoch",
    "Job",
    "Json",
    "MultipartUpload",
    "Prediction",
    "ProgressListener",
    "default_key",
    "default_url",
]
