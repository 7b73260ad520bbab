"""The exceptions of the library.

LinalignError
  LoadingError    the model can't be loaded; the message names a solution
  InvalidRequest  a request that can never be served; also a ValueError
  RequestFailed   an error inside one request; other requests are not affected
  EngineBusy      the queue is full; try again later
  EngineDead      the engine's loop has failed, or was stopped
"""

from typing import Literal


class LinalignError(Exception):
    """The base class of the library's exceptions."""


class LoadingError(LinalignError):
    """The model can't be loaded; the message names a solution."""


FIELD = "\ue000"  # stands for the field's name in messages; a private-use character, so that no text has it by chance


class InvalidRequest(LinalignError, ValueError):
    """A request that can never be served.

    message: May contain FIELD, because callers may have another name for the field. field: The invalid field, by its
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
        return str(self.args[0]).replace(FIELD, field)


class RequestFailed(LinalignError, RuntimeError):
    """An error inside one request; other requests are not affected."""


class EngineBusy(LinalignError, RuntimeError):
    """The queue is full. retry_after: Seconds until a retry may succeed."""

    def __init__(self, retry_after: int) -> None:
        super().__init__("too many requests are waiting; try again later")
        self.retry_after = retry_after


class EngineDead(LinalignError, RuntimeError):
    """The engine's loop has failed, or was stopped."""
