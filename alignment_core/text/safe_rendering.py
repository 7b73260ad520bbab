"""Renders chats so that their only control tokens are the template's own."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from linalign.alignment_core.text.chat_template import ChatTemplate, Rendering
from linalign.alignment_core.text.escaping import Escapes, Forbidden
from linalign.alignment_core.text.message_rewriting import Messages
from linalign.alignment_core.text.safe_encoding import SafeEncoder


@dataclass(frozen=True, slots=True)
class SafeChat:
    """A rendered chat without a principle, in which control tokens of clients are escaped."""

    text: str  # the rendered chat
    messages: Messages  # escaped
    rendering: Rendering  # its tools and variables are escaped
    escapes: Escapes


def render_safely(
    messages: Sequence[Mapping[str, Any]], rendering: Rendering, template: ChatTemplate, encoder: SafeEncoder
) -> SafeChat:
    """Render a chat so that all control tokens in it are the template's own. Raises InvalidRequest.

    A template may produce a control token from harmless texts, for example by removing parts of them. If so, every
    punctuation character that control tokens contain is escaped, and not only whole control tokens.
    """
    chat = _rendered(messages, rendering, template, encoder.tokens)
    chat_without_marks = _escaped(messages, rendering, template, encoder.marks)
    if chat_without_marks.escapes.used:
        text = template.text(chat_without_marks.messages, chat_without_marks.rendering)
        if encoder.control_tokens(chat.text) - encoder.control_tokens(text):
            return replace(chat_without_marks, text=text)
    return chat


def _rendered(
    messages: Sequence[Mapping[str, Any]], rendering: Rendering, template: ChatTemplate, forbidden: Forbidden
) -> SafeChat:
    chat = _escaped(messages, rendering, template, forbidden)
    return replace(chat, text=template.text(chat.messages, chat.rendering))


def _escaped(
    messages: Sequence[Mapping[str, Any]], rendering: Rendering, template: ChatTemplate, forbidden: Forbidden
) -> SafeChat:
    """The chat with placeholders for all forbidden texts, not yet rendered."""
    escapes = Escapes()
    patterns = {"assistant": forbidden.in_replies}
    safe: Messages = [
        escapes.apply_to_all(patterns.get(message["role"], forbidden.in_texts), dict(message))
        | {"role": message["role"]}
        for message in messages
    ]
    tools = escapes.apply_to_all(forbidden.in_texts, list(rendering.tools))
    variables = escapes.apply_to_all(forbidden.in_texts, dict(rendering.variables))
    with_tools = template.with_tools(safe, replace(rendering, tools=tools, variables=variables))
    return SafeChat("", *with_tools, escapes)
