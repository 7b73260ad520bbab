"""What request schemas share whose requests are served as chat completions."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from pydantic import PrivateAttr
from pydantic_core import PydanticCustomError

from linalign.server.protocol.chat_messages import AnyMessage
from linalign.server.protocol.chat_request import ChatCompletionRequest
from linalign.server.protocol.generation import AlignmentFields
from linalign.server.protocol.schema import field_error


class ChatLike(AlignmentFields):
    """A request that is served as a chat completion."""

    _chat: ChatCompletionRequest = PrivateAttr()

    @property
    def chat(self) -> ChatCompletionRequest:
        """The request as a chat completion, with the alignment fields of this object."""
        names = (*AlignmentFields.model_fields, "principle_placement")
        return self._chat.model_copy(update={name: getattr(self, name) for name in names})

    def convert(
        self, messages: Sequence[AnyMessage], fields: Mapping[str, Any], same: Collection[str], names: Mapping[str, str]
    ) -> None:
        """Set the chat completion. Its parts are validated already.

        fields: Its fields. same: Fields that have the same names in this request. names: Names in this request of
        fields that errors name. Raises PydanticCustomError for fields that do not fit together.
        """
        given = {name: getattr(self, name) for name in (*AlignmentFields.model_fields, *same)}
        given = {name: value for name, value in {**given, **fields}.items() if value is not None}
        self._chat = ChatCompletionRequest.model_construct(messages=list(messages), **given)
        try:
            self._chat.check()
        except PydanticCustomError as error:
            param = (error.context or {})["param"]
            raise field_error(names.get(param, param), error.message()) from error
        self._ignored += self._chat.ignored
