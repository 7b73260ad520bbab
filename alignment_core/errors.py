"""What the library raises.

InvalidRequest and LoadingError say what their user can do about it; the others happen to a request.
"""


class LoadingError(Exception):
    """The model can't be had; the message says what would help."""


class InvalidRequest(ValueError):
    """A request that can never be served. `param` names the field at fault."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class RequestFailed(RuntimeError):
    """Something went wrong in one request; no other is harmed."""


class EngineBusy(RuntimeError):
    """The queue is full. retry_after: seconds after which it is worth another try."""

    def __init__(self, retry_after: int) -> None:
        super().__init__("too many requests wait already; try again later")
        self.retry_after = retry_after


class EngineDead(RuntimeError):
    """The engine's loop has ended on an error, or was stopped."""
