"""Fast inference of frozen layers: backends, dtypes and their admission, feature computation."""
