"""Where a request's principle and its ratio come from: body, headers, the model's name, or the API key.

Many clients can set only headers, a key or the name of a model.
"""

from typing import Any, TypeVar
from urllib.parse import unquote_to_bytes

from fastapi import Request

from linalign.server.exchange import Applied, exchange_of
from linalign.server.models import preset_of
from linalign.server.presets import ratio_of
from linalign.server.protocol.generation import AlignmentFields, Preset
from linalign.server.protocol.strict_json import InvalidBody
from linalign.server.state import state_of

PRINCIPLE_HEADER, RATIO_HEADER = "X-Linalign-Principle", "X-Linalign-Ratio"
APPLIED_HEADER = "X-Linalign-Alignment"
PRESET_FIELDS = Preset.model_fields.keys() - {"description"}
Body = TypeVar("Body", bound=AlignmentFields)


def aligned(body: Body, request: Request) -> Body:
    """The request with the alignment fields of all sources. Each field comes from the first source that has it.

    The preset of an API key applies only if no other source has a principle, because its ratio belongs to its
    principle. Raises ModelNotFound, and InvalidBody for a header that can't be used or a source that is switched off.
    """
    state, exchange = state_of(request), exchange_of(request.scope)
    sources = {
        "body": {name: value for name in PRESET_FIELDS if (value := getattr(body, name, None)) is not None},
        "headers": _from_headers(request),
        "model": _values(preset_of(body.model, state)),
    }
    for source in ("body", "headers"):
        if sources[source] and source not in state.settings.alignment_from:
            message = f"this server takes no alignment fields from the {source}"
            field = min(sources[source]) if source == "body" else PRINCIPLE_HEADER
            raise InvalidBody(message, field, "alignment_source_disabled")
    if exchange.key in state.key_presets and not any("principle" in values for values in sources.values()):
        sources["key"] = _values(state.key_presets[exchange.key])
    chosen: dict[str, tuple[str, Any]] = {}
    for source, values in sources.items():
        for name in values.keys() & type(body).model_fields.keys():
            chosen.setdefault(name, (source, values[name]))
    model = state.engine.model_id if body.model is None else body.model
    body = body.model_copy(update={"model": model, **{name: value for name, (_, value) in chosen.items()}})
    if "principle" in chosen:
        ratios = [principle.ratio for principle in body.principles(state.settings.default_alignment_ratio)]
        principle_from = chosen["principle"][0]
        ratio_from = chosen["alignment_ratio"][0] if "alignment_ratio" in chosen else "default"
        if not isinstance(body.principle, str) and all(item.ratio is not None for item in body.principle or ()):
            ratio_from = principle_from
        exchange.applied = Applied(principle_from, ratio_from, ratios, body.alignment_method or "linear")
    else:
        names = {"headers": RATIO_HEADER, "model": "model"}
        exchange.ignored += [names.get(source, name) for name, (source, _) in chosen.items() if source != "key"]
    return body


def _values(preset: Preset) -> dict[str, Any]:
    return {name: value for name in PRESET_FIELDS if (value := getattr(preset, name)) is not None}


def _from_headers(request: Request) -> dict[str, Any]:
    values: dict[str, Any] = {}
    if text := request.headers.get(PRINCIPLE_HEADER, ""):
        try:
            values["principle"] = unquote_to_bytes(text.encode("latin-1")).decode()
        except UnicodeDecodeError as error:
            message = f"{PRINCIPLE_HEADER} must be percent-encoded UTF-8"
            raise InvalidBody(message, PRINCIPLE_HEADER, "invalid_value") from error
    if text := request.headers.get(RATIO_HEADER, ""):
        try:
            values["alignment_ratio"] = ratio_of(text)
        except ValueError as error:
            raise InvalidBody(f"{RATIO_HEADER}: {error}", RATIO_HEADER, "invalid_value") from error
    return values
