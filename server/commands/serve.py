"""linalign serve: checks the settings, loads the model and runs the HTTP server."""

import contextlib
import gc
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

OPEN_TO_EVERYONE = """
*** Anyone who can reach %s can use this server, because it has no API keys.
*** Set LINALIGN_API_KEYS or --api-keys-file, or bind to 127.0.0.1."""

EXIT_TIMEOUT = 5.0  # seconds
ADDRESS_TAKEN = 3  # exit status, the same as uvicorn's

log = logging.getLogger(__name__)


def engine_config(settings: "Settings") -> "EngineConfig":
    """The engine's configuration: settings of the same names."""
    from linalign import EngineConfig

    names = [field.name for field in fields(EngineConfig)]
    given = settings.model_dump()
    return EngineConfig(**{name: given[name] for name in names if name in given})


def build_engine(settings: "Settings") -> "Engine":
    """Load the model. The engine is not started. Raises LoadingError, ValueError."""
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
    """The settings of serve. Ends the process if they are invalid, before a model is loaded."""
    from linalign import LoadingError
    from linalign.alignment_core.loading import preflight
    from linalign.server.address import AddressTaken, check_address
    from linalign.server.command_line import describe_errors
    from linalign.server.presets import load_presets, presets_of_keys
    from linalign.server.settings_loading import load_settings

    try:
        settings = load_settings(args)
        presets_of_keys(settings.key_presets, load_presets(settings.presets))
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
        sys.exit("linalign serve: " + describe_errors(error))
    except (ValueError, LoadingError) as error:
        sys.exit(f"linalign serve: {error}")
    except AddressTaken as error:
        print(f"linalign serve: {error}", file=sys.stderr)
        sys.exit(ADDRESS_TAKEN)
    if settings.otlp_traces_endpoint and importlib.util.find_spec("opentelemetry.sdk") is None:
        sys.exit("linalign serve: otlp_traces_endpoint needs the extra linalign[otel]")
    return settings


def runs_embedded_model(settings: "Settings") -> bool:
    """Whether the model is the embedded one, on a CPU, in this process only."""
    from linalign.alignment_core.loading import checkpoint, preflight

    is_embedded = checkpoint.is_embedded(settings.model) and settings.tensor_parallel_size == 1
    return is_embedded and (settings.device == "cpu" or not preflight.may_have_cuda())


def stop_loading(*_: object) -> None:
    """A signal handler that exits. Its SystemExit is lost inside a destructor; then a timer ends the process."""
    end = threading.Timer(EXIT_TIMEOUT, os._exit, [0])
    end.daemon = True
    end.start()
    sys.exit()


def main(args: list[str]) -> None:
    # Needed until uvicorn sets its handler: signals without a handler do not end the first process of a container.
    signal.signal(signal.SIGTERM, stop_loading)
    from linalign.server import logs
    from linalign.server.keys import is_open_to_everyone
    from linalign.server.settings import PREFIX

    settings = checked_settings(args)
    logs.configure(settings.log_format)
    if settings.is_reachable and not settings.api_keys:
        log.warning(OPEN_TO_EVERYONE, settings.host)
    if settings.api_keys_file and is_open_to_everyone(settings.api_keys_file):
        log.warning("All users of this machine can read the API keys in %s", settings.api_keys_file)
    for name in [name for name in os.environ if name.upper() == PREFIX + "API_KEYS"]:
        del os.environ[name]  # child processes do not need them
    _allow_many_connections()
    # Seconds; short, because a step takes the GIL often while another thread may read a long body.
    sys.setswitchinterval(0.0005)
    gc.disable()  # the start creates a million lasting objects; collections among them would take a second
    from linalign import LoadingError
    from linalign.server.commands.lean_imports import lean_imports

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
    gc.freeze()  # later collections skip these objects, which saves 0.2 s each
    gc.enable()
    # uvicorn raises the signal again after an orderly shutdown. That is not a failure.
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
    """Raise the limit of open files to the system's maximum, because every stream is one."""
    with contextlib.suppress(ImportError, ValueError):  # systems without such limits, or with an infinite one
        import resource

        _, maximum = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (maximum, maximum))
