"""What stands between the network and the application: gunicorn's worker with deadlines, limits and our errors."""
