"""Configures logging: text or JSON lines, with the id of the request in every line."""

import logging
from typing import Literal

from asgi_correlation_id import CorrelationIdFilter
from pythonjsonlogger.core import RESERVED_ATTRS
from pythonjsonlogger.json import JsonFormatter

TEXT = "%(asctime)s %(levelname)s %(name)s [%(correlation_id)s]: %(message)s"
NAMES = {"asctime": "time", "levelname": "level", "name": "logger", "correlation_id": "request_id"}
RESERVED = [*RESERVED_ATTRS, "color_message"]  # uvicorn's, for terminals


def configure(format: Literal["text", "json"]) -> None:
    """Log to stderr from INFO on."""
    handler = logging.StreamHandler()
    handler.addFilter(CorrelationIdFilter(default_value="-"))
    text = logging.Formatter(TEXT)
    json = JsonFormatter([*NAMES, "message"], rename_fields=NAMES, reserved_attrs=RESERVED)
    handler.setFormatter(json if format == "json" else text)
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
