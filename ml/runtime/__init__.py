"""What a run needs besides its model: events, errors, configuration, caches, files, threads and processes."""
