import os
import signal
import tempfile
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "1"  # set before torch imports Triton, which reads it on import
os.environ.setdefault("OMP_NUM_THREADS", "1")  # tests run in parallel; test_cpu.py sets more threads itself

import certifi

from tests import fork_server

for name in ("COLUMNS", "LINES"):  # importing readline sets them for all child processes (xdist workers, chats)
    os.environ.pop(name, None)
# httpx loads all trusted certificates in each call (20 ms). No test server uses TLS, so one certificate is enough.
END = "-----END CERTIFICATE-----\n"
one_certificate = tempfile.NamedTemporaryFile("w", suffix=".pem")  # noqa: SIM115 - kept until this process ends
one_certificate.write(Path(certifi.where()).read_text().partition(END)[0] + END)
one_certificate.flush()
os.environ["SSL_CERT_FILE"] = one_certificate.name
signal.signal(signal.SIGINT, signal.default_int_handler)  # shells start background processes with SIGINT ignored


def pytest_configure(config):
    if config.getoption("numprocesses", None) and not hasattr(config, "workerinput"):
        fork_server.start()  # for all xdist workers; this controller runs no tests and needs no fixtures
    else:
        config.pluginmanager.import_plugin("tests.fixtures")
