import os
import signal
import tempfile
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "1"  # Triton reads it when it is imported, as torch does
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tests run side by side; test_cpu.py has those with more threads

import certifi

from tests import fork_server

for name in ("COLUMNS", "LINES"):  # readline sets them when it is imported, for all children: xdist's workers, chats
    os.environ.pop(name, None)
# httpx reads all certificates that are trusted in each call, for 20 ms. Nobody here has one: a single one will do.
END = "-----END CERTIFICATE-----\n"
one_certificate = tempfile.NamedTemporaryFile("w", suffix=".pem")  # noqa: SIM115 - as long as this process
one_certificate.write(Path(certifi.where()).read_text().partition(END)[0] + END)
one_certificate.flush()
os.environ["SSL_CERT_FILE"] = one_certificate.name
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell has it ignored by what runs in the background


def pytest_configure(config):
    if config.getoption("numprocesses", None) and not hasattr(config, "workerinput"):
        fork_server.start()  # for all of xdist's workers; this process runs no tests, so it needs no fixtures
    else:
        config.pluginmanager.import_plugin("tests.fixtures")
