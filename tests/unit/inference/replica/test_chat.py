"""What a chat request's messages become before a template reads them."""

from __future__ import annotations

from typing import Any

import msgspec
import pytest

from homefire.inference.replica.chat import chat_messages, chat_tools, render_chat
from homefire.inference.replica.chat_template import ChatTemplate
from homefire.wire.completions import ChatCompletionRequest
from homefire.wire.errors import HomefireError, InvalidArgument, Unsupported

USER = {"role": "user", "content": "hi"}


def request(**fields: Any) -> ChatCompletionRequest:
    return msgspec.convert({"messages": [USER], **fields}, ChatCompletionRequest)


def one(message: dict[str, Any]) -> dict[str, Any]:
    (read,) = chat_messages([message])
    return read


def test_text_parts_are_one_text() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert one({"role": "user", "content": parts})["content"] == "ab"


def test_what_is_null_is_not_there() -> None:
    message = {"role": "assistant", "content": "x", "tool_calls": None, "refusal": None}
    assert one(message) == {"role": "assistant", "content": "x"}


def test_arguments_of_calls_become_objects() -> None:
    function = {"name": "add", "arguments": '{"x": [1, 2]}'}
    call = {"id": "c1", "type": "function", "function": function}
    read = one({"role": "assistant", "content": None, "tool_calls": [call]})
    assert read["tool_calls"][0]["function"]["arguments"] == {"x": [1, 2]}
    assert read["tool_calls"][0]["id"] == "c1"
    assert "content" not in read


def test_the_answer_of_a_tool_keeps_what_it_answers() -> None:
    message = {"role": "tool", "tool_call_id": "c1", "content": "3"}
    assert one(message) == message


@pytest.mark.parametrize("name", ["reasoning_content", "thinking", "reasoning"])
def test_reasoning_is_found_under_each_of_its_names(name: str) -> None:
    read = one({"role": "assistant", "content": "x", name: "because"})
    assert read["reasoning_content"] == read["thinking"] == "because"


CALL_WITHOUT_JSON = {"function": {"name": "f", "arguments": "{"}}


@pytest.mark.parametrize(
    ("message", "error", "field"),
    [
        ({"content": "x"}, InvalidArgument, "messages[0]"),
        ({"role": "user"}, InvalidArgument, "messages[0].content"),
        ({"role": "user", "content": 3}, InvalidArgument, "messages[0].content"),
        ({"role": "user", "content": ["x"]}, InvalidArgument, "messages[0].content[0]"),
        (
            {"role": "user", "content": [{"type": "text"}]},
            InvalidArgument,
            "messages[0].content[0].text",
        ),
        (
            {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]},
            Unsupported,
            "messages[0].content[0]",
        ),
        ({"role": "assistant", "tool_calls": "x"}, InvalidArgument, "messages[0].tool_calls"),
        (
            {"role": "assistant", "tool_calls": [{"id": "c"}]},
            InvalidArgument,
            "messages[0].tool_calls[0].function",
        ),
        (
            {"role": "assistant", "tool_calls": [CALL_WITHOUT_JSON]},
            InvalidArgument,
            "messages[0].tool_calls[0].function.arguments",
        ),
    ],
)
def test_what_no_template_could_read_is_refused_by_name(
    message: dict[str, Any], error: type[HomefireError], field: str
) -> None:
    with pytest.raises(error) as refused:
        chat_messages([message])
    assert refused.value.field == field


def test_a_chat_without_messages_is_refused() -> None:
    with pytest.raises(InvalidArgument):
        chat_messages([])


TOOL = {"type": "function", "function": {"name": "add"}}


@pytest.mark.parametrize(("choice", "tools"), [(None, [TOOL]), ("auto", [TOOL]), ("none", [])])
def test_a_tool_choice_decides_what_the_template_is_told(choice: Any, tools: Any) -> None:
    assert chat_tools(request(tools=[TOOL], tool_choice=choice)) == tools


@pytest.mark.parametrize("choice", ["required", {"type": "function", "function": {"name": "add"}}])
def test_a_tool_choice_that_cannot_be_enforced_is_refused(choice: Any) -> None:
    with pytest.raises(Unsupported) as refused:
        chat_tools(request(tools=[TOOL], tool_choice=choice))
    assert refused.value.field == "tool_choice"


def test_variables_that_the_template_does_not_read_are_named() -> None:
    template = ChatTemplate("{{ enable_thinking }}{{ reasoning_effort }}")
    asked = request(
        chat_template_kwargs={"enable_thinking": 0, "mood": "glad"}, reasoning_effort="low"
    )
    assert render_chat(asked, template) == ("0low", ["mood"])
