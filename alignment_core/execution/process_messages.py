"""Messages between the processes of one model, as JSON and arrays. Reading a message runs no code of its sender."""

import json
import struct
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from typing import IO, Any

import numpy as np

LENGTHS = struct.Struct("<QQ")  # of the JSON, of the arrays


def pack(message: object) -> bytes:
    """A message as bytes. message: None, a JSON value, or a dataclass of JSON values and NumPy arrays."""
    values = {"": message}
    if is_dataclass(message):
        values = {field.name: getattr(message, field.name) for field in fields(message)}
    arrays = {name: value for name, value in values.items() if isinstance(value, np.ndarray)}
    head = {
        "kind": type(message).__name__ if is_dataclass(message) else None,
        "values": {name: value for name, value in values.items() if name not in arrays},
        "arrays": {name: (array.dtype.name, array.shape) for name, array in arrays.items()},
    }
    text = json.dumps(head).encode()
    body = b"".join(array.tobytes() for array in arrays.values())
    return LENGTHS.pack(len(text), len(body)) + text + body


def unpack(stream: IO[bytes], kinds: Mapping[str, type]) -> Any:
    """Read the next message. kinds: The possible dataclasses by name. Raises EOFError."""
    length, size = LENGTHS.unpack(_exactly(stream, LENGTHS.size))
    head, body = json.loads(_exactly(stream, length)), bytearray(_exactly(stream, size))
    values, at = head["values"], 0
    for name, (dtype, shape) in head["arrays"].items():
        count = int(np.prod(shape))
        values[name] = np.frombuffer(body, dtype, count, at).reshape(shape)
        at += values[name].nbytes
    return values[""] if head["kind"] is None else kinds[head["kind"]](**values)


def _exactly(stream: IO[bytes], size: int) -> bytes:
    data = stream.read(size)
    if len(data) < size:
        raise EOFError
    return data
