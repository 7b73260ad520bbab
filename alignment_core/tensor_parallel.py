"""One model over several processes, each with a part of every layer, by transformers' own plans.

All of them run the same forward passes. Rank 0 is the process that loads the model for its user: it
starts the others, plans every step, tells them, and alone draws. They end with it.
"""

import atexit
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import timedelta

import torch.distributed as dist

from alignment_core.attention.paged_batch import Plan

IDLE = timedelta(days=3650)  # how long followers may wait for a request
PATIENCE = 10.0  # seconds that they get to end


class FollowerDied(RuntimeError):
    """A process of a model in several parts is gone; no forward pass is possible any more."""


class Followers:
    """What rank 0 knows of the others.

    Every message is one object to all: first the RunnerConfig, then numbers of pages to allocate and plans to
    run, then None.
    """

    def __init__(self, processes: Sequence["subprocess.Popen[bytes]"]) -> None:
        self._processes = processes
        self._control = control_group()
        atexit.register(self.end)

    def tell(self, message: object) -> None:
        """Raises FollowerDied."""
        for rank, process in enumerate(self._processes, 1):
            if process.poll() is not None:
                raise FollowerDied(f"rank {rank} has ended with {process.returncode}")
        dist.broadcast_object_list([message], src=0, group=self._control)

    def end(self) -> None:
        """Let them end, or make them."""
        atexit.unregister(self.end)
        with contextlib.suppress(RuntimeError):
            self.tell(None)
        for process in self._processes:
            try:
                process.wait(PATIENCE)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        dist.destroy_process_group()


def start(size: int, arguments: Mapping[str, object]) -> list["subprocess.Popen[bytes]"]:
    """Start the processes of ranks 1 to size − 1, which `load` the model with these arguments, and become rank 0."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), WORLD_SIZE=str(size), RANK="0", LOCAL_RANK="0")
    command = [sys.executable, "-c", f"from {__name__} import follow; follow()", json.dumps(arguments)]
    return [
        subprocess.Popen(command, env={**os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank)})
        for rank in range(1, size)
    ]


def is_follower() -> bool:
    return int(os.environ.get("RANK", "0")) > 0


def control_group() -> dist.ProcessGroup | None:
    """For plans, which are data of the host; all ranks must ask for it."""
    return dist.new_group(backend="gloo", timeout=IDLE)  # type: ignore[no-any-return]


def follow() -> None:
    """The life of a follower, whose command line has the arguments of `load`."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal tells all processes; rank 0 decides what it means
    from alignment_core.loading import load
    from alignment_core.model_runner import ModelRunner, RunnerConfig

    model = load(**json.loads(sys.argv[1])).model
    control = control_group()

    def told() -> object:
        message: list[object] = [None]
        dist.broadcast_object_list(message, src=0, group=control)
        return message[0]

    config = told()
    assert isinstance(config, RunnerConfig)
    runner = ModelRunner(model, config)
    while (message := told()) is not None:
        if isinstance(message, Plan):
            runner.run(message)
        else:
            assert isinstance(message, int)
            runner.allocate(message)
    dist.destroy_process_group()
