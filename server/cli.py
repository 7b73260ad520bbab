"""The command line: linalign serve, linalign chat, linalign bench, linalign eval."""

import argparse
import contextlib
import gc
import importlib.util
import logging
import os
import signal
import sys
from dataclasses import fields
from typing import TYPE_CHECKING

from pydantic import ValidationError

if TYPE_CHECKING:
    from alignment_core import Engine, EngineConfig
    from server.settings import Settings

COMMANDS = {
    "serve": "an OpenAI-compatible server",
    "chat": "talk with the model of such a server",
    "bench": "a load test of such a server",
    "eval": "what principles and ratios do to a model's replies",
}


OPEN_TO_EVERYONE = """
*** Anyone who can reach %s may use this server: it has no API keys.
*** Set LINALIGN_API_KEYS or --api-keys-file, or bind to 127.0.0.1."""

log = logging.getLogger(__name__)


def main() -> None:
    lines = [f"  {name}  {what} (linalign {name} --help)" for name, what in COMMANDS.items()]
    parser = argparse.ArgumentParser(
        prog="linalign",
        description="Inference with Linear Alignment.",
        epilog="commands:\n" + "\n".join(lines),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("command", choices=COMMANDS)
    command, args = parser.parse_args(sys.argv[1:2]).command, sys.argv[2:]
    if command == "serve":
        serve(args)
    elif command == "chat":
        from server import chat

        chat.main(args)
    elif command == "bench":
        from server import bench

        bench.main(args)
    else:
        try:
            from evaluation import command as evaluation
        except ModuleNotFoundError as error:
            sys.exit(f"linalign eval needs more: pip install 'linalign[eval]' ({error})")
        evaluation.main(args)


def engine_config(settings: "Settings") -> "EngineConfig":
    """Every setting that the engine knows by the same name."""
    from alignment_core import EngineConfig

    names = [field.name for field in fields(EngineConfig)]
    given = settings.model_dump()
    return EngineConfig(**{name: given[name] for name in names if name in given})


def build_engine(settings: "Settings") -> "Engine":
    """Not started yet. Raises LoadingError, ValueError."""
    from alignment_core import Engine, load

    loaded = load(
        settings.model,
        device=settings.device,
        dtype=settings.dtype,
        quantization=settings.quantization,
        trust_remote_code=settings.trust_remote_code,
        tensor_parallel_size=settings.tensor_parallel_size,
    )
    return Engine(loaded, engine_config(settings))


def serve(args: list[str]) -> None:
    from server import logs
    from server.presets import load_presets
    from server.settings import PREFIX, complaints, load_settings

    try:
        settings = load_settings(args)
        load_presets(settings.presets)  # before the model is
    except ValidationError as error:
        sys.exit("linalign serve: " + complaints(error))
    except ValueError as error:
        sys.exit(f"linalign serve: {error}")

    if settings.otlp_traces_endpoint and importlib.util.find_spec("opentelemetry.sdk") is None:
        sys.exit("linalign serve: otlp_traces_endpoint needs more: pip install 'linalign[otel]'")
    logs.begin(settings.log_format)
    if settings.is_reachable and not settings.api_keys:
        log.warning(OPEN_TO_EVERYONE, settings.host)
    for name in [name for name in os.environ if name.upper() == PREFIX + "API_KEYS"]:
        del os.environ[name]  # no child needs them
    _allow_many_connections()
    gc.disable()  # a start makes a million objects that stay: looking for garbage among them takes a second
    import uvicorn

    from alignment_core import LoadingError
    from server.app import create_app
    from server.http_protocol import BoundedProtocol
    from server.shutdown import LAST_WORDS, Server

    try:
        engine = build_engine(settings)
        app = create_app(engine, settings)
    except (LoadingError, ValueError) as error:
        sys.exit(f"linalign serve: {error}")
    gc.collect()
    gc.freeze()  # so that no later collection, of 0.2 s, looks at them again
    gc.enable()
    # uvicorn raises the signal again once it has shut down in order; that is no failure.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(_last_words(engine)))
    options = uvicorn.Config(
        app,
        host=settings.host,
        port=settings.port,
        http=BoundedProtocol,
        log_config=None,
        access_log=False,
        proxy_headers=bool(settings.forwarded_allow_ips),
        forwarded_allow_ips=list(settings.forwarded_allow_ips),
        timeout_graceful_shutdown=LAST_WORDS,
    )
    Server(options, engine, settings.shutdown_timeout).run()
    sys.exit(_last_words(engine))


def _last_words(engine: "Engine") -> str | None:
    return f"linalign serve: the engine failed: {engine.error!r}" if engine.error else None


def _allow_many_connections() -> None:
    """As many open files as the system lets a process have: every stream is one."""
    with contextlib.suppress(ImportError, ValueError):  # systems without such limits, or with one that is infinite
        import resource

        _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
