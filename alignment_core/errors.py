"""The exceptions of the library.

LinalignError
  LoadingError    the model can't be loaded; the message names a solution
  InvalidRequest  a request that can never be served; also a ValueError
  RequestFailed   something went wrong in one request; no other is harmed
  EngineBusy      the queue is full; try again later
  EngineDead      the engine's loop has ended on an error, or was stopped
"""

from typing import Literal


class LinalignError(Exception):
    """The base of all of them."""


class LoadingError(LinalignError):
    """The model can't be loaded; the message names a solution."""


class InvalidRequest(LinalignError, ValueError):
    """A request that can never be served.

    message: may name the field as {field}, for callers who know it by another name. field: the field at fault, by its
    name in this library. code: "too_long" for a prompt or a reply that does not fit the context.
    """

    def __init__(
        self, message: str, field: str | None = None, code: Literal["invalid", "too_long"] = "invalid"
    ) -> None:
        super().__init__(message)
        self.field, self.code = field, code

    def __str__(self) -> str:
        return self.message_for(self.field or "")

    def message_for(self, field: str) -> str:
        """The message, with this name of the field."""
        return str(self.args[0]).replace("{field}", field)


class RequestFailed(LinalignError, RuntimeError):
    """Something went wrong in one request; no other is harmed."""


class EngineBusy(LinalignError, RuntimeError):
    """The queue is full. retry_after: seconds after which it is worth another try."""

    def __init__(self, retry_after: int) -> None:
        super().__init__("too many requests wait already; try again later")
        self.retry_after = retry_after


class EngineDead(LinalignError, RuntimeError):
    """The engine's loop has ended on an error, or was stopped."""
