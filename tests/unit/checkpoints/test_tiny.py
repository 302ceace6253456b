from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest
from jinja2.sandbox import ImmutableSandboxedEnvironment
from tokenizers import Tokenizer

from homefire.checkpoints import (
    TINY_NAME,
    digest_tensors,
    ensure_tiny,
    read_model_directory,
    whole_digest,
)
from homefire.checkpoints.tiny import CHAT_TEMPLATE, special_tokens, tiny_tensors

DIGEST = "acf5ac971dee56d772d40eae7811eba7222af9dca1cf7381cdad9b4efda0e39a"
TEXT = "5271>1257\n\t héllo wörld \x00 \u200b 🔥"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return ensure_tiny(tmp_path_factory.mktemp("models") / TINY_NAME)


@pytest.fixture(scope="module")
def tokenizer(tiny) -> Tokenizer:
    return Tokenizer.from_file(str(tiny / "tokenizer.json"))


def render(*messages: tuple[str, str]) -> str:
    template = ImmutableSandboxedEnvironment().from_string(CHAT_TEMPLATE)
    return template.render(messages=[{"role": r, "content": c} for r, c in messages])


def test_the_weights_are_the_same_bits_everywhere(tiny):
    assert whole_digest(digest_tensors(read_model_directory(tiny))) == DIGEST


def test_it_has_the_promised_number_of_parameters():
    assert sum(tensor.data.nbytes // 2 for tensor in tiny_tensors().values()) == 828_800


def test_weights_are_normal_with_the_promised_spread_and_norms_are_one():
    tensors = tiny_tensors()
    bits = tensors["model.embed_tokens.weight"].data.view("<u2").astype("<u4") << 16
    values = bits.view("<f4")
    assert abs(values.std() - 0.02) < 2e-4
    assert abs(values.mean()) < 4e-4
    assert set(tensors["model.norm.weight"].data.view("<u2").tolist()) == {0x3F80}


def test_making_it_again_changes_nothing(tiny):
    before = {path.name: path.stat().st_mtime_ns for path in tiny.iterdir()}
    assert ensure_tiny(tiny) == tiny
    assert {path.name: path.stat().st_mtime_ns for path in tiny.iterdir()} == before


def test_many_makers_at_once_leave_one_whole_model(tmp_path):
    directory = tmp_path / "models" / TINY_NAME
    with ThreadPoolExecutor(4) as pool:
        made = list(pool.map(lambda _: ensure_tiny(directory), range(4)))
    assert made == [directory] * 4
    assert [path.name for path in directory.parent.iterdir()] == [TINY_NAME]
    assert whole_digest(digest_tensors(read_model_directory(directory))) == DIGEST


def test_token_ids_are_the_bytes_of_the_text(tokenizer):
    ids = tokenizer.encode(TEXT).ids
    assert bytes(ids) == TEXT.encode()
    assert tokenizer.decode(ids) == TEXT


def test_specials_follow_the_bytes(tokenizer):
    assert tokenizer.get_vocab_size() == 320
    assert [tokenizer.token_to_id(text) for text in special_tokens()] == list(range(256, 320))
    assert tokenizer.encode("a<|answer|>b<|endoftext|>").ids == [97, 257, 98, 256]


def test_a_user_message_is_its_content_and_the_answer_token():
    assert render(("user", "5271>")) == "5271><|answer|>"


def test_a_conversation_ends_each_answer():
    rendered = render(("system", "sort"), ("user", "21>"), ("assistant", "12"), ("user", " 3> "))
    assert rendered == "sort\n21><|answer|>12<|endoftext|> 3> <|answer|>"


def test_transformers_loads_tokenizer_and_model_without_a_warning(tiny, caplog):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    transformers_logging.add_handler(caplog.handler)
    tokenizer = AutoTokenizer.from_pretrained(tiny, local_files_only=True)
    assert tokenizer.encode(TEXT) == list(TEXT.encode())
    assert tokenizer.decode(tokenizer.encode(TEXT)) == TEXT
    assert (len(tokenizer), tokenizer.eos_token_id, tokenizer.pad_token_id) == (320, 256, 256)
    messages = [{"role": "user", "content": "1>"}]
    for prompt in (True, False):
        ids = tokenizer.apply_chat_template(
            messages, add_generation_prompt=prompt, return_dict=False
        )
        assert ids == [49, 62, 257]

    model = AutoModelForCausalLM.from_pretrained(tiny, local_files_only=True)
    assert sum(parameter.numel() for parameter in model.parameters()) == 828_800
    assert model.config.rope_parameters == {"rope_type": "default", "rope_theta": 10000.0}
    loaded = model.state_dict()["model.layers.3.mlp.down_proj.weight"]
    written = read_model_directory(tiny)["model.layers.3.mlp.down_proj.weight"]
    assert loaded.view(torch.uint8).numpy().tobytes() == written.data.tobytes()
    transformers_logging.remove_handler(caplog.handler)
    assert [record.getMessage() for record in caplog.records] == []
