"""The only publisher to Celery: the fair scheduler, the dispatch loop and the webhook sender."""
