"""Retention: what is deleted after how long, in bounded batches that the leading dispatcher runs."""
