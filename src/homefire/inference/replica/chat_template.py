"""A model's chat template, rendered in a sandbox: templates are code that came with a download.

What a template sees, and how JSON is spelled in it, is transformers' `apply_chat_template`: the same
messages become the same tokens on the client and here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
import jinja2.meta
import msgspec
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from homefire.wire.completions import ChatMessage
from homefire.wire.errors import FailedPrecondition, InvalidArgument, PayloadTooLarge, Unsupported

MAX_RENDERED_CHARACTERS = 4 << 20
_OURS = frozenset({"messages", "tools", "documents", "add_generation_prompt"})
"""Variables that a request fills by fields of their own."""


class _AddedToken(msgspec.Struct, frozen=True):
    content: str


class _NamedTemplate(msgspec.Struct, frozen=True):
    name: str
    template: str


_Token = str | _AddedToken | None


class _TokenizerConfig(msgspec.Struct, frozen=True):
    chat_template: str | list[_NamedTemplate] | None = None
    bos_token: _Token = None
    eos_token: _Token = None
    unk_token: _Token = None
    sep_token: _Token = None
    pad_token: _Token = None
    cls_token: _Token = None
    mask_token: _Token = None


class ChatTemplate:
    """Messages -> the text that the model is asked to continue."""

    def __init__(
        self,
        source: str,
        *,
        for_tools: str | None = None,
        special_tokens: Mapping[str, str] | None = None,
    ) -> None:
        """`for_tools`: another source, where tools are given. `special_tokens`: e.g. `bos_token`."""
        environment = _environment()
        self._plain = _Source(environment, source)
        self._for_tools = self._plain if for_tools is None else _Source(environment, for_tools)
        self._tokens = dict(special_tokens or {})

    @classmethod
    def open(cls, directory: Path) -> ChatTemplate | None:
        """The template of a model directory; None for a model without one."""
        config = _read_config(directory / "tokenizer_config.json")
        file = directory / "chat_template.jinja"
        named = _named_templates(config)
        if file.is_file():
            named["default"] = file.read_text()
        if "default" not in named:
            return None
        return cls(
            named["default"],
            for_tools=named.get("tool_use"),
            special_tokens=_special_tokens(config),
        )

    def has_variable(self, name: str) -> bool:
        """Whether a request may fill it: one that no template reads changes nothing."""
        return name not in _OURS and (
            name in self._plain.variables or name in self._for_tools.variables
        )

    def render(
        self,
        messages: Sequence[ChatMessage],
        *,
        tools: Sequence[Mapping[str, Any]] = (),
        variables: Mapping[str, Any] | None = None,
    ) -> str:
        """Raises InvalidArgument with the template's own words when it refuses the messages, and
        Unsupported when it has no place for tools."""
        source = self._for_tools if tools else self._plain
        if tools and "tools" not in source.variables:
            raise Unsupported(
                "the chat template of this model has no place for tools",
                hint="leave tools out, or describe them in a message",
                field="tools",
            )
        given = {name: value for name, value in (variables or {}).items() if name not in _OURS}
        return source.render(
            {
                **self._tokens,
                **given,
                "messages": list(messages),
                "tools": list(tools) or None,
                "documents": None,
                "add_generation_prompt": True,
            }
        )


class _Source:
    """One template, compiled."""

    def __init__(self, environment: jinja2.Environment, source: str) -> None:
        self._template = environment.from_string(source)
        self.variables = jinja2.meta.find_undeclared_variables(environment.parse(source))

    def render(self, variables: Mapping[str, Any]) -> str:
        pieces: list[str] = []
        size = 0
        try:
            for piece in self._template.generate(variables):
                size += len(piece)
                if size > MAX_RENDERED_CHARACTERS:
                    raise PayloadTooLarge(
                        f"the rendered chat exceeds {MAX_RENDERED_CHARACTERS} characters"
                    )
                pieces.append(piece)
        except (jinja2.TemplateError, TypeError, ValueError, OverflowError) as exc:
            raise InvalidArgument(
                f"the chat template refused the messages: {exc}", field="messages"
            ) from exc
        return "".join(pieces)


class _GenerationTag(Extension):
    """`{% generation %}…{% endgeneration %}` marks what an assistant said, for training. Text is text."""

    def __init__(self, environment: jinja2.Environment) -> None:
        super().__init__(environment)
        self.tags = {"generation"}

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def refuse_without_template(directory: str) -> FailedPrecondition:
    return FailedPrecondition(
        f"the model in {directory} has no chat template",
        hint="use /inference/v1/completions, or add chat_template.jinja to the model",
    )


def _environment() -> jinja2.Environment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _GenerationTag]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


def _read_config(path: Path) -> _TokenizerConfig:
    if not path.is_file():
        return _TokenizerConfig()
    return msgspec.json.decode(path.read_bytes(), type=_TokenizerConfig)


def _named_templates(config: _TokenizerConfig) -> dict[str, str]:
    found = config.chat_template
    if found is None:
        return {}
    return {"default": found} if isinstance(found, str) else {t.name: t.template for t in found}


def _special_tokens(config: _TokenizerConfig) -> dict[str, str]:
    """Those that the tokenizer has, as transformers gives them to a template."""
    tokens = {
        name: getattr(config, name) for name in config.__struct_fields__ if name.endswith("_token")
    }
    return {
        name: token.content if isinstance(token, _AddedToken) else token
        for name, token in tokens.items()
        if token is not None
    }


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """transformers' filter: Python's JSON, not HTML-escaped as Jinja's own is."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(layout: str) -> str:
    return datetime.now().strftime(layout)
