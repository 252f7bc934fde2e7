"""The command `renalq`: it talks to the API over HTTP and starts the other processes."""
