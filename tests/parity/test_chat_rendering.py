"""A chat becomes the text that transformers makes of it on the client."""

from __future__ import annotations

from typing import Any

import pytest
from transformers.utils.chat_template_utils import render_jinja_template

from homefire.inference.replica.chat import chat_messages
from homefire.inference.replica.chat_template import ChatTemplate

LIKE_CHATML_WITH_TOOLS = """
{%- if tools %}
    {{- '<|im_start|>system\n# Tools\n' }}
    {%- for tool in tools %}{{- '\n' }}{{- tool | tojson }}{%- endfor %}
    {{- '<|im_end|>\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.content is string %}{% set content = message.content %}
    {%- else %}{% set content = '' %}{% endif %}
    {{- '<|im_start|>' + message.role + '\n' }}
    {%- if message.reasoning_content is defined %}
        {{- '<think>' + message.reasoning_content + '</think>' }}
    {%- endif %}
    {%- generation %}{{- content }}{%- endgeneration %}
    {%- for call in message.tool_calls or [] %}
        {{- '<tool_call>{"name": "' + call.function.name + '", "arguments": ' }}
        {%- if call.function.arguments is string %}{{- call.function.arguments }}
        {%- else %}{{- call.function.arguments | tojson }}{%- endif %}
        {{- '}</tool_call>' }}
    {%- endfor %}
    {{- '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}
{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think></think>' }}{%- endif %}
"""
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "add",
            "description": "Adds <b>é</b> & more",
            "parameters": {"type": "object", "properties": {"x": {"type": "integer"}}},
        },
    }
]
MESSAGES = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "1 + 2?"},
    {
        "role": "assistant",
        "reasoning": "use the tool",
        "tool_calls": [
            {
                "id": "c1",
                "type": "function",
                "function": {"name": "add", "arguments": {"x": 1, "text": "<é>"}},
            }
        ],
    },
    {"role": "tool", "tool_call_id": "c1", "content": "3"},
    {"role": "user", "content": "again"},
]


@pytest.mark.parametrize("tools", [[], TOOLS])
@pytest.mark.parametrize("variables", [{}, {"enable_thinking": False}])
def test_a_chat_renders_as_in_transformers(tools: Any, variables: Any) -> None:
    (expected,), _ = render_jinja_template(
        [MESSAGES],
        tools=tools or None,
        chat_template=LIKE_CHATML_WITH_TOOLS,
        add_generation_prompt=True,
        **variables,
    )
    template = ChatTemplate(LIKE_CHATML_WITH_TOOLS)
    rendered = template.render(chat_messages(MESSAGES), tools=tools, variables=variables)
    assert rendered == expected
    assert "again" in rendered
