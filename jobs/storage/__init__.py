"""Storage of bytes: the blob store, and safe reading of uploaded zips."""
