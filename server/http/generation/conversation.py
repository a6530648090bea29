"""From the messages of a request to the prompt that the model continues.

Knows the requests' fields, the chat formats and the form of tools; nothing of tokens.
"""

import asyncio
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from persimmon.model.chat import ROLES, Chat
from persimmon.model.chat_format import ChatFormatError, Turn
from persimmon.model.chat_prompt import ChatPrompt
from persimmon.model.chat_template_files import ChatTemplateError
from persimmon.model.images import ImagePatches
from persimmon.model.tool_calls import ToolCall, calls_text, describe, result_text
from persimmon.server.http.errors import ApiError, bad_request
from persimmon.server.http.schemas.chat_message import ChatMessage, ImagePart
from persimmon.server.http.schemas.tool_fields import Tool

Images = Mapping[ImagePart, ImagePatches]
"""What has been read of the images in messages."""


async def chat_prompt(
    chat: Chat,
    messages: Sequence[ChatMessage],
    tools: Sequence[Tool] = (),
    options: Mapping[str, Any] | None = None,
    images: Images | None = None,
    begin_answer: bool = True,
) -> ChatPrompt:
    """The conversation as the model reads it.

    Args:
        chat: the served model's chat format.
        messages: at least one.
        tools: those described to the model.
        options: variables for the checkpoint's template.
        images: all of the messages; None where they have none.
        begin_answer: end with the beginning of an answer.

    Raises:
        ApiError: the format cannot hold it: a role that it lacks, an answer at the end, the result of a call that was
            not made, or what a checkpoint's template refuses; or it takes no options, or not one of these.
    """
    images = images or {}
    if options:
        _check_options(chat, options)
    if chat.template is None:
        turns = _turns(messages)
        try:
            if chat.image_tokens is not None:
                return _in_fuyus_format(chat, messages, turns, tools, images, begin_answer)
            if tools:
                turns.append(_described(tools))
            return chat.of_turns(turns, begin_answer)
        except ChatFormatError as error:
            raise bad_request(f"Invalid 'messages': {error}.", "messages") from None
    for number, message in enumerate(messages):
        if not chat.allows_role(message.role):
            raise _unknown_role(number, message.role)
    if chat.takes_tools:
        shown, functions = list(_as_sent(messages)), [_as_json(tool) for tool in tools] or None
    else:
        shown, functions = _as_text(chat, messages, tools), None
    try:
        # A template is a program: the other requests do not wait for it.
        return await asyncio.to_thread(chat.of_messages, shown, functions, options, [*images.values()], begin_answer)
    except ChatTemplateError as error:
        # A template's own words may hold those of a message.
        raise bad_request(
            f"Invalid 'messages': this model's chat template does not render them: {error}.",
            "messages",
            quotation=f": {error}",
        ) from None


def _in_fuyus_format(
    chat: Chat,
    messages: Sequence[ChatMessage],
    turns: Sequence[Turn],
    tools: Sequence[Tool],
    images: Images,
    begin_answer: bool,
) -> ChatPrompt:
    """A conversation in Fuyu's format, which begins with the description of tools."""
    described = [f"{_described(tools).content}\n"] if tools else []
    contents: list[tuple[str, Sequence[str | ImagePatches]]] = []
    for message, turn in zip(messages, turns, strict=True):
        content = message.content if isinstance(message.content, tuple) else (turn.content,)
        parts = [images[part] if isinstance(part, ImagePart) else part for part in content]
        contents.append((turn.role, parts if contents else [*described, *parts]))
    return chat.of_contents(contents, begin_answer)


def _check_options(chat: Chat, options: Mapping[str, Any]) -> None:
    """Raises the ApiError of options that the chat format does not take."""
    if chat.template is None:
        name = "Adept" if chat.image_tokens is None else "Fuyu"
        raise bad_request(
            f"'chat_template_kwargs' is not supported with this model: its chats have {name}'s format, which takes "
            "none; leave it out or send {}.",
            "chat_template_kwargs",
            "unsupported_parameter",
        )
    reserved = next((name for name in options if name in chat.template.reserved), None)
    if reserved is not None:
        field = f"chat_template_kwargs.{reserved}"
        raise bad_request(f"Invalid '{field}': the server sets it; give only what the template reads besides.", field)


def _turns(messages: Sequence[ChatMessage]) -> list[Turn]:
    """The messages with calls and results as text, in the form that Adept's format gives them."""
    called: dict[str | None, str] = {}
    turns = []
    for number, message in enumerate(messages):
        text = message.text
        if message.tool_calls:
            called |= {call.id: call.function.name for call in message.tool_calls}
            calls = calls_text(ToolCall(call.function.name, call.function.arguments) for call in message.tool_calls)
            text = f"{text}\n\n{calls}" if text else calls
        if message.role == "tool":
            name = called.get(message.tool_call_id)
            if name is None:
                field = f"messages[{number}].tool_call_id"
                raise bad_request(f"Invalid '{field}': no earlier message makes a call with this id.", field)
            text = result_text(name, text)
        turns.append(Turn(message.role, text))
    return turns


def _described(tools: Sequence[Tool]) -> Turn:
    return Turn("system", describe([tool.function.function for tool in tools]))


def _as_text(chat: Chat, messages: Sequence[ChatMessage], tools: Sequence[Tool]) -> list[dict[str, Any]]:
    """Messages for a template that does not know tools: a system message describes them, results are the user's.

    Where the template has no system messages either, the first message describes them.
    """
    roles = {"developer": "system", "tool": "user"}
    shown = [
        {"role": roles.get(turn.role, turn.role), "content": _shown(message, turn.content)}
        for message, turn in zip(messages, _turns(messages), strict=True)
    ]
    if tools:
        described = _described(tools).content
        first = shown[0]
        if first["role"] == "system" or not chat.takes_system:
            content = first["content"]
            first["content"] = (
                f"{content}\n\n{described}".lstrip("\n")
                if isinstance(content, str)
                else [*content, {"type": "text", "text": f"\n\n{described}"}]
            )
        else:
            shown.insert(0, {"role": "system", "content": described})
    return shown


def _shown(message: ChatMessage, text: str) -> str | list[dict[str, Any]]:
    """A message's content for a template: parts where it has images, else a text."""
    if not isinstance(message.content, tuple):
        return text
    return [{"type": "text", "text": part} if isinstance(part, str) else {"type": "image"} for part in message.content]


def _as_sent(messages: Sequence[ChatMessage]) -> Iterator[dict[str, Any]]:
    """Messages for a template that knows tools, with the arguments of calls as JSON, as templates expect them."""
    called: dict[str | None, str] = {}
    for message in messages:
        entry: dict[str, Any] = {
            "role": "system" if message.role == "developer" else message.role,
            "content": _shown(message, message.text),
        }
        if message.name is not None:
            entry["name"] = message.name
        if message.tool_calls:
            called |= {call.id: call.function.name for call in message.tool_calls}
            entry["tool_calls"] = [
                {
                    "id": call.id,
                    "type": "function",
                    "function": {"name": call.function.name, "arguments": _arguments(call.function.arguments)},
                }
                for call in message.tool_calls
            ]
        if message.tool_call_id is not None:
            entry["tool_call_id"] = message.tool_call_id
            entry["name"] = called.get(message.tool_call_id, "")
        yield entry


def _arguments(text: str) -> Any:
    try:
        return json.loads(text or "{}")
    except (ValueError, RecursionError):
        return text


def _as_json(tool: Tool) -> dict[str, Any]:
    function = tool.function.function
    described = {} if function.description is None else {"description": function.description}
    return {
        "type": "function",
        "function": {"name": function.name, **described, "parameters": function.arguments_schema},
    }


def _unknown_role(number: int, role: str) -> ApiError:
    return bad_request(
        f"Invalid 'messages': messages[{number}] has the role {role[:40]!r}, which this model's chat template does "
        f"not support; use {', '.join(ROLES)}.",
        "messages",
    )
