"""The main program of the processes that follow rank 0: see execution/followers.py."""

import json
import os
import queue
import sys
import threading
from collections.abc import Mapping
from typing import IO

import torch.distributed as dist

from linalign.alignment_core.attention.paged_batch import Plan
from linalign.alignment_core.execution.model_runner import ModelRunner, RunnerConfig
from linalign.alignment_core.execution.process_messages import unpack
from linalign.alignment_core.loading.loader import load


def follow() -> None:
    """The life of a follower, whose command line has the arguments of `load`."""
    messages: queue.SimpleQueue[object] = queue.SimpleQueue()
    stream = os.fdopen(os.dup(sys.stdin.fileno()), "rb")
    os.dup2(os.open(os.devnull, os.O_RDONLY), sys.stdin.fileno())  # for other code that might read it
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
    """Read messages in a thread, because a collective operation may wait for ever for a rank 0 that is gone."""
    message: object = ...
    while message is not None:
        try:
            message = unpack(stream, kinds)
        except EOFError:
            os._exit(1)
        messages.put(message)
