"""The WeightSyncer's state machine, over the real DeploymentManager and a fake policy."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest
import tinker

from homefire.sdk import DeploymentManager, SaveSamplerResult, WeightSyncer

_LOAD = "POST /hot_load/v1/models/hot_load"
_STATUS = "GET /hot_load/v1/models/hot_load"
_PROBE = "POST /inference/v1/completions"


@dataclass
class FakePolicy:
    saves: list[tuple[str, str | None]] = field(default_factory=list)
    error: Exception | None = None

    def save_weights_for_sampler_ext(self, name, checkpoint_type=None, ttl_seconds=None):
        if self.error is not None:
            raise self.error
        self.saves.append((name, checkpoint_type))
        return SaveSamplerResult(path=f"{name}-ab", snapshot_name=f"{name}-ab")

    @property
    def kinds(self) -> list[str | None]:
        return [kind for _, kind in self.saves]


class FakeDeployment:
    """Answers hot loads on the control stub: what is signalled is served at the next look."""

    def __init__(self, control) -> None:
        self.serving: str | None = None
        self.fails_next = False
        self.target: str | None = None
        self.is_broken = False
        self.control = control
        control.on(_LOAD, self._load)
        control.on(_STATUS, self._status)
        control.on(_PROBE, {"choices": []})

    def _load(self, seen):
        self.target = seen.body["identity"]
        self.is_broken, self.fails_next = self.fails_next, False
        if not self.is_broken:
            self.serving = self.target
        return {"status": "ok"}

    def _status(self, seen):
        loading = {"stage": "idle"}
        if self.is_broken:
            loading = {"stage": "error", "target_snapshot_identity": self.target}
        return {
            "replicas": [
                {
                    "current_snapshot_identity": self.serving,
                    "readiness": True,
                    "loading_state": loading,
                }
            ]
        }

    @property
    def signals(self) -> list[dict]:
        return [seen.body for seen in self.control.calls(_LOAD)]


@pytest.fixture
def deployment(control) -> FakeDeployment:
    return FakeDeployment(control)


@pytest.fixture
def policy() -> FakePolicy:
    return FakePolicy()


@pytest.fixture
def make_syncer(control, manual_time, policy, deployment):
    def make(**options) -> WeightSyncer:
        manager = DeploymentManager(
            "key", "http://server", waiter=manual_time.waiter, transport=control.transport
        )
        return WeightSyncer(
            policy_client=policy,
            deploy_mgr=manager,
            deployment_id="d",
            base_model="accounts/fireworks/models/tiny",
            waiter=manual_time.waiter,
            **options,
        )

    return make


def test_the_first_sync_is_a_base_and_the_following_are_deltas_of_the_last(
    make_syncer, policy, deployment
):
    syncer = make_syncer()
    assert [syncer.save_and_hotload(f"step_{i}") for i in range(3)] == [
        "step_0-ab",
        "step_1-ab",
        "step_2-ab",
    ]
    assert policy.kinds == ["base", "delta", "delta"]
    incremental = {"compression_format": "arc_v2", "checksum_format": "alder32"}
    assert deployment.signals == [
        {"identity": "step_0-ab", "reset_prompt_cache": True},
        {
            "identity": "step_1-ab",
            "reset_prompt_cache": True,
            "incremental_snapshot_metadata": {
                "previous_snapshot_identity": "step_0-ab",
                **incremental,
            },
        },
        {
            "identity": "step_2-ab",
            "reset_prompt_cache": True,
            "incremental_snapshot_metadata": {
                "previous_snapshot_identity": "step_1-ab",
                **incremental,
            },
        },
    ]


def test_a_failed_hot_load_makes_the_next_save_a_base(make_syncer, policy, deployment):
    syncer = make_syncer()
    syncer.save_and_hotload("step_0")
    deployment.fails_next = True
    with pytest.raises(RuntimeError, match="keeps its old weights, the next save will be a base"):
        syncer.save_and_hotload("step_1")
    assert deployment.serving == "step_0-ab"
    syncer.save_and_hotload("step_2")
    assert policy.kinds == ["base", "delta", "base"]
    assert "incremental_snapshot_metadata" not in deployment.signals[-1]


def test_a_refused_hot_load_signal_makes_the_next_save_a_base(
    control, make_syncer, policy, deployment
):
    syncer = make_syncer()
    syncer.save_and_hotload("step_0")
    control.on(_LOAD, (400, {"message": "no such snapshot"}))
    with pytest.raises(Exception, match="no such snapshot"):
        syncer.save_and_hotload("step_1")
    control.on(_LOAD, deployment._load)
    syncer.save_and_hotload("step_2")
    assert policy.kinds == ["base", "delta", "base"]


def test_a_failed_save_leaves_the_chain_as_it_was(make_syncer, policy):
    syncer = make_syncer()
    syncer.save_and_hotload("step_0")
    policy.error = tinker.RequestFailedError("disk full", "req-1", "server")
    with pytest.raises(tinker.RequestFailedError):
        syncer.save_and_hotload("step_1")
    assert syncer.save_only("step_1") is None
    policy.error = None
    syncer.save_and_hotload("step_2")
    assert policy.kinds == ["base", "delta"]


def test_a_bad_name_is_raised_by_save_only_too(make_syncer, policy):
    policy.error = ValueError("name 'a/b' is not a valid name")
    with pytest.raises(ValueError, match="not a valid name"):
        make_syncer().save_only("a/b")


def test_lora_saves_are_always_bases(make_syncer, policy, deployment):
    syncer = make_syncer(lora_rank=8)
    syncer.save_and_hotload("step_0")
    syncer.save_and_hotload("step_1")
    assert policy.kinds == ["base", "base"]
    assert "incremental_snapshot_metadata" not in deployment.signals[-1]


def test_an_explicit_type_wins(make_syncer, policy):
    syncer = make_syncer(first_checkpoint_type="delta")
    syncer.save_and_hotload("step_0")
    syncer.save_and_hotload("step_1", checkpoint_type="base")
    assert policy.kinds == ["delta", "base"]


def test_a_reset_chain_starts_with_a_base(make_syncer, policy, deployment):
    syncer = make_syncer()
    syncer.save_and_hotload("step_0")
    syncer.reset_delta_chain()
    syncer.save_and_hotload("step_1")
    assert policy.kinds == ["base", "base"]


def test_saving_and_loading_can_be_split(make_syncer, policy, deployment):
    syncer = make_syncer()
    snapshot = syncer.save_only("step_0")
    assert deployment.signals == []
    assert syncer.hotload(snapshot, "base")
    deployment.fails_next = True
    assert not syncer.hotload(syncer.save_only("step_1"), "delta")
    assert policy.kinds == ["base", "delta"]
    assert not syncer.base_saved


def test_the_first_hot_load_waits_for_a_replica(control, make_syncer, deployment, manual_time):
    control.on(_STATUS, {"replicas": []}, {"replicas": []}, deployment._status)
    make_syncer().save_and_hotload("step_0")
    assert deployment.serving == "step_0-ab"
    assert manual_time.slept


def test_a_deployment_that_gets_no_replica_is_given_up(control, make_syncer, manual_time):
    control.on(_STATUS, {"replicas": []})
    with pytest.raises(TimeoutError, match="replica of d"):
        make_syncer().wait_for_hotload_ready(timeout_s=30)
    assert sum(manual_time.slept) == pytest.approx(30)


def test_the_state_of_the_deployment_can_be_asked(make_syncer, deployment):
    syncer = make_syncer()
    assert syncer.check_deployment_state() is None
    syncer.save_and_hotload("step_0")
    assert syncer.check_deployment_state() == "step_0-ab"


def test_warm_up_follows_each_load_unless_told_otherwise(control, make_syncer, caplog):
    make_syncer(warmup_after_hotload=False).save_and_hotload("step_0")
    assert control.calls(_PROBE) == []
    control.on(_PROBE, (503, {}))
    assert make_syncer(warmup_max_retries=2).save_and_hotload("step_0") == "step_0-ab"
    assert len(control.calls(_PROBE)) == 2
    assert "answers no completions yet" in caplog.text


def test_the_durations_of_the_last_sync_are_kept(make_syncer):
    ticks = iter([0.0, 1.0, 4.0, 4.0, 9.0])
    syncer = make_syncer(timer=lambda: next(ticks))
    syncer.save_and_hotload("step_0")
    assert syncer.last_timing == {
        "save_time_s": 1.0,
        "hotload_time_s": 3.0,
        "warmup_time_s": 5.0,
        "total_time_s": 9.0,
    }


def test_without_a_deployment_it_only_saves(policy):
    syncer = WeightSyncer(policy_client=policy)
    assert syncer.save_and_hotload("step_0") == "step_0-ab"
    with pytest.raises(ValueError, match="deploy_mgr"):
        syncer.check_deployment_state()


def test_its_sampler_samples_through_its_deployment(make_syncer):
    sampler = make_syncer().get_deployment_sampler(max_concurrency=3)
    assert sampler.model == "accounts/local/deployments/d"
    assert sampler.concurrency_controller.window_size == 3
