"""Tokens and text, without torch or transformers: `tokenizers` and plain JSON."""

from __future__ import annotations

import re
from pathlib import Path

import msgspec
from tokenizers import Tokenizer, decoders

from homefire.wire.errors import ModelUnavailable

_BYTE_TOKEN = re.compile(r"^<0x([0-9A-F]{2})>$")
_WORD_MARK = "\u2581"
"""SentencePiece's visible space."""


class _EosConfig(msgspec.Struct, frozen=True):
    eos_token_id: int | list[int] | None = None


class ModelTokenizer:
    """The tokenizer of a model directory. Cheap per-token questions are cached."""

    def __init__(self, tokenizer: Tokenizer, eos_token_ids: frozenset[int]) -> None:
        self._tokenizer = tokenizer
        self.eos_token_ids = eos_token_ids
        self.is_byte_level = isinstance(tokenizer.decoder, decoders.ByteLevel)
        self._special_ids = {
            token.content: token_id
            for token_id, token in tokenizer.get_added_tokens_decoder().items()
            if token.special
        }
        self._special = frozenset(self._special_ids.values())
        self._bytes: dict[int, bytes] = {}

    @classmethod
    def open(cls, directory: Path) -> ModelTokenizer:
        path = directory / "tokenizer.json"
        if not path.is_file():
            raise ModelUnavailable(
                f"{directory} has no tokenizer.json",
                hint="save the model's tokenizer there with save_pretrained (a fast tokenizer)",
            )
        return cls(Tokenizer.from_file(str(path)), _eos_token_ids(directory))

    def encode(self, text: str, *, add_special_tokens: bool) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids

    def decode(self, tokens: list[int]) -> str:
        """The text without special tokens."""
        return self._tokenizer.decode(tokens, skip_special_tokens=True)

    def is_special(self, token: int) -> bool:
        return token in self._special

    def special_id(self, text: str) -> int | None:
        """Of the special token that is written so."""
        return self._special_ids.get(text)

    def token_bytes(self, token: int) -> bytes:
        """What the token stands for by itself, special tokens by name; empty for a padding id."""
        found = self._bytes.get(token)
        if found is None:
            found = self._bytes[token] = self._spell(token)
        return found

    def token_text(self, token: int) -> str:
        """The same as text; a part of a character shows as U+FFFD."""
        return self.token_bytes(token).decode("utf-8", "replace")

    def token_name(self, token: int) -> str:
        """The same where it is text, else its bytes as OpenAI writes them: `bytes:\\xe2\\x80`.

        Tokens with different bytes have different names, so that they can be keys.
        """
        spelled = self.token_bytes(token)
        try:
            return spelled.decode() or token_id_name(token)
        except UnicodeDecodeError:
            return "bytes:" + "".join(f"\\x{byte:02x}" for byte in spelled)

    def _spell(self, token: int) -> bytes:
        piece = self._tokenizer.id_to_token(token) or ""
        if self.is_byte_level:
            return _byte_level(piece)
        if match := _BYTE_TOKEN.match(piece):
            return bytes.fromhex(match[1])
        return piece.replace(_WORD_MARK, " ").encode()


def token_id_name(token: int) -> str:
    """vLLM's name of a token by its id."""
    return f"token_id:{token}"


def _byte_level(piece: str) -> bytes:
    """As the ByteLevel decoder does: a token with any other character stands for itself."""
    if all(character in _BYTE_OF for character in piece):
        return bytes(_BYTE_OF[character] for character in piece)
    return piece.encode()


def _gpt2_bytes() -> dict[str, int]:
    """The printable character that byte-level tokenizers write for each byte, inverted (GPT-2)."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    mapping = {chr(byte): byte for byte in printable}
    mapping.update({chr(256 + i): byte for i, byte in enumerate(others)})
    return mapping


_BYTE_OF = _gpt2_bytes()


def _eos_token_ids(directory: Path) -> frozenset[int]:
    for name in ("generation_config.json", "config.json"):
        path = directory / name
        if not path.is_file():
            continue
        found = msgspec.json.decode(path.read_bytes(), type=_EosConfig).eos_token_id
        if found is not None:
            return frozenset(found if isinstance(found, list) else [found])
    return frozenset()
