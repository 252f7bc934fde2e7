"""Files on their way in: scans, manifests, resumable uploads, datasets from feedback."""
