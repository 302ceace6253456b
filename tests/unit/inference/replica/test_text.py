from __future__ import annotations

import itertools
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from homefire.inference.replica.detokenizer import ByteLevelText, WindowedText, detokenizer
from homefire.inference.replica.stop_text import StopOnText, StopText
from homefire.inference.replica.tokenizer import ModelTokenizer

END_OF_TEXT = 256


@pytest.fixture(scope="module")
def sentencepiece() -> ModelTokenizer:
    """Word marks and byte fallback, as Llama 2 and Gemma have them."""
    pieces = ["<unk>", "\u2581one", "\u2581two", "s", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokenizer = Tokenizer(
        models.BPE(
            vocab={piece: i for i, piece in enumerate(pieces)},
            merges=[],
            unk_token="<unk>",
            byte_fallback=True,
        )
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return ModelTokenizer(tokenizer, frozenset())


def as_bytes(text: str) -> list[int]:
    """tiny's tokens of a text: its bytes."""
    return list(text.encode())


def said(parts: Sequence[Sequence[int]], tokenizer: ModelTokenizer) -> list[str]:
    text = detokenizer(tokenizer)
    return [*(text.push(part) for part in parts), text.flush()]


def test_a_character_comes_out_when_its_last_byte_is_there(tokenizer: ModelTokenizer) -> None:
    assert said([[b] for b in as_bytes("aé€")], tokenizer) == ["a", "", "é", "", "", "€", ""]


def test_special_tokens_have_no_text(tokenizer: ModelTokenizer) -> None:
    assert said([[97, END_OF_TEXT, 98]], tokenizer) == ["ab", ""]


def test_half_a_character_at_the_end_is_replaced(tokenizer: ModelTokenizer) -> None:
    assert said([[0xE2, 0x82]], tokenizer) == ["", "\ufffd"]


@given(tokens=st.lists(st.integers(0, 300), max_size=40), cuts=st.lists(st.integers(0, 40)))
def test_the_pieces_joined_are_the_decoded_whole(
    tokenizer: ModelTokenizer, tokens: list[int], cuts: list[int]
) -> None:
    borders = [0, *sorted(min(cut, len(tokens)) for cut in cuts), len(tokens)]
    parts = [tokens[a:b] for a, b in itertools.pairwise(borders)]
    assert "".join(said(parts, tokenizer)) == tokenizer.decode(tokens)


def test_word_marks_depend_on_the_token_before(sentencepiece: ModelTokenizer) -> None:
    text = detokenizer(sentencepiece)
    assert isinstance(text, WindowedText)
    assert [text.push([1]), text.push([3]), text.push([2])] == ["one", "s", " two"]


def test_a_completion_keeps_the_space_after_its_prompt(sentencepiece: ModelTokenizer) -> None:
    assert detokenizer(sentencepiece, after=[1]).push([2]) == " two"
    assert detokenizer(sentencepiece).push([2]) == "two"


def test_byte_fallback_waits_for_the_whole_character(sentencepiece: ModelTokenizer) -> None:
    text = detokenizer(sentencepiece)
    assert [text.push([4 + byte]) for byte in "€".encode()] == ["", "", "€"]


def test_bytes_that_never_become_a_character_do_not_hold_the_text_for_ever(
    sentencepiece: ModelTokenizer,
) -> None:
    text = detokenizer(sentencepiece)
    out = "".join(text.push([4 + 0xF0]) for _ in range(4)) + text.push([1])
    assert out.endswith("one")


def test_tokens_are_spelled_by_their_own_bytes(
    tokenizer: ModelTokenizer, sentencepiece: ModelTokenizer
) -> None:
    assert [tokenizer.token_bytes(token) for token in (97, 0xE2, 0)] == [b"a", b"\xe2", b"\0"]
    assert tokenizer.token_text(0xE2) == "\ufffd"
    assert tokenizer.token_text(END_OF_TEXT) == "<|endoftext|>"
    assert sentencepiece.token_bytes(2) == b" two"
    assert sentencepiece.token_bytes(4 + 0xE2) == b"\xe2"
    assert tokenizer.token_bytes(10**6) == b""


def test_every_token_has_a_name_of_its_own(tokenizer: ModelTokenizer) -> None:
    names = [tokenizer.token_name(token) for token in range(330)]
    assert len(set(names)) == 330
    assert names[0xE2] == "bytes:\\xe2"
    assert (names[97], names[END_OF_TEXT], names[325]) == ("a", "<|endoftext|>", "token_id:325")


def test_tiny_is_byte_level_and_knows_its_end(tokenizer: ModelTokenizer) -> None:
    assert isinstance(detokenizer(tokenizer), ByteLevelText)
    assert tokenizer.eos_token_ids == {END_OF_TEXT}


# stop strings --------------------------------------------------------------------------------


def test_what_may_begin_a_stop_string_is_held_back() -> None:
    stop = StopText(["END", "\n\n"])
    assert stop.feed("one E") == ("one ", False)
    assert stop.feed("N") == ("", False)
    assert stop.feed("T\n") == ("ENT", False)
    assert stop.feed("\nrest") == ("", True)


def test_the_earliest_of_several_stops_counts() -> None:
    assert StopText(["b", "a"]).feed("xxab") == ("xx", True)


@given(
    text=st.text("ab", max_size=30),
    stop=st.text("ab", min_size=1, max_size=4),
    cuts=st.lists(st.integers(0, 30)),
)
def test_text_ends_before_the_first_stop_however_it_is_cut(
    text: str, stop: str, cuts: list[int]
) -> None:
    borders = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    stopper = StopText([stop])
    out, is_stopped = "", False
    for a, b in itertools.pairwise(borders):
        piece, is_stopped = stopper.feed(text[a:b])
        out += piece
        if is_stopped:
            break
    assert out + ("" if is_stopped else stopper.flush()) == text.partition(stop)[0]
    assert is_stopped == (stop in text)


def test_a_sequence_stops_with_the_token_that_completes_the_string(
    tokenizer: ModelTokenizer,
) -> None:
    condition = StopOnText(tokenizer, ["é!"])
    assert [condition.push(token) for token in as_bytes("xé!")] == [False, False, False, True]
