"""One model over several processes, each with a part of every layer, by transformers' own plans.

All of them run the same forward passes. Rank 0 is the process that loads the model for its user: it
starts the others, plans every step, tells them, and alone draws. They end with it.
"""

import atexit
import contextlib
import json
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from typing import IO

import torch.distributed as dist

from linalign.alignment_core.attention.paged_batch import Plan
from linalign.alignment_core.execution.process_messages import pack, unpack

PATIENCE = 10.0  # seconds that followers get to end
HERE = "127.0.0.1"


class FollowerDied(RuntimeError):
    """A process of a model in several parts is gone; no forward pass is possible any more."""


class Followers:
    """What rank 0 knows of the others.

    Every message goes to all of them, through their standard input: first the RunnerConfig, then numbers of pages to
    allocate and plans to run, then None.
    store: where all processes find each other; it lives here.
    """

    def __init__(self, processes: Sequence["subprocess.Popen[bytes]"], store: object) -> None:
        self._processes, self._store = processes, store
        atexit.register(self.end)

    def tell(self, message: object) -> None:
        """Raises FollowerDied."""
        data = pack(message)
        for rank, process in enumerate(self._processes, 1):
            if process.poll() is not None:
                raise FollowerDied(f"rank {rank} has ended with {process.returncode}")
            assert process.stdin is not None
            try:
                process.stdin.write(data)
                process.stdin.flush()
            except OSError as error:
                raise FollowerDied(f"rank {rank} does not listen any more: {error}") from error

    def end(self) -> None:
        """Let them end, or make them."""
        with contextlib.suppress(FollowerDied):
            self.tell(None)
        for process in self._processes:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(PATIENCE)
        self.kill()
        if dist.is_initialized():
            dist.destroy_process_group()

    def kill(self) -> None:
        atexit.unregister(self.end)
        for process in self._processes:
            process.kill()
            process.wait()


def start(size: int, arguments: Mapping[str, object]) -> Followers:
    """Start the processes of ranks 1 to size − 1, which `load` the model with these arguments, and become rank 0.

    Nobody beyond this machine can reach what they listen on.
    """
    listener = socket.create_server((HERE, 0))
    port = listener.getsockname()[1]
    # torch's own would listen on every address; in torchrun's way each rank looks for one that is there already.
    store = dist.TCPStore(  # type: ignore[attr-defined]
        HERE, port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach()
    )
    loopback = next(name for _, name in socket.if_nameindex() if name.startswith("lo"))
    os.environ.update(MASTER_ADDR=HERE, MASTER_PORT=str(port), WORLD_SIZE=str(size), RANK="0", LOCAL_RANK="0")
    os.environ.update(TORCHELASTIC_USE_AGENT_STORE="True", GLOO_SOCKET_IFNAME=loopback, NCCL_SOCKET_IFNAME=loopback)
    # -P: no package of the directory that happens to be the current one.
    command = [sys.executable, "-P", "-c", f"from {__name__} import follow; follow()", json.dumps(arguments)]
    processes = [
        subprocess.Popen(command, env={**os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank)}, stdin=subprocess.PIPE)
        for rank in range(1, size)
    ]
    return Followers(processes, store)


def is_follower() -> bool:
    return int(os.environ.get("RANK", "0")) > 0


def follow() -> None:
    """The life of a follower, whose command line has the arguments of `load`."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal tells all processes; rank 0 decides what it means
    from linalign.alignment_core.execution.model_runner import ModelRunner, RunnerConfig
    from linalign.alignment_core.loading.loader import load

    messages: queue.SimpleQueue[object] = queue.SimpleQueue()
    stream = os.fdopen(os.dup(sys.stdin.fileno()), "rb")
    os.dup2(os.open(os.devnull, os.O_RDONLY), sys.stdin.fileno())  # for whatever else might read it
    kinds = {kind.__name__: kind for kind in (Plan, RunnerConfig)}
    threading.Thread(target=_listen, args=(stream, kinds, messages), daemon=True).start()
    model = load(**json.loads(sys.argv[1])).model
    config = messages.get()
    assert isinstance(config, RunnerConfig)
    runner = ModelRunner(model, config)
    while (message := messages.get()) is not None:
        if isinstance(message, Plan):
            runner.run(message)
        else:
            assert isinstance(message, int)
            runner.allocate(message)
    dist.destroy_process_group()


def _listen(stream: IO[bytes], kinds: Mapping[str, type], messages: "queue.SimpleQueue[object]") -> None:
    """In a thread of its own, as a collective operation may wait for ever for a rank 0 that is gone."""
    message: object = ...
    while message is not None:
        try:
            message = unpack(stream, kinds)
        except EOFError:
            os._exit(1)
        messages.put(message)
