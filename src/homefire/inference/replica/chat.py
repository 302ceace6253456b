"""A chat request's messages and tools, checked and brought into the form that templates read.

Templates are written for what transformers gives them: text as one string, arguments of tool calls as
objects, and no keys without a value.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import msgspec

from homefire.inference.replica.chat_template import ChatTemplate
from homefire.wire.completions import ChatCompletionRequest, ChatMessage
from homefire.wire.errors import InvalidArgument, Unsupported

_TEXT_PARTS = frozenset({"text", "input_text"})


def render_chat(request: ChatCompletionRequest, template: ChatTemplate) -> tuple[str, list[str]]:
    """(the text to continue, the template variables of the request that the template does not read)."""
    variables = template_variables(request)
    text = template.render(
        chat_messages(request.messages), tools=chat_tools(request), variables=variables
    )
    return text, [name for name in variables if not template.has_variable(name)]


def chat_messages(messages: list[ChatMessage]) -> list[ChatMessage]:
    """Raises InvalidArgument for what is no message, Unsupported for what is no text."""
    if not messages:
        raise InvalidArgument("there are no messages", hint="send at least one", field="messages")
    return [_message(message, f"messages[{i}]") for i, message in enumerate(messages)]


def chat_tools(request: ChatCompletionRequest) -> list[dict[str, Any]]:
    """What the template is told of; nothing when the model is not to call any."""
    if request.tool_choice not in (None, "auto", "none"):
        raise Unsupported(
            f"tool_choice {request.tool_choice!r} cannot be enforced by this version",
            hint='use "auto" or "none", and read the calls from the text',
            field="tool_choice",
        )
    return [] if request.tool_choice == "none" else request.tools or []


def template_variables(request: ChatCompletionRequest) -> dict[str, Any]:
    """E.g. `enable_thinking`, which templates of reasoning models read."""
    effort = {"reasoning_effort": request.reasoning_effort} if request.reasoning_effort else {}
    return {**effort, **(request.chat_template_kwargs or {})}


def _message(message: ChatMessage, where: str) -> ChatMessage:
    kept = {name: value for name, value in message.items() if value is not None}
    role = kept.get("role")
    if not isinstance(role, str) or not role:
        raise InvalidArgument(
            f"{where} has no role", hint='e.g. {"role": "user", "content": "…"}', field=where
        )
    if "tool_calls" in kept:
        kept["tool_calls"] = _tool_calls(kept["tool_calls"], f"{where}.tool_calls")
    elif "content" not in kept:
        raise InvalidArgument(f"{where} has no content", field=f"{where}.content")
    if "content" in kept:
        kept["content"] = _text(kept["content"], f"{where}.content")
    return _with_reasoning(kept)


def _text(content: Any, where: str) -> str:
    """Parts are joined with nothing between them, as templates that read parts do."""
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise InvalidArgument(
            f"{where} is neither text nor a list of parts",
            hint='e.g. [{"type": "text", "text": "…"}]',
            field=where,
        )
    return "".join(_part_text(part, f"{where}[{i}]") for i, part in enumerate(content))


def _part_text(part: Any, where: str) -> str:
    if not isinstance(part, Mapping):
        raise InvalidArgument(f"{where} is no object", field=where)
    if part.get("type") not in _TEXT_PARTS:
        raise Unsupported(
            f"{where} is of type {part.get('type')!r}: only text can be read by this version",
            hint="send parts of type text",
            field=where,
        )
    text = part.get("text")
    if not isinstance(text, str):
        raise InvalidArgument(f"{where}.text is missing or no text", field=f"{where}.text")
    return text


def _tool_calls(calls: Any, where: str) -> list[dict[str, Any]]:
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise InvalidArgument(f"{where} is no list of calls", field=where)
    return [_tool_call(call, f"{where}[{i}]") for i, call in enumerate(calls)]


def _tool_call(call: dict[str, Any], where: str) -> dict[str, Any]:
    """The wire has arguments as JSON in a string; a template wants the object, to spell it itself."""
    function = call.get("function")
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise InvalidArgument(f"{where} has no function with a name", field=f"{where}.function")
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        arguments = _object(arguments, f"{where}.function.arguments")
    return {**call, "function": {**function, "arguments": arguments or {}}}


def _object(text: str, where: str) -> dict[str, Any]:
    try:
        return msgspec.json.decode(text or "{}", type=dict[str, Any])
    except msgspec.DecodeError as exc:
        raise InvalidArgument(
            f"{where} is no JSON object: {exc}", hint='e.g. "{\\"x\\": 1}"', field=where
        ) from exc


def _with_reasoning(message: dict[str, Any]) -> dict[str, Any]:
    """Clients call it by three names; templates read the first, or the second."""
    for name in ("reasoning_content", "thinking", "reasoning"):
        if message.get(name) is not None:
            reasoning = message[name]
            return {"thinking": reasoning, **message, "reasoning_content": reasoning}
    return message
