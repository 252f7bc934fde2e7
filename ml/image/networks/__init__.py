"""Networks: architectures, initial weights, model files, feature descriptors, OOD detectors."""
