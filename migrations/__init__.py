"""The schema's history. Each step runs up and down, and works with the code before it."""
