"""Why the work on a unit is to stop before its end."""


class CancelRequested(Exception):
    """Somebody asked for the job's end."""


class Draining(Exception):
    """This worker is to stop: the unit goes back to the queue."""


class Yielding(Exception):
    """Somebody with a better right waits for this worker: what is left of the unit goes back to the queue."""
