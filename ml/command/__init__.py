"""The command line `python -m ml`: options and terminal output."""
