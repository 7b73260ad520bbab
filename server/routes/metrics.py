"""GET /metrics, for Prometheus."""

from fastapi import APIRouter, Request, Response
from fastapi.responses import PlainTextResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

from linalign.server.state import state_of

router = APIRouter()


@router.get("/metrics", response_class=PlainTextResponse)
async def metrics(request: Request) -> Response:
    state = state_of(request)
    state.measures.engines.stats = await state.engine.all_stats()
    return Response(generate_latest(state.measures.registry), media_type=CONTENT_TYPE_LATEST)
