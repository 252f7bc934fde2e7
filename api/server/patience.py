"""How long a client may keep the server waiting: a budget of seconds that waiting uses up and bytes refill."""


class Patience:
    """A token bucket of seconds, as in Apache's mod_reqtimeout (`body=20,MinRate=500`).

    A client that sends nothing is given up after `seconds`. One that sends fewer than `pace` bytes a second is given up
    later; one that sends more never is, however long its body.

    Args:
        seconds: the most that is saved up (s).
        pace: bytes that are worth a second of waiting (bytes/s).
    """

    def __init__(self, seconds: float, pace: float) -> None:
        self._most, self._pace = seconds, pace
        self.left = seconds
        """Seconds that the next wait may take."""

    def spend(self, waited: float, moved: int = 0) -> bool:
        """Account for a wait (s) and for the bytes that came or went. Returns whether any patience is left."""
        self.left = min(self._most, self.left - waited + moved / self._pace)
        return self.left > 0
