"""A model's chat template, rendered in a sandbox: templates are code that came with a download."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

import jinja2
import msgspec
from jinja2.ext import loopcontrols
from jinja2.sandbox import ImmutableSandboxedEnvironment

from homefire.wire.completions import ChatMessage
from homefire.wire.errors import FailedPrecondition, InvalidArgument, PayloadTooLarge

MAX_RENDERED_CHARACTERS = 4 << 20


class _AddedToken(msgspec.Struct, frozen=True):
    content: str


class _NamedTemplate(msgspec.Struct, frozen=True):
    name: str
    template: str


class _TokenizerConfig(msgspec.Struct, frozen=True):
    chat_template: str | list[_NamedTemplate] | None = None
    bos_token: str | _AddedToken | None = None
    eos_token: str | _AddedToken | None = None


class ChatTemplate:
    """Messages -> the text that the model is asked to continue."""

    def __init__(self, source: str, *, bos_token: str = "", eos_token: str = "") -> None:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols]
        )
        environment.filters["tojson"] = _tojson
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = _strftime_now
        self._template = environment.from_string(source)
        self._tokens = {"bos_token": bos_token, "eos_token": eos_token}

    @classmethod
    def open(cls, directory: Path) -> ChatTemplate | None:
        """The template of a model directory; None for a model without one."""
        config = _read_config(directory / "tokenizer_config.json")
        file = directory / "chat_template.jinja"
        source = file.read_text() if file.is_file() else _default_template(config)
        if source is None:
            return None
        return cls(source, bos_token=_text(config.bos_token), eos_token=_text(config.eos_token))

    def render(self, messages: Sequence[ChatMessage]) -> str:
        """Raises InvalidArgument with the template's own words when it refuses the messages."""
        given = [msgspec.to_builtins(message) for message in messages]
        pieces: list[str] = []
        size = 0
        try:
            for piece in self._template.generate(
                messages=given, add_generation_prompt=True, **self._tokens
            ):
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


def refuse_without_template(directory: str) -> FailedPrecondition:
    return FailedPrecondition(
        f"the model in {directory} has no chat template",
        hint="use /inference/v1/completions, or add chat_template.jinja to the model",
    )


def _read_config(path: Path) -> _TokenizerConfig:
    if not path.is_file():
        return _TokenizerConfig()
    return msgspec.json.decode(path.read_bytes(), type=_TokenizerConfig)


def _default_template(config: _TokenizerConfig) -> str | None:
    if isinstance(config.chat_template, list):
        return next((t.template for t in config.chat_template if t.name == "default"), None)
    return config.chat_template


def _text(token: str | _AddedToken | None) -> str:
    return token.content if isinstance(token, _AddedToken) else token or ""


def _tojson(value: Any, indent: int | None = None, **_: Any) -> str:
    """transformers' filter: plain JSON, not HTML-escaped as Jinja's own is."""
    encoded = msgspec.json.encode(value)
    return (msgspec.json.format(encoded, indent=indent) if indent else encoded).decode()


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(layout: str) -> str:
    return datetime.now().strftime(layout)
