"""A small model that a deployment serves, and the plain transformers model beside it to check against.

Its weights have unit gain, so that a misplaced position or logprob shows as an error of order 1. Its
tokenizer is tiny's (a token is a byte), its chat template has a place for tools.
"""

from __future__ import annotations

import math
import shutil
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import httpx
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from conftest import RunningHomefire
from homefire.checkpoints.tiny import ensure_tiny

NAME = "speaker"
CONTEXT = 512
TEMPLATE = """\
{%- if tools %}{{- '<|reserved_0|>' + tools | tojson }}{%- endif %}
{%- for message in messages %}
    {{- '<|reserved_1|>' + message.role + ':' }}
    {%- if message.content is defined %}{{- message.content }}{%- endif %}
    {%- for call in message.tool_calls or [] %}{{- call.function | tojson }}{%- endfor %}
    {{- '<|endoftext|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|answer|>' }}{%- endif %}"""


@dataclass
class Speaker:
    server: RunningHomefire
    directory: Path

    @property
    def base_model(self) -> str:
        return f"accounts/local/models/{NAME}"

    @property
    def deployment(self) -> str:
        return f"accounts/local/deployments/{NAME}"

    @cached_property
    def tokenizer(self) -> Any:
        return AutoTokenizer.from_pretrained(self.directory)

    @cached_property
    def _module(self) -> torch.nn.Module:
        return AutoModelForCausalLM.from_pretrained(self.directory, dtype=torch.float32).eval()

    @torch.inference_mode()
    def distributions(self, tokens: list[int]) -> torch.Tensor:
        """[T, V]: row t is the log-probabilities of the token behind tokens[: t + 1]."""
        return self._module(torch.tensor([tokens])).logits[0].log_softmax(-1)

    def logprobs(self, prompt: list[int], completion: list[int]) -> list[float]:
        """Of the completion's tokens, each after all before it."""
        rows = self.distributions([*prompt, *completion])[len(prompt) - 1 : -1]
        return rows.gather(-1, torch.tensor(completion)[:, None])[:, 0].tolist()

    def greedy(self, prompt: list[int], count: int) -> list[int]:
        """Up to the end of text, that included."""
        tokens = list(prompt)
        while len(tokens) - len(prompt) < count and tokens[-1] != self.tokenizer.eos_token_id:
            tokens.append(int(self.distributions(tokens)[-1].argmax()))
        return tokens[len(prompt) :]


def serve_speaker(homefire_up: Any, parent: Path) -> Speaker:
    """A homefire with one deployment, `speaker`, that is ready."""
    write_speaker(parent / NAME)
    server = homefire_up(arguments=["--model-root", str(parent)])
    speaker = Speaker(server, parent / NAME)
    with httpx.Client(
        base_url=server.url, headers={"x-api-key": server.api_key}, timeout=60
    ) as client:
        path = "/v1/accounts/local/deployments"
        body = {"baseModel": speaker.base_model, "minReplicaCount": 1}
        client.post(path, params={"deploymentId": NAME}, json=body).raise_for_status()
        while (state := client.get(f"{path}/{NAME}").json()["state"]) == "CREATING":
            pass  # each GET is held until the state changes
        assert state == "READY"
    return speaker


def write_speaker(directory: Path) -> None:
    tiny = ensure_tiny(directory.parent / "tokenizer-of-tiny")
    config = AutoConfig.for_model(
        "qwen3",
        vocab_size=320,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        intermediate_size=96,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=256,
    )
    module = AutoModelForCausalLM.from_config(config)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in module.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            matrix = noise / math.sqrt(parameter.shape[-1])
            parameter.copy_(matrix if parameter.dim() > 1 else 1 + 0.1 * noise)
    module.bfloat16().save_pretrained(directory)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny / name, directory / name)
    (directory / "chat_template.jinja").write_text(TEMPLATE)
    shutil.rmtree(tiny)
