"""The names and signatures of the protocol's table (fireworks.md §6.1), and laziness."""

from __future__ import annotations

import dataclasses
import inspect
import subprocess
import sys

import pytest

import homefire.sdk as sdk

_METHODS = {
    "AdaptiveConcurrencyController.acquire": [],
    "AdaptiveConcurrencyController.release": ["metrics=None"],
    "AdaptiveConcurrencyController.step_completed": [],
    "DeploymentManager.create_or_get": ["config", "force_recreate=False"],
    "DeploymentManager.delete": ["deployment_id"],
    "DeploymentManager.get": ["deployment_id"],
    "DeploymentManager.hotload": [
        "deployment_id",
        "base_model",
        "snapshot_identity",
        "incremental_snapshot_metadata=None",
        "reset_prompt_cache=True",
        "timeout=60",
    ],
    "DeploymentManager.hotload_and_wait": [
        "deployment_id",
        "base_model",
        "snapshot_identity",
        "incremental_snapshot_metadata=None",
        "reset_prompt_cache=True",
        "timeout_seconds=400",
    ],
    "DeploymentManager.hotload_check_status": ["deployment_id", "base_model", "timeout=30"],
    "DeploymentManager.scale_to_zero": ["deployment_id"],
    "DeploymentManager.update": ["deployment_id", "body", "update_mask"],
    "DeploymentManager.wait_for_hotload": [
        "deployment_id",
        "base_model",
        "expected_identity",
        "timeout_seconds=400",
        "poll_interval=5",
    ],
    "DeploymentManager.wait_for_ready": ["deployment_id", "timeout_s=600", "poll_interval_s=15"],
    "DeploymentManager.warmup": ["model", "max_retries=30", "retry_interval_s=10.0"],
    "DeploymentSampler.async_completions_stream": [
        "prompt",
        "max_tokens=1024",
        "temperature=1.0",
        "hotload_retry_interval=5.0",
        "hotload_max_retries=10",
        "**kwargs",
    ],
    "DeploymentSampler.drain_metrics": [],
    "DeploymentSampler.sample_with_prompt_tokens": [
        "prompt_token_ids",
        "n=1",
        "max_tokens=1024",
        "temperature=1.0",
        "max_seq_len=None",
        "stop=None",
        "**kwargs",
    ],
    "DeploymentSampler.sample_with_tokens": [
        "messages",
        "n=1",
        "max_tokens=1024",
        "temperature=1.0",
        "max_seq_len=None",
        "**kwargs",
    ],
    "FiretitanServiceClient.create_base_training_client": ["base_model", "user_metadata=None"],
    "FiretitanServiceClient.create_sampling_client": [
        "model_path=None",
        "base_model=None",
        "retry_config=None",
    ],
    "FiretitanServiceClient.create_training_client": [
        "base_model",
        "lora_rank=0",
        "user_metadata=None",
    ],
    "FiretitanTrainingClient.forward_backward": ["data", "loss_fn", "loss_fn_config=None"],
    "FiretitanTrainingClient.list_checkpoints": [],
    "FiretitanTrainingClient.load_adapter": ["adapter_path"],
    "FiretitanTrainingClient.optim_step": ["adam_params", "grad_accumulation_normalization=None"],
    "FiretitanTrainingClient.resolve_checkpoint_path": ["checkpoint_name", "source_job_id=None"],
    "FiretitanTrainingClient.save_state": ["name", "ttl_seconds=None", "*timeout=None"],
    "FiretitanTrainingClient.save_weights_for_sampler_ext": [
        "name",
        "checkpoint_type=None",
        "ttl_seconds=None",
    ],
    "FireworksClient.list_checkpoints": ["job_id", "*page_size=200"],
    "FireworksClient.promote_checkpoint": [
        "job_id=None",
        "checkpoint_id=None",
        "output_model_id=None",
        "base_model=None",
        "*name=None",
        "*hot_load_deployment_id=None",
    ],
    "FireworksClient.resolve_training_profile": ["training_shape_id", "**_kwargs"],
    "FixedConcurrencyController.acquire": [],
    "FixedConcurrencyController.release": ["metrics=None"],
    "FixedConcurrencyController.step_completed": [],
    "ServerMetrics.from_headers": ["headers", "client_ttft=None"],
    "TrainerJobConfig.validate": [],
    "TrainerJobManager.create": ["config"],
    "TrainerJobManager.create_and_wait": ["config", "poll_interval_s=5.0", "timeout_s=900"],
    "TrainerJobManager.delete": ["job_id"],
    "TrainerJobManager.get": ["job_id"],
    "TrainerJobManager.reconnect_and_wait": [
        "job_id",
        "poll_interval_s=5.0",
        "timeout_s=600.0",
        "max_wait_for_resumable_s=120.0",
    ],
    "TrainerJobManager.resolve_training_profile": ["training_shape_id", "**_kwargs"],
    "TrainerJobManager.resume_and_wait": ["job_id", "poll_interval_s=5.0", "timeout_s=900"],
    "TrainerJobManager.wait_for_existing": ["job_id", "poll_interval_s=5.0", "timeout_s=900"],
    "TrainerJobManager.wait_for_ready": [
        "job_id",
        "job_name=None",
        "poll_interval_s=5.0",
        "timeout_s=900",
    ],
    "WeightSyncer.check_deployment_state": [],
    "WeightSyncer.get_deployment_sampler": [],
    "WeightSyncer.hotload": ["snapshot_name", "checkpoint_type"],
    "WeightSyncer.reset_delta_chain": [],
    "WeightSyncer.save_and_hotload": ["name", "checkpoint_type=None"],
    "WeightSyncer.save_only": ["name", "checkpoint_type=None"],
    "WeightSyncer.wait_for_hotload_ready": ["timeout_s=300", "poll_interval_s=5"],
}
_INHERITED = {
    "FiretitanTrainingClient.forward": ["data", "loss_fn", "loss_fn_config=None"],
    "FiretitanTrainingClient.forward_async": ["data", "loss_fn", "loss_fn_config=None"],
    "FiretitanTrainingClient.forward_backward_async": ["data", "loss_fn", "loss_fn_config=None"],
    "FiretitanTrainingClient.forward_backward_custom": [
        "data",
        "loss_fn",
        "*loss_type_input='logprobs'",
    ],
    "FiretitanTrainingClient.forward_backward_custom_async": [
        "data",
        "loss_fn",
        "*loss_type_input='logprobs'",
    ],
    "FiretitanTrainingClient.load_state": ["path"],
    "FiretitanTrainingClient.load_state_async": ["path"],
    "FiretitanTrainingClient.load_state_with_optimizer": ["path"],
    "FiretitanTrainingClient.load_state_with_optimizer_async": ["path"],
    "FiretitanTrainingClient.save_weights_for_sampler": ["name", "ttl_seconds=None"],
    "FiretitanTrainingClient.save_weights_for_sampler_async": ["name", "ttl_seconds=None"],
    "FiretitanTrainingClient.get_info": [],
    "FiretitanTrainingClient.get_tokenizer": [],
    "FiretitanTrainingClient.create_sampling_client": ["model_path", "retry_config=None"],
    "FiretitanServiceClient.get_server_capabilities": [],
    "FiretitanServiceClient.create_training_client_from_state": ["path", "user_metadata=None"],
    "FiretitanServiceClient.create_training_client_from_state_with_optimizer": [
        "path",
        "user_metadata=None",
    ],
    "FiretitanServiceClient.create_rest_client": [],
}
_CONSTRUCTORS = {
    "AdaptiveConcurrencyController": [
        "initial_window=16",
        "min_window=1",
        "max_window=256",
        "prefill_queue_target=0.5",
        "additive_increase=1.0",
        "multiplicative_decrease=0.5",
        "ema_alpha=0.3",
    ],
    "FixedConcurrencyController": ["max_concurrency"],
    "DeploymentSampler": [
        "inference_url",
        "model",
        "api_key=None",
        "tokenizer=None",
        "concurrency_controller=None",
        "max_concurrency=None",
    ],
    "TrainerJobManager": [
        "api_key=None",
        "base_url=None",
        "additional_headers=None",
        "verify_ssl=None",
    ],
    "DeploymentManager": [
        "api_key=None",
        "base_url=None",
        "inference_url=None",
        "hotload_api_url=None",
        "additional_headers=None",
        "verify_ssl=None",
    ],
}
_FIELDS = {
    "CreatedTrainerJob": ["job_name", "job_id"],
    "DeploymentConfig": [
        "deployment_id",
        "base_model",
        "deployment_shape=None",
        "region=None",
        "min_replica_count=0",
        "max_replica_count=1",
        "accelerator_type='NVIDIA_H200_141GB'",
        "hot_load_bucket_type='FW_HOSTED'",
        "hot_load_trainer_job=None",
        "skip_shape_validation=False",
        "disable_speculative_decoding=False",
        "extra_args=None",
        "extra_values=None",
    ],
    "DeploymentInfo": [
        "deployment_id",
        "name",
        "state",
        "hot_load_bucket_url=None",
        "inference_model=None",
    ],
    "SampledCompletion": [
        "text",
        "full_tokens",
        "prompt_len",
        "finish_reason='unknown'",
        "completion_len=0",
        "inference_logprobs=None",
        "logprobs_echoed=False",
        "routing_matrices=None",
    ],
    "SaveSamplerResult": ["path", "snapshot_name"],
    "ServerMetrics": [
        "num_concurrent_requests=None",
        "prefill_queue_duration=None",
        "generation_queue_duration=None",
        "server_ttft=None",
        "cached_prompt_tokens=None",
        "prompt_tokens=None",
        "server_processing_time=None",
        "client_ttft=None",
    ],
    "TrainerJobConfig": [
        "base_model",
        "lora_rank=0",
        "max_context_length=None",
        "learning_rate=1e-05",
        "gradient_accumulation_steps=1",
        "node_count=None",
        "display_name=None",
        "hot_load_deployment_id=None",
        "region=None",
        "custom_image_tag=None",
        "extra_args=None",
        "accelerator_type=None",
        "accelerator_count=None",
        "training_shape_ref=None",
        "forward_only=False",
        "skip_validations=False",
        "purpose=None",
        "managed_by=None",
    ],
    "TrainerServiceEndpoint": ["job_name", "job_id", "base_url"],
    "TrainingShapeProfile": [
        "training_shape_version",
        "trainer_image_tag",
        "max_supported_context_length",
        "node_count",
        "deployment_shape_version",
        "deployment_image_tag",
        "accelerator_type",
        "accelerator_count",
        "base_model_weight_precision",
        "pipeline_parallelism",
        "trainer_mode=''",
    ],
    "WeightSyncer": [
        "policy_client",
        "deploy_mgr=None",
        "deployment_id=None",
        "base_model=''",
        "hotload_timeout=600",
        "first_checkpoint_type='base'",
        "compression_format='arc_v2'",
        "warmup_after_hotload=True",
        "warmup_max_retries=10",
        "reset_prompt_cache=True",
        "lora_rank=0",
        "base_saved=False",
        "base_identity=None",
    ],
}
_PROPERTIES = [
    "AdaptiveConcurrencyController.ema_prefill_queue",
    "AdaptiveConcurrencyController.window_size",
    "DeploymentManager.account_id",
    "FixedConcurrencyController.window_size",
    "TrainingShapeProfile.deployment_shape",
    "TrainingShapeProfile.supports_lora",
    "TrainingShapeProfile.training_shape",
]
_COROUTINES = [
    "AdaptiveConcurrencyController.acquire",
    "DeploymentSampler.async_completions_stream",
    "DeploymentSampler.sample_with_prompt_tokens",
    "DeploymentSampler.sample_with_tokens",
    "FixedConcurrencyController.acquire",
]


def _attribute(path: str) -> object:
    owner, name = path.split(".")
    return inspect.getattr_static(getattr(sdk, owner), name)


def _parameters(function: object) -> list[str]:
    if isinstance(function, classmethod | staticmethod):
        function = function.__func__
    written = []
    for parameter in inspect.signature(function).parameters.values():
        default = "" if parameter.default is parameter.empty else f"={parameter.default!r}"
        mark = {parameter.KEYWORD_ONLY: "*", parameter.VAR_KEYWORD: "**"}.get(parameter.kind, "")
        written.append(f"{mark}{parameter.name}{default}")
    return [item for item in written if item not in {"self", "cls"}]


@pytest.mark.parametrize("path", _METHODS | _INHERITED)
def test_every_method_has_the_parameters_of_the_protocol_s_table(path: str) -> None:
    wanted = (_METHODS | _INHERITED)[path]
    actual = _parameters(_attribute(path))
    named = [item for item in actual if not item.startswith("*")]
    wanted_named = [item for item in wanted if not item.startswith("*")]
    assert named[: len(wanted_named)] == wanted_named
    assert all("=" in item for item in named[len(wanted_named) :]), "additions need defaults"
    assert {item for item in wanted if item.startswith("*")} <= set(actual)


@pytest.mark.parametrize("name", _CONSTRUCTORS)
def test_every_constructor_starts_with_the_parameters_of_the_protocol_s_table(name: str) -> None:
    wanted = _CONSTRUCTORS[name]
    assert _parameters(getattr(sdk, name).__init__)[: len(wanted)] == wanted


@pytest.mark.parametrize("name", _FIELDS)
def test_every_dataclass_starts_with_the_fields_of_the_protocol_s_table(name: str) -> None:
    written = []
    for field in dataclasses.fields(getattr(sdk, name)):
        missing = field.default is dataclasses.MISSING
        written.append(field.name if missing else f"{field.name}={field.default!r}")
    assert written[: len(_FIELDS[name])] == _FIELDS[name]


@pytest.mark.parametrize("path", _PROPERTIES)
def test_every_property_of_the_protocol_s_table_is_one(path: str) -> None:
    owner, name = path.split(".")
    assert isinstance(getattr(getattr(sdk, owner), name), property)


@pytest.mark.parametrize("path", _COROUTINES)
def test_every_async_method_of_the_protocol_s_table_is_a_coroutine_function(path: str) -> None:
    assert inspect.iscoroutinefunction(_attribute(path))


def test_constants_and_enum_have_the_protocol_s_values() -> None:
    assert sdk.DEFAULT_CHECKSUM_FORMAT == "alder32"
    assert sdk.DEFAULT_DELTA_COMPRESSION == "arc_v2"
    assert {member.name: member.value for member in sdk.GradAccNormalization} == {
        "NUM_LOSS_TOKENS": "num_loss_tokens",
        "NUM_SEQUENCES": "num_sequences",
        "NONE": "none",
    }


def test_every_name_in_all_can_be_imported_and_others_cannot() -> None:
    assert [name for name in sdk.__all__ if getattr(sdk, name) is None] == []
    assert set(sdk.__all__) == set(dir(sdk))
    with pytest.raises(AttributeError, match="no attribute 'Nonsense'"):
        _ = sdk.Nonsense


def test_public_methods_of_every_class_are_documented() -> None:
    bare = []
    for name in sdk.__all__:
        value = getattr(sdk, name)
        if inspect.isclass(value) and value.__module__.startswith("homefire.sdk"):
            bare += [
                f"{name}.{method}"
                for method, function in vars(value).items()
                if inspect.isfunction(function)
                and not method.startswith("_")
                and not inspect.getdoc(function)
            ]
            assert inspect.getdoc(value)
    assert bare == []


_HEAVY = "sorted({'tinker', 'torch', 'transformers'} & set(sys.modules))"


def _loaded_after(code: str) -> str:
    run = subprocess.run(
        [sys.executable, "-c", f"import sys\n{code}\nprint({_HEAVY})"],
        capture_output=True,
        text=True,
        check=True,
    )
    return run.stdout.strip()


def test_importing_the_sdk_loads_neither_tinker_nor_torch() -> None:
    assert _loaded_after("import homefire.sdk") == "[]"


def test_managing_jobs_and_sampling_load_neither_tinker_nor_torch() -> None:
    code = """
import httpx
from homefire.sdk import DeploymentManager, DeploymentSampler, TrainerJobManager, WeightSyncer
answer = {"accounts": [{"name": "accounts/local"}]}
transport = httpx.MockTransport(lambda request: httpx.Response(200, json=answer))
manager = TrainerJobManager("key", "http://server", transport=transport)
assert manager.get("job") == answer and manager.account_id == "local"
DeploymentSampler("http://server", "accounts/local/deployments/d", "key")
"""
    assert _loaded_after(code) == "[]"
