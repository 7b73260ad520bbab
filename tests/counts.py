"""Sizes of expensive tests: small in `make test`, full in `make test-long`."""

import os

LONG_RUN = "LONG_RUN" in os.environ


def counted(short, full):
    """`full` in a long run (`make test-long`), else `short`."""
    return full if LONG_RUN else short
