"""Hot loads while completions run: 425 where it was asked for, and never a mix of weights."""

from __future__ import annotations

import pytest

from contract.fireworks import findings_of, shows, since

every_release_with_update = since("1.2.0a68")


@pytest.fixture(scope="module")
def findings(homefire_up):
    return findings_of(homefire_up, "fireworks_transitions.py", engine="torch")


@pytest.fixture
def found(findings, version):
    return findings(version)


def ended_on_the_weights_that_it_began_on(swap: dict) -> bool:
    return swap["streamed"] and swap["long"] == swap["before"] != swap["saved"]


@every_release_with_update
@shows("hot_load_transition_type SYNC")
def test_a_sync_transition_answers_425_until_the_new_weights_serve(found):
    assert found["sync"]["seen"] == [200, 425]
    assert found["sync"]["code"] == "swap_in_progress"
    assert ended_on_the_weights_that_it_began_on(found["sync"])


@every_release_with_update
@shows("DeploymentSampler during a SYNC transition")
def test_the_sampler_asks_again_while_it_is_refused(found):
    swap = found["sync_with_the_sampler"]
    assert swap["seen"] == {"refused_first": True, "tokens": 1, "then": True}
    assert ended_on_the_weights_that_it_began_on(swap)


@every_release_with_update
@shows("hot_load_transition_type ASYNC")
def test_an_async_transition_refuses_nothing_and_names_the_weights_of_every_token(found):
    swap = found["asynchronous"]
    assert swap["seen"] == [200]
    assert swap["long"] == swap["before"]
    assert swap["models"] == [swap["before"], swap["saved"]]
    assert swap["spans"] == [[swap["before"], swap["saved"]]]
