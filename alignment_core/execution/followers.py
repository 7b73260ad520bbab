"""One model over several processes, each with a part of every layer, by transformers' own plans.

All processes run the same forward passes. Rank 0 loads the model for its user, starts the followers
(loading/follower.py), plans every step and sends the plans to the followers. Only rank 0 draws. The followers end with
rank 0.
"""

import atexit
import contextlib
import json
import os
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence

import torch.distributed as dist

from linalign.alignment_core.execution.process_messages import pack

TIME_TO_END = 10.0  # seconds that followers get to end
# A terminal sends SIGINT to all processes; rank 0 decides what it means. The follower ignores it before slow imports.
FOLLOWER = """
import signal
signal.signal(signal.SIGINT, signal.SIG_IGN)
from linalign.alignment_core.loading.follower import follow
follow()
"""
HERE = "127.0.0.1"


class FollowerDied(RuntimeError):
    """A follower process has ended, so no further forward pass is possible."""


class Followers:
    """The followers of rank 0.

    Every message goes to all followers, through their standard input: first the RunnerConfig, then numbers of pages to
    allocate and plans to run, then None.
    store: torch's store, through which the processes find each other; kept alive here.
    """

    def __init__(self, processes: Sequence["subprocess.Popen[bytes]"], store: object) -> None:
        self._processes, self._store = processes, store
        atexit.register(self.end)

    def send(self, message: object) -> None:
        """Raises FollowerDied."""
        data = pack(message)
        for rank, process in enumerate(self._processes, 1):
            if process.poll() is not None:
                raise FollowerDied(f"rank {rank} ended with exit status {process.returncode}")
            assert process.stdin is not None
            try:
                process.stdin.write(data)
                process.stdin.flush()
            except OSError as error:
                raise FollowerDied(f"rank {rank} no longer reads: {error}") from error

    def end(self) -> None:
        """Ask the followers to end; kill those that do not."""
        with contextlib.suppress(FollowerDied):
            self.send(None)
        for process in self._processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(TIME_TO_END)
        self.kill()
        if dist.is_initialized():
            dist.destroy_process_group()

    def kill(self) -> None:
        atexit.unregister(self.end)
        for process in self._processes:
            process.kill()
            process.wait()


def start_followers(size: int, arguments: Mapping[str, object]) -> Followers:
    """Start the processes of ranks 1 to size − 1, which `load` the model with these arguments, and become rank 0.

    Their sockets listen only on the loopback address.
    """
    listener = socket.create_server((HERE, 0))
    port = listener.getsockname()[1]
    # torch's own store would listen on every address. As under torchrun, each rank looks for an existing store.
    store = dist.TCPStore(  # type: ignore[attr-defined]
        HERE, port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach()
    )
    loopback = next(name for _, name in socket.if_nameindex() if name.startswith("lo"))
    os.environ.update(MASTER_ADDR=HERE, MASTER_PORT=str(port), WORLD_SIZE=str(size), RANK="0", LOCAL_RANK="0")
    os.environ.update(TORCHELASTIC_USE_AGENT_STORE="True", GLOO_SOCKET_IFNAME=loopback, NCCL_SOCKET_IFNAME=loopback)
    # -P: import nothing from the current directory.
    command = [sys.executable, "-P", "-c", FOLLOWER, json.dumps(arguments)]
    processes = [
        subprocess.Popen(command, env={**os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank)}, stdin=subprocess.PIPE)
        for rank in range(1, size)
    ]
    return Followers(processes, store)


def is_follower() -> bool:
    return int(os.environ.get("RANK", "0")) > 0
