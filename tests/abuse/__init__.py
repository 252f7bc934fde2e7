"""Attacks on a running API, as scripts that print what they did, and the tests that hold it against them."""
