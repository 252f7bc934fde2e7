"""What the header of a file declares: its kind, its size and its frames, read before anything is decoded."""
