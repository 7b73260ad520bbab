"""The evaluated model: behind a server, or in this process."""

import asyncio
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any

import httpx

from linalign import Engine, EngineConfig, load
from linalign.server.app import create_app
from linalign.server.local_engine import LocalEngine
from linalign.server.settings_loading import load_settings


class Target:
    """One model behind an OpenAI-compatible API. Raises httpx.HTTPError."""

    def __init__(self, client: httpx.AsyncClient, model: str, concurrency: int) -> None:
        self.model = model
        self._client = client
        self._slots = asyncio.Semaphore(concurrency)

    async def chat(self, messages: Sequence[Mapping[str, str]], **fields: Any) -> dict[str, Any]:
        """The first choice of a chat completion."""
        body = {"model": self.model, "messages": list(messages), **fields}
        async with self._slots:
            response = await self._client.post("/v1/chat/completions", json=body)
        if response.is_error:
            raise httpx.HTTPError(f"{response.status_code}: {response.text[:500]}")
        choice: dict[str, Any] = response.json()["choices"][0]
        return choice


@asynccontextmanager
async def remote(url: str, model: str | None, api_key: str, concurrency: int) -> AsyncIterator[Target]:
    """A model of a running server. model: Its name; None for the first that the server lists."""
    headers = {"Authorization": f"Bearer {api_key}"}
    limits = httpx.Limits(max_connections=None)
    async with httpx.AsyncClient(base_url=url, headers=headers, timeout=1800, limits=limits) as client:
        if model is None:
            response = await client.get("/v1/models")
            response.raise_for_status()
            model = response.json()["data"][0]["id"]
        assert model is not None
        yield Target(client, model, concurrency)


@asynccontextmanager
async def in_process(name: str | None, dtype: str, quantization: Any, concurrency: int) -> AsyncIterator[Target]:
    """A model in this process, behind the server's application without a socket. name: As for `linalign serve`."""
    loaded = load(name, dtype=dtype, quantization=quantization)
    # Pages of one token, because many requests differ only at the end of the prompt.
    config = EngineConfig(max_model_len=min(2048, loaded.max_model_len), page_size=1)
    with Engine(loaded, config) as engine:
        transport = httpx.ASGITransport(create_app(LocalEngine(engine), load_settings([])))
        async with httpx.AsyncClient(transport=transport, base_url="http://localhost", timeout=None) as client:
            yield Target(client, engine.model_id, concurrency)
