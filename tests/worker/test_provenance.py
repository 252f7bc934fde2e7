"""Where a network comes from."""

import numpy as np

from ml.spec.registry import spec_of
from worker.tracking.provenance import environment


def test_the_environment_names_the_packages_that_decide_a_networks_numbers() -> None:
    found = environment(spec_of("image").packages)
    assert {"python", "torch", "torchvision", "numpy", "scikit-learn", "mlflow"} <= set(found)
    assert found["numpy"] == np.__version__
