"""The model that is measured: Qwen3-shaped, 33 M parameters, random weights, made on the spot."""

from __future__ import annotations

from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

VOCABULARY = 16384
CONTEXT = 2048


def make_model(directory: Path) -> Path:
    config = Qwen3Config(
        hidden_size=512,
        num_hidden_layers=8,
        num_attention_heads=8,
        num_key_value_heads=4,
        head_dim=64,
        intermediate_size=1536,
        vocab_size=VOCABULARY,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
    )
    torch.manual_seed(0)
    Qwen3ForCausalLM(config).to(torch.bfloat16).save_pretrained(directory)
    _tokenizer().save(str(directory / "tokenizer.json"))
    return directory


def plain_model(directory: Path) -> PreTrainedModel:
    """In float32, as the engine computes; the attention that transformers chooses."""
    return Qwen3ForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


def random_prompt(length: int, seed: int) -> tuple[int, ...]:
    generator = torch.Generator().manual_seed(seed)
    return tuple(torch.randint(VOCABULARY, (length,), generator=generator).tolist())


def _tokenizer() -> Tokenizer:
    """Every token has text, so that streams carry what real ones carry."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    names = [*letters, *(f"t{i:05}" for i in range(VOCABULARY - len(letters)))]
    tokenizer = Tokenizer(models.BPE({name: i for i, name in enumerate(names)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer
