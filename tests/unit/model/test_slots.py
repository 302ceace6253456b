from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from homefire.model.attention import PackedRows
from homefire.model.attention_rule import AttentionRule, Reach
from homefire.model.kv_blocks import NO_PREFIX, Prefix
from homefire.model.slots import SlotCache

HEADS, KEY_HEADS, WIDTH = 4, 2, 8
PLAIN = AttentionRule()
RULES = {
    "scaling": AttentionRule(scaling=0.3),
    "window": AttentionRule(Reach(window=5), scaling=0.3),
    "chunk": AttentionRule(Reach(chunk=5)),
    "soft cap": AttentionRule(softcap=0.5),
    "sinks": AttentionRule(Reach(window=5), sinks=torch.tensor([0.5, -1.0, 2.0, 0.0])),
}


class Text:
    """A whole text's queries, keys and values, and what causal attention makes of them."""

    def __init__(self, length: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)

        def random(heads: int) -> Tensor:
            return torch.randn(1, heads, length, WIDTH, generator=generator)

        self.length = length
        self.parts = (random(HEADS), random(KEY_HEADS), random(KEY_HEADS))

    def attended(self, rule: AttentionRule) -> Tensor:
        """[length, HEADS, WIDTH]"""
        return PackedRows([self.length]).attend(nn.Identity(), *self.parts, rule)[0]


def joined(texts: list[Text], spans: list[slice]) -> list[Tensor]:
    """Those spans of the texts end to end, as one packed batch."""
    return [
        torch.cat([text.parts[i][:, :, span] for text, span in zip(texts, spans, strict=True)], 2)
        for i in range(3)
    ]


def decode_rest(
    cache: SlotCache, module: nn.Module, texts: list[Text], start: list[int], rule: AttentionRule
) -> list[Tensor]:
    """Feeds every text's tokens from `start` on, one a step, all texts together."""
    outputs: list[list[Tensor]] = [[] for _ in texts]
    for step in range(min(t.length - s for t, s in zip(texts, start, strict=True))):
        context = cache.decoding(len(texts))
        assert context.positions.tolist() == [s + step for s in start]
        spans = [slice(s + step, s + step + 1) for s in start]
        out = context.attend(module, *joined(texts, spans), rule)[0]
        for i in range(len(texts)):
            outputs[i].append(out[i])
    return [torch.stack(rows) for rows in outputs]


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_decoding_from_the_cache_equals_attention_over_the_whole_text(rule: AttentionRule) -> None:
    texts = [Text(90, 1), Text(75, 2), Text(100, 3)]
    prompts = [3, 7, 20]
    cache, module = SlotCache(max_slots=4, max_length=100), nn.Identity()
    context = cache.prefilling(prompts, [[0], [1], [2]])
    packed = context.attend(module, *joined(texts, [slice(0, p) for p in prompts]), rule)[0]
    expected = [text.attended(rule) for text in texts]
    assert torch.allclose(
        packed, torch.cat([e[:p] for e, p in zip(expected, prompts, strict=True)]), atol=1e-6
    )
    rows = decode_rest(cache, module, texts, prompts, rule)
    for out, whole, prompt in zip(rows, expected, prompts, strict=True):
        assert torch.allclose(out, whole[prompt : prompt + len(out)], atol=1e-6)


def test_a_shared_prompt_is_kept_in_every_slot_that_continues_it() -> None:
    text, other = Text(12, 1), Text(12, 2)
    cache, module = SlotCache(max_slots=8, max_length=32), nn.Identity()
    context = cache.prefilling([4, 4], [[0, 2], [1]])
    parts = joined([text, other], [slice(0, 4), slice(0, 4)])
    context.attend(module, *parts, PLAIN)
    rows = decode_rest(cache, module, [text, other, text], [4, 4, 4], PLAIN)
    assert torch.equal(rows[0], rows[2])
    assert torch.allclose(rows[1], other.attended(PLAIN)[4:], atol=1e-6)


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
@pytest.mark.parametrize("held_tokens", [32, 31], ids=["whole blocks", "all but one token"])
def test_a_text_goes_on_from_a_beginning_that_was_kept(
    rule: AttentionRule, held_tokens: int
) -> None:
    """In chunks, beside a whole prompt, into two slots; its kept blocks then carry another text on."""
    text, other = Text(90, 1), Text(90, 2)
    cache, module = SlotCache(max_slots=8, max_length=100), nn.Identity()
    context = cache.prefilling([33, 5], [[], [0]], [Prefix(kept=(4, 1)), NO_PREFIX])
    context.attend(module, *joined([text, other], [slice(0, 33), slice(0, 5)]), rule)
    prefix = Prefix(held_tokens, held=(4, 1), kept=(0,))
    context = cache.prefilling([60 - held_tokens], [[1, 2]], [prefix])
    out = context.attend(module, *joined([text], [slice(held_tokens, 60)]), rule)[0]
    expected = text.attended(rule)
    assert torch.allclose(out, expected[held_tokens:60], atol=1e-6)
    rows = decode_rest(cache, module, [other, text, text], [5, 60, 60], rule)
    assert torch.allclose(rows[0], other.attended(rule)[5:35], atol=1e-6)
    assert torch.allclose(rows[1], expected[60:90], atol=1e-6)
    assert torch.equal(rows[1], rows[2])
    cache.keep(1, 3, [7, 2])
    again = cache.prefilling([10], [[0]], [Prefix(80, held=(4, 1, 0, 7, 2))])
    out = again.attend(module, *joined([text], [slice(80, 90)]), rule)[0]
    assert torch.allclose(out, expected[80:], atol=1e-6)


def test_a_sequence_goes_on_in_the_slot_it_was_moved_to() -> None:
    first, second = Text(20, 1), Text(20, 2)
    cache, module = SlotCache(max_slots=2, max_length=32), nn.Identity()
    context = cache.prefilling([9, 6], [[0], [1]])
    parts = joined([first, second], [slice(0, 9), slice(0, 6)])
    context.attend(module, *parts, PLAIN)
    cache.move(source=1, destination=0)
    (rows,) = decode_rest(cache, module, [second], [6], PLAIN)
    assert torch.allclose(rows, second.attended(PLAIN)[6:], atol=1e-6)


def test_memory_grows_as_it_is_needed_and_never_past_its_bounds() -> None:
    text = Text(100, 1)
    cache, module = SlotCache(max_slots=20, max_length=100), nn.Identity()
    context = cache.prefilling([2], [[0]])
    context.attend(module, *joined([text], [slice(0, 2)]), PLAIN)
    layer = cache.layer(module, text.parts[1], text.parts[2])
    assert layer.keys.shape == (8, KEY_HEADS, 64, WIDTH)
    cache.prefilling([100], [[19]])
    layer = cache.layer(module, text.parts[1], text.parts[2])
    assert layer.keys.shape == (20, KEY_HEADS, 100, WIDTH)
    assert torch.equal(layer.keys[0, :, :2], text.parts[1][0, :, :2])
    with pytest.raises(ValueError, match="101 are needed"):
        cache.prefilling([101], [[0]])
