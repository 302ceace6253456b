"""Every decoder for which the hook is exact, packed and in the sampler; the others refused by name.

`make test` runs the core, `make test-families` all. docs/models.md is the table of it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from homefire.model import attention, loading
from homefire.model.attention_rule import AttentionRule, Reach
from homefire.model.head import PLAIN
from homefire.model.loading import load_model
from homefire.wire.errors import Unsupported
from parity.families import FAMILIES, HYBRID, PACKED, REFUSED, made
from parity.family_measures import alone, apart, decoded, original, packed, packed_rows, texts
from parity.family_table import page_verdicts, verdict_of

LOGPROB, GRADIENT, DECODED = 3e-5, 2e-4, 3e-5
"""Nats, relative, nats. Measured at most 2e-5, 7e-5 and 1e-5: see docs/models.md."""
SHOWS = 0.05
"""Nats: every planted mistake is at least that large, thousands of times the tolerance."""

Remake = Callable[[AttentionRule], AttentionRule]


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    return lambda name: made(name, tmp_path_factory.getbasetemp())


def chosen(families: dict[str, object]) -> list[object]:
    return [
        pytest.param(name, marks=[] if FAMILIES[name].is_core else [pytest.mark.long])
        for name in families
    ]


@pytest.mark.parametrize("family", chosen(PACKED))
def test_packed_logprobs_and_gradients_equal_hugging_face(directory, family) -> None:
    measured = packed(directory(family))
    assert measured.layout.value == page_verdicts()[family].training == "packed"
    assert measured.logprob < max(LOGPROB, 5 * measured.floor)
    assert measured.gradient < GRADIENT


@pytest.mark.parametrize("family", chosen(PACKED))
def test_the_samplers_logprobs_equal_hugging_face(directory, family) -> None:
    assert decoded(directory(family)) < DECODED
    assert page_verdicts()[family].sampling == "exact"


# planted mistakes ----------------------------------------------------------------------------

MISTAKES: dict[str, tuple[str, Remake]] = {
    "window": ("mistral", lambda rule: replace(rule, reach=Reach())),
    "window in the mask only": ("qwen2_moe", lambda rule: replace(rule, reach=Reach())),
    "chunk": ("llama4", lambda rule: replace(rule, reach=Reach())),
    "chunk taken for a window": (
        "llama4",
        lambda rule: replace(rule, reach=Reach(window=rule.reach.chunk)),
    ),
    "soft cap": ("gemma2", lambda rule: replace(rule, softcap=None)),
    "sinks": ("gpt_oss", lambda rule: replace(rule, sinks=None)),
    "scaling": ("granite", lambda rule: replace(rule, scaling=None)),
}


@pytest.mark.parametrize(("family", "remake"), MISTAKES.values(), ids=MISTAKES)
def test_a_term_that_the_hook_drops_shows_and_is_refused_at_load(
    directory, monkeypatch, family, remake
) -> None:
    path = directory(family)
    model, rows = load_model(path), texts()
    monkeypatch.setattr(
        attention, "AttentionRule", lambda *args, **terms: remake(AttentionRule(*args, **terms))
    )
    with torch.no_grad():
        assert apart(packed_rows(model, rows), alone(original(path), rows)) > SHOWS
    assert decoded_by(model_at=path, monkeypatch=monkeypatch) > SHOWS
    with pytest.raises(Unsupported, match="differ from its own attention"):
        load_model(path)


def decoded_by(*, model_at: Path, monkeypatch: pytest.MonkeyPatch) -> float:
    """The sampler with the mistake, which the verdict would not let start."""
    with monkeypatch.context() as allowed:
        allowed.setattr(loading.verdict, "in_exact_layout", lambda model: model)
        return decoded(model_at)


@pytest.mark.parametrize("family", ["cohere2", "gemma2", "granite"])
def test_a_head_taken_for_a_bare_product_shows_and_is_refused_at_load(
    directory, monkeypatch, family
) -> None:
    path = directory(family)
    model, rows = replace(load_model(path), logits_form=PLAIN), texts()
    monkeypatch.setattr(loading, "recognised_form", lambda module: PLAIN)
    with torch.no_grad():
        assert apart(packed_rows(model, rows), alone(original(path), rows)) > SHOWS
    assert decoded_by(model_at=path, monkeypatch=monkeypatch) > SHOWS
    with pytest.raises(Unsupported, match="differ from its own attention"):
        load_model(path)


def test_texts_that_are_not_kept_apart_show_and_are_refused(directory, monkeypatch) -> None:
    path = directory("mistral")
    model, rows = load_model(path), texts()
    rows_apart = attention.PackedRows.__init__
    monkeypatch.setattr(
        attention.PackedRows, "__init__", lambda self, lengths: rows_apart(self, [sum(lengths)])
    )
    with torch.no_grad():
        assert apart(packed_rows(model, rows), alone(original(path), rows)) > SHOWS
    with pytest.raises(Unsupported, match="see one another"):
        load_model(path)


# refusals ------------------------------------------------------------------------------------

REASONS = {
    "falcon": "not taken from transformers' AttentionInterface",
    "bloom": "not taken from transformers' AttentionInterface",
    "deepseek_v32": "layers of type indexed_attention",
    "mamba2": "it has no attention layers",
}


@pytest.mark.parametrize("family", REFUSED)
def test_a_model_that_would_not_be_exact_is_refused_by_name(directory, family) -> None:
    path = directory(family)
    with pytest.raises(Unsupported, match=REASONS[family]) as refused:
        load_model(path)
    assert FAMILIES[family].model_type in str(refused.value)
    assert verdict_of(path) == page_verdicts()[family]


@pytest.mark.long
@pytest.mark.parametrize("family", HYBRID)
def test_the_page_says_how_hybrids_run(directory, family) -> None:
    """Their numbers are held by test_padded_rows.py."""
    assert verdict_of(directory(family)) == page_verdicts()[family]


def test_the_page_has_exactly_these_families() -> None:
    """docs/models.md; `python tests/parity/family_table.py --update` writes it anew."""
    assert list(page_verdicts()) == list(FAMILIES)
