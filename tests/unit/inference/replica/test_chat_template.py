from __future__ import annotations

import json
from pathlib import Path

import pytest

from homefire.inference.replica import chat_template
from homefire.inference.replica.chat_template import ChatTemplate
from homefire.wire.errors import InvalidArgument, PayloadTooLarge, Unsupported

USER = {"role": "user", "content": "hi"}
TOOL = {"type": "function", "function": {"name": "add"}}


def test_tiny_renders_a_question_as_itself_and_a_mark(tiny_directory: Path) -> None:
    template = ChatTemplate.open(tiny_directory)
    assert template is not None
    assert template.render([USER]) == "hi<|answer|>"


def test_the_template_may_lie_in_the_tokenizer_config(tmp_path: Path) -> None:
    config = {
        "chat_template": "{{ bos_token }}{{ messages[0].content }}",
        "bos_token": {"content": "<s>"},
    }
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    template = ChatTemplate.open(tmp_path)
    assert template is not None
    assert template.render([USER]) == "<s>hi"


def test_the_default_of_several_templates_is_taken(tmp_path: Path) -> None:
    templates = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": "yes"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": templates}))
    template = ChatTemplate.open(tmp_path)
    assert template is not None
    assert template.render([USER]) == "yes"


def test_a_model_without_a_template_has_none(tmp_path: Path) -> None:
    assert ChatTemplate.open(tmp_path) is None


def test_json_is_written_as_transformers_does() -> None:
    template = ChatTemplate(
        "{{ messages[0] | tojson }}{% for i in range(9) %}{% break %}{% endfor %}"
    )
    message = {"role": "user", "content": "<é>"}
    assert template.render([message]) == '{"role": "user", "content": "<é>"}'


def test_a_mark_for_training_is_no_text() -> None:
    source = "{% generation %}{{ messages[0].content }}{% endgeneration %}!"
    assert ChatTemplate(source).render([USER]) == "hi!"


def test_tools_reach_the_template_that_has_a_place_for_them() -> None:
    template = ChatTemplate("{{ tools[0].function.name if tools else 'none' }}")
    assert template.render([USER], tools=[TOOL]) == "add"
    assert template.render([USER]) == "none"


def test_a_template_for_tools_is_taken_when_there_are_any(tmp_path: Path) -> None:
    templates = [
        {"name": "default", "template": "plain"},
        {"name": "tool_use", "template": "{{ tools | length }} tools"},
    ]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"chat_template": templates}))
    template = ChatTemplate.open(tmp_path)
    assert template is not None
    assert template.render([USER]) == "plain"
    assert template.render([USER], tools=[TOOL]) == "1 tools"


def test_tools_without_a_place_in_the_template_are_refused() -> None:
    with pytest.raises(Unsupported, match="no place for tools") as refusal:
        ChatTemplate("{{ messages[0].content }}").render([USER], tools=[TOOL])
    assert refusal.value.field == "tools"


def test_a_request_fills_the_variables_that_are_not_ours() -> None:
    template = ChatTemplate("{{ mood }} {{ messages[0].content }}")
    variables = {"mood": "glad", "messages": [], "add_generation_prompt": False}
    assert template.render([USER], variables=variables) == "glad hi"
    assert [name for name in variables if template.has_variable(name)] == ["mood"]


@pytest.mark.parametrize(
    "source",
    [
        "{{ raise_exception('roles must alternate') }}",
        "{{ messages.append(1) }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ undefined_function() }}",
        "{{ 1 / messages[5] }}",
    ],
)
def test_a_refusing_or_hostile_template_is_an_error_of_the_request(source: str) -> None:
    with pytest.raises(InvalidArgument, match="the chat template refused") as refusal:
        ChatTemplate(source).render([USER])
    assert refusal.value.field == "messages"


def test_what_a_template_says_reaches_the_caller() -> None:
    with pytest.raises(InvalidArgument, match="roles must alternate"):
        ChatTemplate("{{ raise_exception('roles must alternate') }}").render([USER])


def test_endless_output_is_cut_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_template, "MAX_RENDERED_CHARACTERS", 1000)
    template = ChatTemplate("{% for i in range(9999) %}{{ i }}{% endfor %}")
    with pytest.raises(PayloadTooLarge):
        template.render([USER])
