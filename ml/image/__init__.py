"""The image pipeline: scans in, a classifier of them out."""
