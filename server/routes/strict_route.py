"""Routes that parse JSON bodies strictly. Headers of their responses name the alignment and ignored fields."""

import logging
from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request, Response
from fastapi.routing import APIRoute

from linalign.server.alignment_sources import APPLIED_HEADER
from linalign.server.exchange import exchange_of
from linalign.server.protocol.ignored_fields import HEADER, header_of
from linalign.server.protocol.strict_json import InvalidBody, strict
from linalign.server.threads import LONG, in_thread

log = logging.getLogger(__name__)


class StrictRoute(APIRoute):
    """A route that reads bodies with `StrictRequest`."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def handle_strictly(request: Request) -> Response:
            response = await handle(StrictRequest(request.scope, request.receive))
            exchange = exchange_of(request.scope)
            if exchange.applied:
                response.headers[APPLIED_HEADER] = exchange.applied.header()
            if exchange.ignored:
                response.headers[HEADER] = header_of(exchange.ignored)
                log.debug("Ignored fields: %s", response.headers[HEADER])
            return response

        return handle_strictly


class StrictRequest(Request):
    async def json(self) -> Any:
        """The body. Raises InvalidBody."""
        body = await self.body()
        return await in_thread(self, _parsed, body) if len(body) > LONG else _parsed(body)


def _parsed(body: bytes) -> Any:
    try:
        return strict(body.decode("utf-8-sig"))
    except UnicodeDecodeError as error:
        raise InvalidBody("the body is not valid JSON: it is not UTF-8") from error
    except ValueError as error:
        raise InvalidBody(f"the body is not valid JSON: {error}") from error
