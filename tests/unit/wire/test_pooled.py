import pytest

from homefire.wire import pooled
from homefire.wire.errors import InvalidArgument
from homefire.wire.pooled import SamplingSession, parse_sampling_session

JOB = pooled.pool_job_id("local", "/models/tiny")
RUN = "ts-0123456789abcdef:train:0"


@pytest.mark.parametrize(
    "session",
    [
        SamplingSession.of(pooled.sampler_id(JOB), "ts-1", 0),
        SamplingSession.of(pooled.sampler_id(JOB), "ts-1", 3, run=RUN, snapshot="step_1.2:a-b"),
    ],
)
def test_a_sampling_session_is_read_back_from_its_id(session):
    assert parse_sampling_session(session.id) == session
    assert pooled.service_of(session.id) == session.sampler
    assert "/" not in session.id


def test_the_same_number_of_the_same_session_gives_the_same_id():
    ids = {SamplingSession.of("s", "ts-1", n).id for n in (0, 0, 1)}
    assert len(ids) == 2


def test_what_was_never_given_as_an_id_is_refused():
    for nonsense in ("", "a", "a.b.c.d", "pool.1234.!!!", "pool.1234.YQ", "pool.1234.Li4vYQ"):
        with pytest.raises(InvalidArgument):
            parse_sampling_session(nonsense)


def test_a_sampler_and_its_job_name_each_other():
    assert pooled.job_of_sampler(pooled.sampler_id(JOB)) == JOB
    assert pooled.job_of_sampler("research-serving") is None


def test_pools_differ_by_account_and_model_and_runs_by_name():
    ids = {
        pooled.pool_job_id("a", "/m"),
        pooled.pool_job_id("b", "/m"),
        pooled.pool_job_id("a", "/n"),
        pooled.run_job_id("a", RUN),
    }
    assert len(ids) == 4


def test_a_run_names_its_session():
    assert pooled.session_of(RUN) == "ts-0123456789abcdef"
