"""Converts errors of the library to OpenAI's codes and field names."""

from collections.abc import Mapping

from linalign import EngineDead, InvalidRequest, RequestFailed

CODES = {"invalid": "invalid_value", "too_long": "context_length_exceeded"}
# Names of the library's fields in the HTTP API, on every endpoint.
FIELDS = {
    "continues": "continue_final_message",
    "placement": "principle_placement",
    "principles": "principle",
    "ratio": "alignment_ratio",
    "text": "prompt",
    "variables.reasoning_effort": "reasoning_effort",
}
CHAT_FIELDS = {"logprobs": "top_logprobs", "prompt": "messages"}
# Names of a chat completion's fields in /v1/responses.
RESPONSE_FIELDS = {
    "messages": "input",
    "max_tokens": "max_output_tokens",
    "max_completion_tokens": "max_output_tokens",
    "response_format": "text.format",
    "reasoning_effort": "reasoning.effort",
    "variables.reasoning_effort": "reasoning.effort",
}
# Names of a chat completion's fields in /v1/messages.
MESSAGES_FIELDS = {
    "response_format": "output_config.format",
    "reasoning_effort": "output_config.effort",
    "stop": "stop_sequences",
    "thinking_token_budget": "thinking.budget_tokens",
    "variables.enable_thinking": "thinking",
    "variables.reasoning_effort": "output_config.effort",
}
FIELDS_OF: Mapping[str, Mapping[str, str]] = {
    "/v1/chat/completions": CHAT_FIELDS,
    "/v1/messages": CHAT_FIELDS | MESSAGES_FIELDS,
    "/v1/messages/count_tokens": CHAT_FIELDS | MESSAGES_FIELDS,
    "/v1/responses": RESPONSE_FIELDS
    | {name: RESPONSE_FIELDS.get(as_chat, as_chat) for name, as_chat in CHAT_FIELDS.items()},
}


def code_of(error: InvalidRequest | RequestFailed | EngineDead | None) -> str:
    """The code of an error that ends a reply. None means that the engine has failed."""
    if isinstance(error, InvalidRequest):
        return CODES[error.code]
    return "internal_error" if isinstance(error, RequestFailed) else "engine_dead"


def described(error: InvalidRequest, path: str) -> tuple[str, str | None]:
    """The error's message, and the invalid field's name on the endpoint with this path."""
    if error.field is None:
        return str(error), None
    name = name_on(path, error.field)
    return error.message_for(name), name


def name_on(path: str, field: str) -> str:
    """The name of a field of the library, or of a chat completion, on the endpoint with this path."""
    name = FIELDS_OF.get(path, {}).get(field) or FIELDS.get(field, field)
    return "chat_template_kwargs." + name.removeprefix("variables.") if name.startswith("variables.") else name
