"""The account-wide client: shapes, checkpoints, promotion, evaluation records."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from types import TracebackType
from typing import Any, Self

import httpx
import msgspec

from homefire.sdk.completions import SampledCompletion
from homefire.sdk.config import TrainingShapeProfile
from homefire.sdk.connection import ASK_ONCE, Connection, Json, error_text
from homefire.sdk.evaluations import check_same_weights, completions_sha256, prompts_of
from homefire.sdk.progress import Progress
from homefire.sdk.settings import resolve_api_key, resolve_base_url
from homefire.sdk.waiting import Waiter
from homefire.wire.ids import job_name
from homefire.wire.records import EvaluationEntry

_SHAPE = re.compile(r"^accounts/[^/]+/trainingShapes/[^/]+(/versions/[^/]+)?$")
_CHECKPOINT = re.compile(
    r"^accounts/[^/]+/rlorTrainerJobs/(?P<job>[^/]+)/checkpoints/(?P<checkpoint>[^/]+)$"
)
_MODEL_ID = re.compile(r"^[a-z0-9-]+$")
_MAX_MODEL_ID = 63
_PROMOTE_TIMEOUT_S = 300.0
_OPERATION_TIMEOUT_S = 7200.0
_OPERATION_INTERVAL_S = 10.0

_WITH_COMPLETIONS = frozenset({"promptTokens", "promptTokensSha256", "completionsSha256", "scorer"})
"""Fields of an evaluation that are sent only when there is something in them."""


class FireworksClient:
    """Calls that belong to no single job or deployment. Thread-safe; every call blocks.

    `base_url` defaults to `FIREWORKS_BASE_URL`, else `http://127.0.0.1:8700`; `api_key` to
    `FIREWORKS_API_KEY`. Failed calls raise httpx.HTTPStatusError with the server's message, a
    server that does not answer httpx.TransportError. A context manager that closes its sockets.
    """

    def __init__(
        self,
        api_key: str | None = None,
        base_url: str | None = None,
        additional_headers: dict[str, str] | None = None,
        verify_ssl: bool | None = None,
        *,
        waiter: Waiter | None = None,
        transport: httpx.BaseTransport | None = None,
    ) -> None:
        self.api_key = resolve_api_key(api_key)
        self.base_url = resolve_base_url(base_url)
        self._waiter = waiter or Waiter()
        self._connection = Connection(
            self.base_url,
            self.api_key,
            headers=additional_headers,
            verify=verify_ssl is not False,
            waiter=self._waiter,
            transport=transport,
        )
        self._account_id: str | None = None

    @property
    def account_id(self) -> str:
        """The key's account; asked once. ValueError unless the key has exactly one."""
        if self._account_id is None:
            answer = self._connection.call("GET", "/v1/accounts", params={"pageSize": "2"})
            accounts = answer.get("accounts") or []
            if len(accounts) != 1:
                found = "multiple accounts" if accounts else "no account"
                raise ValueError(
                    f"api_key is associated with {found}: use a key of exactly one account"
                )
            self._account_id = str(accounts[0]["name"]).rpartition("/")[2]
        return self._account_id

    def resolve_training_profile(
        self, training_shape_id: str, **_kwargs: Any
    ) -> TrainingShapeProfile:
        """The newest validated version of a shape, or the version that is named.

        `training_shape_id` is `accounts/<a>/trainingShapes/<s>[/versions/<v>]`. ValueError for
        another form; RuntimeError when the server has no such shape or no validated version.
        """
        if not _SHAPE.match(training_shape_id):
            raise ValueError(
                f"training_shape_id {training_shape_id!r} must look like "
                "'accounts/<account>/trainingShapes/<shape>[/versions/<version>]'"
            )
        return TrainingShapeProfile.from_version(self._shape_version(training_shape_id))

    def list_checkpoints(self, job_id: str, *, page_size: int = 200) -> list[dict[str, Any]]:
        """The job's checkpoints, oldest first; also of a deleted job.

        Rows have `name`, `createTime`, `checkpointType` and `promotable`.
        """
        path = f"/v1/{job_name(self.account_id, job_id)}/checkpoints"
        rows: list[dict[str, Any]] = []
        token = ""
        while True:
            params = {"pageSize": str(page_size), **({"pageToken": token} if token else {})}
            page = self._connection.call("GET", path, params=params)
            rows += page.get("checkpoints") or page.get("rlorTrainerJobCheckpoints") or []
            token = page.get("nextPageToken") or ""
            if not token:
                return rows

    def promote_checkpoint(
        self,
        job_id: str | None = None,
        checkpoint_id: str | None = None,
        output_model_id: str | None = None,
        base_model: str | None = None,
        *,
        name: str | None = None,
        hot_load_deployment_id: str | None = None,
    ) -> dict[str, Any]:
        """Makes a sampler checkpoint a model of its own, and returns that model resource.

        Name the checkpoint by `name` (a row's name from `list_checkpoints`) or by `job_id` and
        `checkpoint_id`. Blocks until the model is READY. ValueError for bad names; RuntimeError
        with the server's reason when the promotion fails; TimeoutError after two hours.
        """
        job_id, checkpoint_id = _checkpoint_of(name, job_id, checkpoint_id)
        if problems := validate_output_model_id(output_model_id):
            raise ValueError("output_model_id: " + "; ".join(problems))
        body = {
            "output_model": f"accounts/{self.account_id}/models/{output_model_id}",
            "trainer_job_id": job_name(self.account_id, job_id),
            **({"base_model": base_model} if base_model else {}),
            "async_promotion": True,
        }
        if hot_load_deployment_id:
            deployment = f"accounts/{self.account_id}/deployments/{hot_load_deployment_id}"
            body["hot_load_deployment_id"] = deployment
        return self._promote(checkpoint_id, body)

    def model_is_moe(self, model: str) -> bool:
        """Whether a model resource (`accounts/<a>/models/<m>`) is a mixture of experts."""
        details = self._connection.call("GET", f"/v1/{model}").get("baseModelDetails") or {}
        return bool(details.get("moe", False))

    def record_evaluation(
        self,
        name: str,
        *,
        deployment: str,
        identity: str,
        scores: Mapping[str, float],
        digest: str = "",
        step: int = 0,
        prompts_sha256: str = "",
        num_prompts: int = 0,
        sampling: Mapping[str, Any] | None = None,
        job: str = "",
        completions: Sequence[SampledCompletion] | None = None,
        scorer: str = "",
    ) -> dict[str, Any]:
        """Stores the result of an evaluation beside the weights that it was measured on.

        `identity` and `digest` are those of `SampledCompletion.weights`, `prompts_sha256` names
        the exact prompt set, `job` the trainer whose lineage it joins. With `completions`, one per
        prompt, in order, the record holds what `homefire eval rerun` needs: the prompts, and the
        digest of what was answered; `sampling` must then say `max_tokens`, `temperature` and, unless
        greedy, `seed`: a number, or "index of the prompt". `scorer` names the function that made the
        scores, `package.module:function`. Returns the stored record. ValueError when a completion
        was made by other weights. A homefire route, not a Fireworks one.
        """
        answered = list(completions or ())
        check_same_weights(answered, identity=identity, digest=digest)
        entry = EvaluationEntry(
            name=name,
            deployment=deployment,
            identity=identity,
            digest=digest,
            step=step,
            prompts_sha256=prompts_sha256,
            num_prompts=num_prompts,
            sampling=dict(sampling or {}),
            scores=dict(scores),
            job=job,
            prompt_tokens=prompts_of(answered),
            completions_sha256=completions_sha256(answered) if answered else "",
            scorer=scorer,
        )
        body: Json = msgspec.to_builtins(entry)
        given = {k: v for k, v in body.items() if v or k not in _WITH_COMPLETIONS}
        return self._connection.call("POST", self._evaluations_path, body=given)

    def list_evaluations(self, *, job: str | None = None) -> list[dict[str, Any]]:
        """The account's evaluation records, or those of one job."""
        answer = self._connection.call("GET", self._evaluations_path)
        rows: list[dict[str, Any]] = answer.get("evaluations") or []
        return [row for row in rows if job is None or row.get("job") == job]

    def close(self) -> None:
        """Closes the sockets; garbage collection does it too."""
        self._connection.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def _evaluations_path(self) -> str:
        return f"/v1/accounts/{self.account_id}/evaluations"

    def _shape_version(self, shape: str) -> Json:
        if "/versions/" in shape:
            return self._shape_call(f"/v1/{shape}", {})
        params = {"filter": "latest_validated=true", "pageSize": "1"}
        versions = self._shape_call(f"/v1/{shape}/versions", params).get("trainingShapeVersions")
        if not versions:
            raise RuntimeError(
                f"training shape {shape!r} has no latest validated version; "
                "`homefire shape list` shows the shapes of this machine"
            )
        return versions[0]

    def _shape_call(self, path: str, params: dict[str, str]) -> Json:
        try:
            return self._connection.call("GET", path, params=params)
        except httpx.HTTPStatusError as exc:
            raise RuntimeError(f"the training shape cannot be resolved: {exc}") from exc

    def _promote(self, checkpoint_id: str, body: Json) -> Json:
        path = f"/v1/accounts/{self.account_id}/checkpoints/{checkpoint_id}:promote"
        response = self._connection.request("POST", path, body=body, timeout_s=_PROMOTE_TIMEOUT_S)
        if response.is_error:
            raise RuntimeError(
                f"Failed to promote checkpoint {checkpoint_id!r} "
                f"(HTTP {response.status_code}): {error_text(response)}"
            )
        answer: Json = response.json()
        operation = answer.get("operation")
        return self._await_operation(operation) if operation else answer["model"]

    def _await_operation(self, operation: Json) -> Json:
        path = f"/v1/{operation['name']}"

        def look(progress: Progress) -> Json | None:
            current = self._connection.call("GET", path, patience=ASK_ONCE)
            progress.update("done" if current.get("done") else "running")
            return current if current.get("done") else None

        done = operation
        if not operation.get("done"):
            done = self._waiter.until(
                look,
                what="promotion",
                timeout_s=_OPERATION_TIMEOUT_S,
                interval_s=_OPERATION_INTERVAL_S,
            )
        if error := done.get("error"):
            raise RuntimeError(f"the promotion failed: {error.get('message', error)}")
        return {key: value for key, value in (done.get("response") or {}).items() if key != "@type"}


def validate_output_model_id(output_model_id: str | None) -> list[str]:
    """What is wrong with the id of a model to be made; an empty list when nothing is."""
    if not output_model_id:
        return ["it is empty; use 1 to 63 of [a-z0-9-]"]
    problems: list[str] = []
    if len(output_model_id) > _MAX_MODEL_ID:
        problems.append(
            f"it has {len(output_model_id)} characters; at most {_MAX_MODEL_ID} are allowed"
        )
    if not _MODEL_ID.match(output_model_id):
        problems.append(f"{output_model_id!r} has characters other than [a-z0-9-]")
    return problems


def _checkpoint_of(
    name: str | None, job_id: str | None, checkpoint_id: str | None
) -> tuple[str, str]:
    if name is not None:
        match = _CHECKPOINT.match(name)
        if match is None:
            raise ValueError(
                f"name {name!r} must look like "
                "'accounts/<account>/rlorTrainerJobs/<job>/checkpoints/<checkpoint>'"
            )
        return match["job"], match["checkpoint"]
    if not job_id or not checkpoint_id:
        raise ValueError("name a checkpoint by name=…, or by both job_id and checkpoint_id")
    return job_id, checkpoint_id
