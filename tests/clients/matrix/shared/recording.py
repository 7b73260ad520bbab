"""Runs command-line agents behind a relay that keeps what the agent and the server send."""

import contextlib
import json
import os
import re
import select
import signal
import socket
import socketserver
import subprocess
import tempfile
import threading
from pathlib import Path
from urllib.parse import urlsplit

OPTIONS = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}


class Recording:
    """Bytes of one run: `sent` by the agent, `received` by it."""

    def __init__(self, url, timeout):
        """url: Where the agent should send its requests. timeout: Seconds of one run."""
        self.url, self.timeout, self.sent, self.received = url, timeout, bytearray(), bytearray()

    def run(self, command, files, **variables):
        """Run an agent with these files in its home directory, and these environment variables ("{home}" is its home).

        Returns its exit status, stdout and stderr. Raises TimeoutExpired.
        """
        self.sent.clear()
        self.received.clear()
        with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as home:
            for name, text in files.items():
                Path(home, name).parent.mkdir(parents=True, exist_ok=True)
                Path(home, name).write_text(text)
            env = {"PATH": os.environ["PATH"], "HOME": home, "OPENAI_API_KEY": "none"}
            env |= {name: value.format(home=home) for name, value in variables.items()}
            process = subprocess.Popen(command, cwd=home, env=env, start_new_session=True, **OPTIONS)
            try:
                output, errors = process.communicate(timeout=self.timeout)
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
        return process.returncode, output, errors

    @property
    def is_aligned(self):
        """Whether the server has aligned a reply."""
        return b"x-linalign-alignment: principle=" in self.received.lower()

    @property
    def streamed_text(self):
        """The text of streamed chat completions."""
        pieces = re.findall(rb'"delta":{[^}]*"content":("(?:[^"\\]|\\.)*")', self.received)
        return "".join(map(json.loads, pieces)).strip()


@contextlib.contextmanager
def recording(url, timeout=200):
    """A relay in front of the server at this URL. timeout: Seconds of one run."""
    place = urlsplit(url)

    class Relay(socketserver.BaseRequestHandler):
        def handle(self):
            server = socket.create_connection((place.hostname, place.port))
            with server, contextlib.suppress(ConnectionError):
                while True:
                    for source in select.select([self.request, server], [], [])[0]:
                        if not (data := source.recv(65536)):
                            return
                        (record.received if source is server else record.sent).extend(data)
                        (self.request if source is server else server).sendall(data)

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Relay) as relay:
        relay.daemon_threads = True
        record = Recording(f"http://127.0.0.1:{relay.server_address[1]}{place.path}", timeout)
        threading.Thread(target=relay.serve_forever, daemon=True).start()
        yield record
        relay.shutdown()
