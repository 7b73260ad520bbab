"""The command line: linalign serve, linalign chat, linalign bench, linalign eval."""

import argparse
import contextlib
import gc
import importlib.metadata
import importlib.util
import logging
import os
import signal
import sys
import threading
from dataclasses import fields
from typing import TYPE_CHECKING

from pydantic import ValidationError

if TYPE_CHECKING:
    from linalign import Engine, EngineConfig
    from linalign.server.settings import Settings

COMMANDS = {
    "serve": "an OpenAI-compatible server, with a playground",
    "chat": "talk with the model of such a server in the terminal",
    "bench": "a load test of such a server",
    "eval": "what principles and ratios do to a model's replies",
}
DESCRIPTION = """
Inference whose replies follow a principle in plain words, such as "Encourage cycling.", as far as a ratio says: Linear
Alignment, at decoding time, without training.
"""
EPILOG = """
Begin with `linalign serve`, which needs no model of yours, then open http://127.0.0.1:8000 or ask `linalign chat`.

examples:
  linalign serve
  linalign serve Qwen/Qwen3-8B --port 8123
  linalign chat --principle "Encourage cycling."
  linalign bench --concurrency 16 --principle "Be brief."
  linalign eval follow --output results/follow --methods linear --ratios 0,2

  curl http://127.0.0.1:8000/v1/chat/completions \\
    -H "Content-Type: application/json" -d '{"model": "smollm2",
      "messages": [{"role": "user", "content": "How do I get to work?"}],
      "principle": "Encourage cycling.", "alignment_ratio": 2}'

environment:
  LINALIGN_NAME         any setting of serve, see `linalign serve --help`
  LINALIGN_API_KEY      the key that chat, bench and eval send
  HF_HUB_OFFLINE=1      no model hub is asked; HF_TOKEN and others hold as well
  CUDA_VISIBLE_DEVICES  the GPUs that may be used
  OMP_NUM_THREADS       threads that compute on a CPU
  CXX                   compiler of the CPU kernels, c++ where it is not set

files:
  ~/.cache/linalign         what the first start makes: kernels and the
                            embedded model, converted ($XDG_CACHE_HOME)
  ~/.cache/huggingface/hub  models from the hub ($HF_HOME)

exit status:
  0    done, or stopped by SIGTERM
  1    it can't be done: the last line on stderr says why
  2    the command line is wrong
  130  stopped by SIGINT
"""


OPEN_TO_EVERYONE = """
*** Anyone who can reach %s may use this server: it has no API keys.
*** Set LINALIGN_API_KEYS or --api-keys-file, or bind to 127.0.0.1."""

EXIT_TIMEOUT = 5.0  # seconds
ADDRESS_TAKEN = 3  # the exit status, uvicorn's own too

log = logging.getLogger(__name__)


def main() -> None:
    from linalign.server.command_line import Page

    commands = "commands:\n" + "\n".join(f"  {name:8}{what}" for name, what in COMMANDS.items())
    parser = argparse.ArgumentParser(
        prog="linalign",
        usage="linalign COMMAND [OPTION ...]",
        description=f"{DESCRIPTION}\n{commands}",
        epilog=EPILOG,
        formatter_class=Page,
    )
    parser.add_argument("--version", action="store_true", help="show the version and exit")
    parser.add_argument("command", nargs="?", choices=COMMANDS, help=argparse.SUPPRESS)
    asked, args = parser.parse_args(sys.argv[1:2]), sys.argv[2:]
    if asked.version:
        print(f"linalign {importlib.metadata.version('linalign')}")
        return
    if not asked.command:
        parser.error(f"which command? {', '.join(COMMANDS)}")
    try:
        run(asked.command, args)
    except KeyboardInterrupt:
        sys.exit(130)


def run(command: str, args: list[str]) -> None:
    if command == "serve":
        serve(args)
    elif command == "chat":
        from linalign.server import terminal_chat

        terminal_chat.main(args)
    elif command == "bench":
        from linalign.server import bench

        bench.main(args)
    else:
        from linalign.evaluation import command as evaluation

        evaluation.main(args)


def engine_config(settings: "Settings") -> "EngineConfig":
    """Every setting that the engine knows by the same name."""
    from linalign import EngineConfig

    names = [field.name for field in fields(EngineConfig)]
    given = settings.model_dump()
    return EngineConfig(**{name: given[name] for name in names if name in given})


def build_engine(settings: "Settings") -> "Engine":
    """Not started yet. Raises LoadingError, ValueError."""
    from linalign import Engine, load

    loaded = load(
        settings.model,
        device=settings.device,
        dtype=settings.dtype,
        quantization=settings.quantization,
        trust_remote_code=settings.trust_remote_code,
        tensor_parallel_size=settings.tensor_parallel_size,
    )
    return Engine(loaded, engine_config(settings))


def checked_settings(args: list[str]) -> "Settings":
    """Those that serve is asked for. What can't be ends the process, before anything is loaded."""
    from linalign import LoadingError
    from linalign.alignment_core.loading import preflight
    from linalign.server.address import AddressTaken, check_address
    from linalign.server.command_line import complaints
    from linalign.server.presets import load_presets
    from linalign.server.settings import load_settings

    try:
        settings = load_settings(args)
        load_presets(settings.presets)
        preflight.check(
            settings.model,
            device=settings.device,
            quantization=settings.quantization,
            tensor_parallel_size=settings.tensor_parallel_size,
            has_cuda=preflight.may_have_cuda(),
            max_model_len=settings.max_model_len,
            kv_cache_dtype=settings.kv_cache_dtype,
        )
        check_address(settings.host, settings.port)
    except ValidationError as error:
        sys.exit("linalign serve: " + complaints(error))
    except (ValueError, LoadingError) as error:
        sys.exit(f"linalign serve: {error}")
    except AddressTaken as error:
        print(f"linalign serve: {error}", file=sys.stderr)
        sys.exit(ADDRESS_TAKEN)
    if settings.otlp_traces_endpoint and importlib.util.find_spec("opentelemetry.sdk") is None:
        sys.exit("linalign serve: otlp_traces_endpoint needs the extra linalign[otel]")
    return settings


def runs_embedded_model(settings: "Settings") -> bool:
    """Whether it is the embedded model, on a CPU, in this process alone."""
    from linalign.alignment_core.loading import checkpoint, preflight

    alone = checkpoint.is_embedded(settings.model) and settings.tensor_parallel_size == 1
    return alone and (settings.device == "cpu" or not preflight.may_have_cuda())


def stop_loading(*_: object) -> None:
    """A signal handler. If a destructor is running, its SystemExit is lost; then a timer ends the process."""
    end = threading.Timer(EXIT_TIMEOUT, os._exit, [0])
    end.daemon = True
    end.start()
    sys.exit()


def serve(args: list[str]) -> None:
    # Until uvicorn has its own: the first process of a container is not ended by a signal that it does not handle.
    signal.signal(signal.SIGTERM, stop_loading)
    from linalign.server import logs
    from linalign.server.keys import is_open_to_everyone
    from linalign.server.settings import PREFIX

    settings = checked_settings(args)
    logs.begin(settings.log_format)
    if settings.is_reachable and not settings.api_keys:
        log.warning(OPEN_TO_EVERYONE, settings.host)
    if settings.api_keys_file and is_open_to_everyone(settings.api_keys_file):
        log.warning("All users of this machine can read the API keys in %s", settings.api_keys_file)
    for name in [name for name in os.environ if name.upper() == PREFIX + "API_KEYS"]:
        del os.environ[name]  # no child needs them
    _allow_many_connections()
    sys.setswitchinterval(0.0005)  # s: a step asks for the GIL many times, beside a thread that reads a long body
    gc.disable()  # a start makes a million objects that stay: looking for garbage among them takes a second
    from linalign import LoadingError
    from linalign.server.lean_imports import lean_imports

    try:
        with lean_imports() if runs_embedded_model(settings) else contextlib.nullcontext():
            engine = build_engine(settings)
        import uvicorn

        from linalign.server.app import create_app
        from linalign.server.http_protocol import BoundedProtocol
        from linalign.server.local_engine import LocalEngine
        from linalign.server.shutdown import CLOSE_TIMEOUT, Server

        app = create_app(LocalEngine(engine), settings)
    except (LoadingError, ValueError) as error:
        sys.exit(f"linalign serve: {error}")
    gc.freeze()  # so that no later collection, of 0.2 s, looks at them again; hardly any of them is garbage
    gc.enable()
    # uvicorn raises the signal again once it has shut down in order; that is no failure.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(_failure_message(engine)))
    options = uvicorn.Config(
        app,
        host=settings.host,
        port=settings.port,
        http=BoundedProtocol,
        ws="none",
        log_config=None,
        access_log=False,
        proxy_headers=bool(settings.forwarded_allow_ips),
        forwarded_allow_ips=list(settings.forwarded_allow_ips),
        timeout_graceful_shutdown=CLOSE_TIMEOUT,
    )
    Server(options, engine, settings.shutdown_timeout).run()
    sys.exit(_failure_message(engine))


def _failure_message(engine: "Engine") -> str | None:
    return f"linalign serve: the engine failed: {engine.error!r}" if engine.error else None


def _allow_many_connections() -> None:
    """As many open files as the system lets a process have: every stream is one."""
    with contextlib.suppress(ImportError, ValueError):  # systems without such limits, or with one that is infinite
        import resource

        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


if __name__ == "__main__":
    main()
