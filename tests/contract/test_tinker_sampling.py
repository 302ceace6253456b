"""Sampling with the real `tinker` client at the server's root, held against plain `transformers`."""

from __future__ import annotations

import numpy as np
import pytest

from contract.cells import versions
from contract.references import adapted_model, base_model, checkpoint_tensors, same_bits

ROWS = [list(b"homefire trains "), list(b"what you own"), list(b"5271 -> 1725")]
PROMPT = list(b"homefire ")
"""Of `scripts/tinker_kit.py` and `scripts/tinker_sampling.py`."""
TOLERANCE = 1e-4
"""Of logprobs against a plain forward in float32."""
every_version = pytest.mark.parametrize("version", versions("tinker"))


def cell(method: str, **more: str) -> pytest.MarkDecorator:
    return pytest.mark.cell(client="tinker", method=method, **more)


def since(version: str) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("version", versions("tinker", since=version))


@pytest.fixture
def found(run_tinker, version):
    return run_tinker(version, "tinker_sampling.py")


@pytest.fixture(scope="module")
def base(tinker_root):
    return base_model(tinker_root.home)


@pytest.fixture
def policy(tinker_root, found):
    return adapted_model(tinker_root.home, found["greedy"]["path"])


@every_version
@cell("sample: temperature 0")
def test_greedy_is_what_transformers_generates(found, base, policy):
    result = found["greedy"]
    (from_base,), (from_policy,) = result["base"], result["policy"]
    assert from_base == base.greedy(PROMPT, len(from_base))
    assert from_policy == policy.greedy(PROMPT, len(from_policy))
    assert len(from_base) == len(from_policy) == 24
    assert from_base != from_policy


@every_version
@cell("sample: logprobs")
def test_logprobs_of_samples_are_those_of_a_transformers_forward(found, base, policy):
    for name, model in (("base", base), ("policy", policy)):
        for sequence in found["sampled_logprobs"][name]:
            expected = model.of_targets([*PROMPT, *sequence["tokens"]])[len(PROMPT) - 1 :]
            assert sequence["logprobs"] == pytest.approx(expected, abs=TOLERANCE)
            assert len(sequence["logprobs"]) == len(sequence["tokens"]) == 12


@every_version
@cell("compute_logprobs")
def test_logprobs_of_a_prompt_have_its_length_and_the_first_is_undefined(found, base, policy):
    result = found["compute_logprobs"]
    for name, model in (("base", base), ("policy", policy)):
        for row, logprobs in zip(ROWS, result[name], strict=True):
            assert len(logprobs) == len(row)
            assert logprobs[0] is None
            assert logprobs[1:] == pytest.approx(model.of_targets(row), abs=TOLERANCE)


@every_version
@cell("compute_logprobs")
def test_the_sampler_computes_what_the_trainer_does(found):
    result = found["compute_logprobs"]
    for sampler, trainer in zip(result["policy"], result["trainer"], strict=True):
        assert sampler[1:] == pytest.approx(trainer, abs=TOLERANCE)


@every_version
@cell("sample: include_prompt_logprobs")
def test_prompt_logprobs_come_when_they_are_asked_for(found, base):
    result = found["include_prompt_logprobs"]
    assert result["asked"][0] is None
    assert result["asked"][1:] == pytest.approx(base.of_targets(PROMPT), abs=TOLERANCE)
    assert result["not_asked"] is None


@every_version
@cell("sample: topk_prompt_logprobs")
def test_the_likeliest_tokens_of_a_prompt_are_those_of_a_forward(found, base):
    rows = found["topk_prompt_logprobs"]
    assert len(rows) == len(PROMPT)
    assert not rows[0]
    expected = base.logprobs(PROMPT)[:-1].topk(4)
    for row, values, tokens in zip(rows[1:], expected.values, expected.indices, strict=True):
        assert [token for token, _ in row] == tokens.tolist()
        assert [logprob for _, logprob in row] == pytest.approx(values.tolist(), abs=TOLERANCE)


@every_version
@cell("sample: seed, num_samples")
def test_a_seed_reproduces_samples_that_differ(found):
    seeds = found["seeds"]
    assert seeds["one"] == seeds["again"]
    assert len({tuple(tokens) for tokens in seeds["one"]}) == 4
    assert seeds["one"] != seeds["other"]
    first, second = seeds["none"]
    assert first != second


@every_version
@cell("sample: top_k, top_p")
def test_a_cut_to_one_token_is_greedy(found):
    result = found["truncated_sampling"]
    for cut in (*result["top_k"], *result["top_p"]):
        assert cut == result["greedy"]


@every_version
@cell("sample: stop as ids, text, list of texts")
def test_a_stop_ends_the_sample_and_is_its_last_token(found):
    stops = found["stops"]
    for how in ("ids", "text", "texts"):
        sequence = stops[how]
        assert sequence["tokens"] == stops["whole"][: stops["cut"]]
        assert len(sequence["logprobs"]) == stops["cut"]
        assert "stop" in sequence["stop_reason"].lower()


@every_version
@cell("sample: stop as an empty list")
def test_an_empty_list_of_stops_is_no_stop_at_all(found):
    ignored = found["stops"]["ignored"]
    assert ignored["tokens"] == found["stops"]["whole"]
    assert "length" in ignored["stop_reason"].lower()


@every_version
@cell("sample: max_tokens left out")
def test_without_max_tokens_a_sample_may_fill_the_context(found):
    result = found["without_max_tokens"]
    assert result["stop_reason"].lower().rpartition(".")[2] == "stop" or result["length"] > 1000


@every_version
@cell("create_sampling_client: model_path")
def test_a_sampler_of_a_checkpoint_stays_with_it(found):
    """After five more steps and another save; to the bit, since a prompt's logprobs are."""
    result = found["snapshots_stay"]
    assert result["after"] == result["before"]
    assert result["anew"] == result["before"]
    first, again = result["greedy"]
    assert first == again
    moved = np.abs(np.subtract(result["second"][1:], result["before"][1:])).max()
    assert moved > 0.1


@every_version
@cell("create_sampling_client: model_path")
def test_a_later_checkpoint_is_the_trainer_as_it_was_saved(found):
    result = found["snapshots_stay"]
    assert result["second"][1:] == pytest.approx(result["trainer"], abs=TOLERANCE)


@every_version
@cell("save_weights_and_get_sampling_client")
def test_an_ephemeral_sampler_stays_with_what_was_saved(found):
    result = found["snapshots_stay"]
    before, after = result["ephemeral"]
    assert before == after == result["before"]


@every_version
@cell("sample: beside training")
def test_sampling_never_changes_the_trainer(found, tinker_root):
    result = found["snapshots_stay"]
    before, after = (checkpoint_tensors(tinker_root.home, path) for path in result["states"])
    assert same_bits(before, after)
    trained, unmoved = result["trained"]
    assert trained == unmoved


@every_version
@cell("sample: several adapters at once")
def test_every_sample_in_a_batch_is_of_its_own_weights(found):
    result = found["many_at_once"]
    assert len({str(tokens) for tokens in result["alone"]}) == 3
    for i, tokens in enumerate(result["together"]):
        assert tokens == result["alone"][i % 3]


@every_version
@cell("sample: a prompt in several chunks")
def test_chunks_of_a_prompt_are_one_prompt(found):
    result = found["a_prompt_in_several_chunks"]
    assert result["chunks"] == result["one"]


@every_version
@cell("SamplingClient.get_base_model")
def test_a_sampler_names_its_base_model(found):
    assert found["base_of_a_sampler"] == {"base": "tiny", "policy": "tiny"}


REFUSALS = {
    "a_snapshot_that_is_not": ("create_sampling_client: no such snapshot", "unknown_snapshot"),
    "a_model_that_is_not": ("create_sampling_client: no such model", "unknown_model"),
    "a_prompt_that_is_too_long": ("sample: a prompt beyond the context", "sequence_too_long"),
    "a_token_that_is_not": ("sample: a token outside the vocabulary", "token_out_of_range"),
}


@pytest.mark.parametrize(
    ("version", "step", "code"),
    [
        pytest.param(
            *version.values,
            step,
            code,
            marks=[*version.marks, cell(method, outcome=f"refused: {code}")],
            id=f"{version.values[0]}-{step}",
        )
        for step, (method, code) in REFUSALS.items()
        for version in versions("tinker")
    ],
)
def test_what_cannot_be_sampled_is_refused_by_name(found, step, code):
    assert found.refusal(step) == code


@since("0.30.0")
@cell("sample: topk_sample_logprobs")
def test_the_likeliest_tokens_of_a_sample_are_those_of_a_forward(found, base):
    result = found["topk_sample_logprobs"]
    text = [*PROMPT, *result["tokens"]]
    expected = base.logprobs(text)[len(PROMPT) - 1 : -1].topk(3)
    for row, values, tokens in zip(result["rows"], expected.values, expected.indices, strict=True):
        assert [token for token, _ in row] == tokens.tolist()
        assert [logprob for _, logprob in row] == pytest.approx(values.tolist(), abs=TOLERANCE)
    assert [row[0][0] for row in result["rows"]] == result["tokens"]


@since("0.30.0")
@cell("sample: target_prompt_logprobs")
def test_asked_tokens_of_a_prompt_are_scored_and_the_others_are_not(found, base):
    result = found["target_prompt_logprobs"]
    expected = base.logprobs(PROMPT)[:-1]
    for i, (targets, logprobs) in enumerate(
        zip(result["targets"], result["logprobs"], strict=True)
    ):
        wanted = [0.0 if t == -1 else float(expected[i, t]) for t in targets]
        assert logprobs == pytest.approx(wanted, abs=TOLERANCE)
    assert [row[0] for row in result["logprobs"]] == pytest.approx(
        result["prompt_logprobs"][1:], abs=TOLERANCE
    )


@since("0.38.0")
@cell("compute_logprobs: prompt_logprobs_last_n")
def test_the_last_tokens_alone_can_be_scored(found):
    result = found["prompt_logprobs_last_n"]
    assert result["last"][:-3] == [None] * (len(ROWS[0]) - 3)
    assert result["last"][-3:] == pytest.approx(result["all"][-3:], abs=TOLERANCE)


@since("0.38.0")
@cell("sample: prompt_alt_tokens_k")
def test_alternatives_of_a_prompt_are_drawn_from_its_distributions(found, base):
    result = found["prompt_alt_tokens"]
    expected = base.logprobs(PROMPT)[:-1]
    for i, (tokens, logprobs) in enumerate(zip(result["tokens"], result["logprobs"], strict=True)):
        assert logprobs == pytest.approx([float(expected[i, t]) for t in tokens], abs=TOLERANCE)
    assert len({tuple(tokens) for tokens in result["tokens"]}) > 1
