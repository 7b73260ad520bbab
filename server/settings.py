"""Server settings: one name, three spellings. Flag > LINALIGN_* > config file > default."""

import argparse
import difflib
import ipaddress
import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import Field, ValidationError, ValidationInfo, field_validator, model_validator
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

from server.keys import hashed, keys_of

PREFIX = "LINALIGN_"


class Settings(BaseSettings):
    """Serve a model. Every flag is also a variable LINALIGN_NAME and a key of the YAML config file."""

    model_config = SettingsConfigDict(
        env_prefix=PREFIX,
        cli_kebab_case=True,
        cli_prog_name="linalign serve",
        extra="forbid",
        allow_inf_nan=False,
    )

    model: CliPositionalArg[str | None] = Field(
        None, description="directory, .gguf file or Hugging Face id; the embedded smollm2 where there is none"
    )
    config: Path | None = Field(None, description="YAML file of these settings")
    host: str = "127.0.0.1"
    port: int = Field(8000, ge=0, le=65535)
    api_keys: Annotated[tuple[bytes, ...], NoDecode] = Field(
        (),
        description="comma-separated; where there are any, requests need one (a flag shows in process lists); "
        "only their hashes are kept",
        repr=False,
    )
    api_keys_file: Path | None = Field(None, description="file of more of them, one a line")
    metrics_without_key: CliImplicitFlag[bool] = Field(False, description="/metrics is open to everyone")
    max_requests_per_key: int | None = Field(
        None, ge=1, description="choices included, at once, of each key; beyond is a 429"
    )
    max_tokens_per_minute_per_key: int | None = Field(
        None, ge=1, description="of prompts and replies, for each API key; beyond is a 429"
    )
    prefix_cache_per_key: CliImplicitFlag[bool] = Field(
        False, description="no API key reuses, or can find out about, prefixes that another has computed"
    )
    cors_origins: Annotated[tuple[str, ...], NoDecode] = Field(
        (), description="comma-separated origins whose pages may call, such as https://chat.example.org; * for all"
    )
    forwarded_allow_ips: Annotated[tuple[str, ...], NoDecode] = Field(
        (), description="comma-separated addresses or networks of proxies whose X-Forwarded-For and -Proto are believed"
    )
    log_format: Literal["text", "json"] = Field("text", description="of the log, on stderr")
    otlp_traces_endpoint: str | None = Field(
        None, description="where to send OpenTelemetry traces, such as http://127.0.0.1:4318/v1/traces"
    )
    device: str = Field("auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$", description="auto, cpu, cuda or cuda:N")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"
    quantization: Literal["auto", "none", "int8", "int4", "fp8"] = Field(
        "auto",
        description="weights: auto (on a CPU the smallest format that loses nothing), none, int8, int4, fp8 (GPU)",
    )
    kv_cache_dtype: Literal["auto", "float32", "bfloat16", "float16", "fp8"] = Field(
        "auto", description="numbers of the KV cache, the model's own by default; a CPU has float32 alone"
    )
    max_model_len: int | None = Field(None, ge=2, description="tokens of the longest context, the reply included")
    max_num_seqs: int = Field(64, ge=1, description="sequences that run at once")
    max_queued_requests: int = Field(1024, ge=1, description="choices that may wait; beyond them requests are a 429")
    max_queued_tokens: int = Field(4_000_000, ge=1, description="prompt tokens, all branches, that may wait")
    max_body_bytes: int = Field(8 << 20, ge=1024, description="longest body of a request; beyond it is a 413")
    max_num_batched_tokens: int | None = Field(
        None, ge=1, description="query tokens of one forward pass; 128 on a CPU, 2048 on a GPU"
    )
    gpu_memory_utilization: float = Field(
        0.9, gt=0, le=1, description="share of the GPU memory that weights and steps leave, for the KV cache"
    )
    batch_invariant: CliImplicitFlag[bool] = Field(
        False,
        description="on a GPU: replies do not depend on what else is in the batch, at some cost; on a CPU always so",
    )
    enforce_eager: CliImplicitFlag[bool] = Field(False, description="on a GPU: neither CUDA graphs nor torch.compile")
    num_speculative_tokens: int | None = Field(
        None, ge=0, le=64, description="longest draft of prompt lookup, 0 for none; 8 on a GPU, 0 on a CPU"
    )
    tensor_parallel_size: int = Field(1, ge=1, description="processes that hold a part of every layer each, a GPU each")
    default_alignment_ratio: float = Field(2.0, ge=-10, le=20, description="for requests that name none")
    presets: Path | None = Field(None, description="YAML file of presets; those of configs/presets.yaml by default")
    shutdown_timeout: int = Field(30, ge=0, description="seconds that running requests get on SIGTERM")
    trust_remote_code: CliImplicitFlag[bool] = Field(
        False, description="run Python code that a checkpoint brings along"
    )

    @field_validator("api_keys", "cors_origins", "forwarded_allow_ips", mode="before")
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
    def is_reachable(self) -> bool:
        """Whether other machines can reach the server."""
        try:
            return not ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return self.host != "localhost"


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


def complaints(error: ValidationError) -> str:
    """What is wrong with which settings, in one line."""
    return "; ".join(f"{'.'.join(map(str, e['loc'])) or 'settings'}: {e['msg']}" for e in error.errors())


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


def load_settings(args: list[str]) -> Settings:
    """Settings from a command line. Raises ValueError (pydantic's own included), SystemExit for --help."""
    known = [PREFIX + name.upper() for name in (*Settings.model_fields, "api_key")]  # the last is for our clients
    for name in os.environ:
        if name.upper().startswith(PREFIX) and name.upper() not in known:
            raise ValueError(f"there is no setting {name}{nearest(name.upper(), known)}")

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
    return CliApp.run(WithFile, cli_args=args)
