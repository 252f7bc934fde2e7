"""What the commands tell their user."""


class ApiError(Exception):
    """The API refused, or did not answer; the message is one line for the user.

    Args:
        status: HTTP's; None where there was no answer.
    """

    def __init__(self, line: str, status: int | None = None) -> None:
        super().__init__(line)
        self.status = status
