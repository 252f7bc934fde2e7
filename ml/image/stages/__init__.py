"""The four stages of a training run, and the state that they share."""
