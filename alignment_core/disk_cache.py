"""Directories in the user's cache. They appear atomically, even if writers are killed or several write the same one."""

import contextlib
import json
import os
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

SIZES = "sizes.json"  # of all other files
ABANDONED = 3600.0  # seconds after which no writer is still active


def has(target: Path) -> bool:
    """Whether the directory exists and its files have the right sizes. Also removes leftovers of killed processes."""
    with contextlib.suppress(OSError):
        _sweep(target.parent)
    try:
        sizes: dict[str, int] = json.loads((target / SIZES).read_bytes())
        return all((target / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, AttributeError):
        return False


def add(target: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill a directory, and rename it to the target. A damaged target is replaced; a target that another
    process has written meanwhile stays. Raises OSError, and what `write` raises.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    with _scratch(target.parent) as scratch:
        new = scratch / "new"
        new.mkdir()
        write(new)
        files = list(new.iterdir())
        (new / SIZES).write_text(json.dumps({file.name: file.stat().st_size for file in files}))
        for file in new.iterdir():
            with file.open("rb") as written:
                os.fsync(written.fileno())  # otherwise a crash of the machine may leave an empty file under the name
        if not has(target):
            discard(target)
        try:
            new.rename(target)
        except OSError:
            if not has(target):
                raise


def discard(target: Path) -> None:
    """Remove a directory or file atomically. Raises OSError."""
    with _scratch(target.parent) as scratch, contextlib.suppress(FileNotFoundError):
        target.rename(scratch / "old")


@contextlib.contextmanager
def _scratch(parent: Path) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix=".", dir=parent, ignore_cleanup_errors=True) as path:
        yield Path(path)


def _sweep(parent: Path) -> None:
    for path in parent.glob(".*"):
        if time.time() - path.stat().st_mtime > ABANDONED:
            shutil.rmtree(path, ignore_errors=True)
