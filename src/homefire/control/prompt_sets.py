"""Prompts of evaluations, kept once per set under their digest: `HOME/prompt_sets/<sha256>.json`."""

from __future__ import annotations

import msgspec

from homefire.foundation.durable import write_file
from homefire.foundation.home import Home
from homefire.wire.errors import DigestMismatch, FailedPrecondition
from homefire.wire.records import PromptSet, token_lists_sha256


def keep_prompt_set(home: Home, prompt_tokens: list[list[int]]) -> str:
    """The set's digest. Durable when it returns; a set that is there already is not written again."""
    sha256 = token_lists_sha256(prompt_tokens)
    path = home.prompt_sets / f"{sha256}.json"
    if not path.is_file():
        path.parent.mkdir(exist_ok=True)
        write_file(path, msgspec.json.encode(prompt_tokens))
    return sha256


def read_prompt_set(home: Home, sha256: str) -> PromptSet:
    """FailedPrecondition when it is gone, DigestMismatch when it is not what it was."""
    path = home.prompt_sets / f"{sha256}.json"
    try:
        prompt_tokens = msgspec.json.decode(path.read_bytes(), type=list[list[int]])
    except FileNotFoundError as exc:
        raise FailedPrecondition(
            f"prompt set {sha256[:16]} is gone", hint=f"restore {path} from a copy"
        ) from exc
    except msgspec.DecodeError as exc:
        raise DigestMismatch(f"{path} is damaged: {exc}") from exc
    if token_lists_sha256(prompt_tokens) != sha256:
        raise DigestMismatch(f"{path} does not hold the prompts that its name says")
    return PromptSet(sha256, prompt_tokens)
