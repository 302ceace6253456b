"""`homefire eval list|rerun`: what was measured, and the same measurement again."""

from __future__ import annotations

import argparse
import asyncio
import importlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from homefire.cli.options import Commands, add_home, add_json, home_of
from homefire.cli.tables import last_segment, print_json, print_table, short_digest

if TYPE_CHECKING:
    from homefire.cli.server import Server
    from homefire.foundation.home import Home
    from homefire.sdk import DeploymentManager, SampledCompletion
    from homefire.wire.errors import FailedPrecondition
    from homefire.wire.records import Evaluation, PromptSet

Scorer = Callable[[Sequence["SampledCompletion"]], dict[str, float]]
_OWN_PACKAGE = "homefire."
_CONCURRENCY = 8
_EPILOG = """\
A rerun samples the record's prompts from the same weights with the same settings, and compares the
tokens of all completions, and the scores. It cannot, and says so, where the record came without its
prompts, sampling had neither a seed nor temperature 0, or the weights are gone. The weights are served
by the record's deployment if it still serves them, else by one that is made for it and removed.
A scorer outside of homefire is code of yours that is run: name it with --scorer.

examples:
  homefire eval list --job JOB
  homefire eval rerun evaluation-3f9a1c2e
  homefire eval rerun evaluation-3f9a1c2e --scorer my_task:score
"""


def add_parser(commands: Commands) -> None:
    parser = commands.add_parser("eval", help="list evaluations, or run one again and compare")
    verbs = parser.add_subparsers(dest="verb", metavar="list|rerun", required=True)
    listing = verbs.add_parser("list", help="evaluation records, oldest first")
    listing.add_argument("--job", metavar="J", help="of one trainer job")
    listing.set_defaults(run=run_list)
    rerun = verbs.add_parser(
        "rerun",
        help="sample again and compare completions and scores; 0 when they are the same",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    rerun.add_argument("id", metavar="ID", help="of the evaluation")
    rerun.add_argument("--deployment", metavar="D", help="one that serves the weights already")
    rerun.add_argument("--scorer", metavar="M:F", help="function of the completions to scores")
    rerun.set_defaults(run=run_rerun)
    for leaf in (listing, rerun):
        add_home(leaf)
        add_json(leaf)


def run_list(arguments: argparse.Namespace) -> int:
    from homefire.cli.server import Server
    from homefire.wire.records import EvaluationList

    with Server(home_of(arguments)) as server:
        query = {"job": last_segment(arguments.job)} if arguments.job else {}
        path = f"/v1/{server.account()}/evaluations"
        if arguments.json:
            print_json(server.get(path, **query))
            return 0
        found = server.get_as(EvaluationList, path, **query).evaluations
    columns = ("id", "name", "job", "step", "weights", "digest", "prompts", "scores", "rerun")
    print_table("evaluations", columns, [_cells(evaluation) for evaluation in found])
    return 0


def run_rerun(arguments: argparse.Namespace) -> int:
    from homefire.cli.server import Server
    from homefire.wire.records import Evaluation, PromptSet

    home = home_of(arguments)
    with Server(home) as server:
        path = f"/v1/{server.account()}/evaluations/{last_segment(arguments.id)}"
        record = server.get_as(Evaluation, path)
        prompts = server.get_as(PromptSet, f"{path}/prompts")
        requests = _requests(record, len(prompts.prompt_tokens))
        scorer = _scorer(record, arguments.scorer)
        _check_weights(server, record)
        with _serving(home, server, record, arguments.deployment) as deployment:
            completions = _sample(home, server, record, deployment, prompts, requests)
    return _report(arguments, record, completions, scorer)


def _requests(record: Evaluation, num_prompts: int) -> list[dict[str, Any]]:
    from homefire.sdk.evaluations import request_options

    try:
        return [request_options(record.sampling, index=i) for i in range(num_prompts)]
    except ValueError as exc:
        raise _cannot(record, str(exc), hint="record evaluations greedily, or with a seed") from exc


def _scorer(record: Evaluation, asked: str | None) -> Scorer | None:
    """What the user named, or a scorer of homefire's own that the record names."""
    from homefire.wire.errors import InvalidArgument

    name = asked or (record.scorer if record.scorer.startswith(_OWN_PACKAGE) else "")
    if not name:
        if not record.completions_sha256:
            raise _cannot(
                record,
                "it has neither the digest of its completions nor a scorer of homefire's",
                hint="name its scorer with --scorer package.module:function",
            )
        return None
    module, _, function = name.partition(":")
    try:
        found: Scorer = getattr(importlib.import_module(module), function)
    except (ImportError, AttributeError, ValueError) as exc:
        raise InvalidArgument(
            f"scorer {name!r} cannot be found: {exc}",
            hint="write package.module:function; the module must be importable here",
            field="scorer",
        ) from exc
    return found


def _check_weights(server: Server, record: Evaluation) -> None:
    """That the snapshot is there with the digest that was evaluated."""
    if record.identity == "base":
        return
    job = last_segment(record.job)
    if not job:
        raise _cannot(record, "it names no job, so its snapshot cannot be found")
    rows = server.list_all(
        f"/v1/{server.account()}/rlorTrainerJobs/{job}/checkpoints", "checkpoints"
    )
    own = [row for row in rows if last_segment(row["name"]) == record.identity]
    if not own:
        raise _cannot(
            record,
            f"its weights are gone: job {job} has no snapshot {record.identity!r} any more",
            hint="pin what will be evaluated again: `homefire checkpoint pin`",
        )
    if not any(row["digest"].startswith(record.digest) for row in own):
        raise _cannot(record, f"snapshot {record.identity!r} has other weights now")


@contextmanager
def _serving(home: Home, server: Server, record: Evaluation, asked: str | None) -> Iterator[str]:
    """The id of a deployment that serves the record's weights."""
    from homefire.wire.errors import FailedPrecondition

    with _manager(home, server) as deployments:
        if asked:
            if not _serves(server, asked, record):
                raise FailedPrecondition(
                    f"deployment {asked!r} does not serve {record.identity!r}",
                    hint="hot-load it there, or leave --deployment out",
                )
            yield asked
        elif record.deployment and _serves(server, record.deployment, record):
            yield record.deployment
        else:
            temporary = f"rerun-{last_segment(record.id).rpartition('-')[2]}"
            try:
                _deploy(deployments, server, record, temporary)
                yield temporary
            finally:
                deployments.delete(temporary)


def _manager(home: Home, server: Server) -> DeploymentManager:
    from homefire.sdk import DeploymentManager

    return DeploymentManager(api_key=home.api_key(), base_url=server.url)


def _deploy(
    deployments: DeploymentManager, server: Server, record: Evaluation, deployment: str
) -> None:
    from homefire.sdk import DeploymentConfig
    from homefire.wire.errors import Unavailable

    account, job = server.account(), last_segment(record.job)
    job_name = f"{account}/rlorTrainerJobs/{job}" if job else None
    base_model = _base_model(server, record, job_name)
    config = DeploymentConfig(
        deployment, base_model, min_replica_count=1, hot_load_trainer_job=job_name
    )
    deployments.create_or_get(config)
    try:
        deployments.wait_for_ready(deployment)
        if record.identity != "base":
            deployments.hotload_and_wait(deployment, base_model, record.identity)
    except (RuntimeError, TimeoutError) as exc:
        raise Unavailable(
            f"the weights of {record.id} could not be served: {exc}",
            hint="make room (`homefire status`), or name a deployment that serves them",
        ) from exc


def _base_model(server: Server, record: Evaluation, job_name: str | None) -> str:
    if job_name is not None:
        return str(server.get(f"/v1/{job_name}")["trainingConfig"]["baseModel"])
    path = f"/v1/{server.account()}/deployments/{record.deployment}"
    return str(server.get(path)["baseModel"])


def _serves(server: Server, deployment: str, record: Evaluation) -> bool:
    """Whether every replica of it has these weights now."""
    wanted = None if record.identity == "base" else record.identity
    for report in server.get("/v1/homefire/status")["deployments"]:
        if last_segment(report["name"]) == deployment:
            replicas = report["replicas"]
            return bool(replicas) and all(
                r["ready"]
                and r["identity"] == wanted
                and (wanted is None or r["digest"].startswith(record.digest))
                for r in replicas
            )
    return False


def _sample(
    home: Home,
    server: Server,
    record: Evaluation,
    deployment: str,
    prompts: PromptSet,
    requests: Sequence[dict[str, Any]],
) -> list[SampledCompletion]:
    from homefire.sdk import DeploymentSampler

    sampler = DeploymentSampler(
        server.url,
        f"{server.account()}/deployments/{deployment}",
        api_key=home.api_key(),
        max_concurrency=_CONCURRENCY,
    )

    async def one(tokens: list[int], options: dict[str, Any]) -> SampledCompletion:
        (completion,) = await sampler.sample_with_prompt_tokens(
            tokens, expect_identity=record.identity, **options
        )
        return completion

    async def together() -> list[SampledCompletion]:
        pairs = zip(prompts.prompt_tokens, requests, strict=True)
        return list(await asyncio.gather(*(one(tokens, options) for tokens, options in pairs)))

    return asyncio.run(together())


def _report(
    arguments: argparse.Namespace,
    record: Evaluation,
    completions: Sequence[SampledCompletion],
    scorer: Scorer | None,
) -> int:
    from homefire.sdk.evaluations import completions_sha256

    same_tokens: bool | None = None
    if record.completions_sha256:
        same_tokens = completions_sha256(completions) == record.completions_sha256
    scores = None if scorer is None else dict(scorer(completions))
    same_scores = same_tokens if scores is None else scores == record.scores
    if arguments.json:
        print_json(
            {
                "evaluation": record.id,
                "reproduced": bool(same_scores),
                "same_completions": same_tokens,
                "recorded": record.scores,
                "scores": scores,
            }
        )
    else:
        told = {True: "token for token the same", False: "not the same", None: "not recorded"}
        print(f"{len(completions)} completions of {record.identity}: {told[same_tokens]}")
        print(f"recorded   {_scores(record.scores)}")
        again = "not scored again, but by the same tokens" if same_tokens else "not scored again"
        print(f"now        {again if scores is None else _scores(scores)}")
        print("reproduced" if same_scores else "NOT reproduced")
    return 0 if same_scores else 1


def _cannot(record: Evaluation, reason: str, *, hint: str = "") -> FailedPrecondition:
    from homefire.wire.errors import FailedPrecondition

    return FailedPrecondition(f"evaluation {record.id} cannot be rerun: {reason}", hint=hint)


def _cells(evaluation: Evaluation) -> list[str]:
    e = evaluation
    can = "prompts kept" if e.prompt_tokens_sha256 else "no: prompts not kept"
    return [
        e.id,
        e.name,
        last_segment(e.job),
        str(e.step),
        e.identity,
        short_digest(e.digest),
        str(e.num_prompts),
        _scores(e.scores),
        can,
    ]


def _scores(scores: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:.6g}" for name, value in scores.items()) or "-"
