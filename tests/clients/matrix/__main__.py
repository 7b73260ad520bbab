"""Runs all programs against a server and prints a table in Markdown: `make client-matrix`."""

import datetime
import sys
from importlib.metadata import version

from tests.clients.matrix import CLIENTS, run
from tests.serving import serving


def main():
    rows, has_failed = [], False
    with serving(cold=True) as (url, _):
        for client in CLIENTS:
            try:
                rows.append((client, run(client, url)["version"], "works"))
            except (RuntimeError, TimeoutError) as error:
                print(error, file=sys.stderr)
                rows.append((client, "", "fails"))
                has_failed = True
    print(f"# Clients that were run on {datetime.datetime.now(datetime.UTC):%Y-%m-%d}\n")
    print(
        f"With linalign {version('linalign')} and the embedded model, by `make client-matrix`. What each program checks"
    )
    print("is in [tests/clients/matrix](../tests/clients/matrix).\n")
    print("| client | version | result |\n|---|---|---|")
    print("\n".join(f"| {client} | {found} | {result} |" for client, found, result in rows))
    return has_failed


sys.exit(main())
