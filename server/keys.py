"""Reads API keys. Only their hashes are kept."""

import hashlib
import stat
from pathlib import Path


def hashed(key: str) -> bytes:
    """The SHA-256 of a key. Raises ValueError for an invalid key; headers hold only ASCII."""
    if not (key and key.isascii() and key.isprintable() and " " not in key):
        raise ValueError("an API key must be printable ASCII, without spaces, and not empty")
    return hashlib.sha256(key.encode()).digest()


def is_open_to_everyone(file: Path) -> bool:
    """Whether all users of this machine can read the file."""
    return bool(file.stat().st_mode & stat.S_IROTH)


def keys_of(file: Path) -> dict[bytes, str]:
    """The hashes of the keys in a file, each with the name of its default preset, or "".

    A line is KEY, or KEY preset=NAME. Empty lines and lines that begin with # are skipped. Raises ValueError.
    """
    try:
        lines = [line.strip() for line in file.read_text().splitlines()]
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f"the API keys of {file} can't be read: {type(error).__name__}") from error
    keys = dict[bytes, str]()
    for line in lines:
        key, _, rest = line.partition(" preset=")
        if line and not line.startswith("#"):
            keys[hashed(key.strip())] = rest.strip()
    if not keys:
        raise ValueError(f"{file} has no API key")
    return keys
