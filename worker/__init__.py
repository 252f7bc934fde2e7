"""The processes that do the work: the dispatcher publishes units to Celery, the workers claim and run them."""
