"""From the messages of a request to the text that the model continues.

Knows the requests' fields, the chat format and the form of tools; nothing of tokens.
"""

from collections.abc import Iterator, Sequence

from model.chat_format import ChatFormatError, Turn, render
from model.tool_calls import ToolCall, calls_text, describe, result_text
from server.http.chat_message import ChatMessage
from server.http.errors import bad_request
from server.http.tool_fields import Tool


def chat_prompt(messages: Sequence[ChatMessage], tools: Sequence[Tool] = ()) -> str:
    """The conversation as the model reads it.

    Args:
        messages: at least one.
        tools: that the model is told of, after the system messages.

    Raises:
        ApiError: it is none: of a role that there is not, without a last word of the user's, or with the result of a
            call that nobody made.
    """
    turns = list(_turns(messages))
    if tools:
        turns.append(Turn("system", describe([tool.function.function for tool in tools])))
    try:
        return render(turns)
    except ChatFormatError as error:
        raise bad_request(f"Invalid 'messages': {error}.", "messages") from None


def _turns(messages: Sequence[ChatMessage]) -> Iterator[Turn]:
    called: dict[str | None, str] = {}
    for number, message in enumerate(messages):
        text = message.content or ""
        if message.tool_calls:
            called |= {call.id: call.function.name for call in message.tool_calls}
            calls = calls_text(ToolCall(call.function.name, call.function.arguments) for call in message.tool_calls)
            text = f"{text}\n\n{calls}" if text else calls
        if message.role == "tool":
            name = called.get(message.tool_call_id)
            if name is None:
                field = f"messages[{number}].tool_call_id"
                raise bad_request(f"Invalid '{field}': no message before this one makes a call of this id.", field)
            text = result_text(name, text)
        yield Turn(message.role, text)
