"""How much is run of what costs minutes: a part in make test, all of it in make test-long."""

import os

LONG_RUN = "LONG_RUN" in os.environ


def counted(short, full):
    """The number for this run."""
    return full if LONG_RUN else short
