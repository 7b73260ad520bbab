"""The exceptions of the library.

LinalignError
  LoadingError    the model can't be had; the message says what would help
  InvalidRequest  a request that can never be served; also a ValueError
  RequestFailed   something went wrong in one request; no other is harmed
  EngineBusy      the queue is full; try again later
  EngineDead      the engine's loop has ended on an error, or was stopped
"""


class LinalignError(Exception):
    """The base of all of them."""


class LoadingError(LinalignError):
    """The model can't be had; the message says what would help."""


class InvalidRequest(LinalignError, ValueError):
    """A request that can never be served. `param` names the field at fault."""

    def __init__(self, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.param = param


class RequestFailed(LinalignError, RuntimeError):
    """Something went wrong in one request; no other is harmed."""


class EngineBusy(LinalignError, RuntimeError):
    """The queue is full. retry_after: seconds after which it is worth another try."""

    def __init__(self, retry_after: int) -> None:
        super().__init__("too many requests wait already; try again later")
        self.retry_after = retry_after


class EngineDead(LinalignError, RuntimeError):
    """The engine's loop has ended on an error, or was stopped."""
