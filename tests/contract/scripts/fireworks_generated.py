"""The client that is generated from the REST API's description: `Fireworks()`."""

from __future__ import annotations

from findings import Findings
from fireworks import Fireworks
from fireworks_plane import KEY, MODEL, URL, cancel, jobs, rest, until

found = Findings()
client = Fireworks(api_key=KEY, account_id="local", base_url=URL, max_retries=0)
steps = client.reinforcement_fine_tuning_steps
"""What the REST API calls rlorTrainerJobs."""
made: dict = {}


def id_of(resource) -> str:
    return resource.name.rpartition("/")[2]


def until_job(job: str, state: str) -> None:
    until(lambda: jobs.get(job)["state"] == state)


def until_deployment(name: str, state: str) -> None:
    until(lambda: client.deployments.get(name).state == state)


@found.step
def accounts_list():
    return [account.name for account in client.accounts.list()]


@found.step
def jobs_create():
    made["jobs"] = []
    for number in range(3):
        job = steps.create(display_name=f"job {number}", training_config={"base_model": MODEL})
        made["jobs"].append(id_of(job))
    return [len(set(made["jobs"])), job.training_config.base_model]


@found.step
def jobs_list():
    """Over pages; the order and the filter are applied to all of them."""
    pages = list(steps.list(page_size=2, order_by="display_name desc"))
    one = list(steps.list(filter='display_name="job 1"'))
    return {"names": [job.display_name for job in pages], "one": [j.display_name for j in one]}


@found.step
def jobs_list_with_a_filter_that_is_not_understood():
    list(steps.list(filter="display_name:job"))


@found.step
def jobs_get():
    job = steps.get(made["jobs"][0])
    return [job.display_name, job.state in ("JOB_STATE_RUNNING", "JOB_STATE_CREATING")]


@found.step
def jobs_cancel():
    until_job(made["jobs"][0], "JOB_STATE_RUNNING")
    steps.cancel(made["jobs"][0], body={})
    until_job(made["jobs"][0], "JOB_STATE_CANCELLED")


@found.step
def jobs_resume():
    if jobs.get(made["jobs"][0])["state"] != "JOB_STATE_CANCELLED":
        cancel(made["jobs"][0])  # a release whose client has no cancel
    steps.resume(made["jobs"][0], body={})
    until_job(made["jobs"][0], "JOB_STATE_RUNNING")


@found.step
def jobs_execute():
    steps.execute(made["jobs"][0], dataset="d", output_model="m")


@found.step
def jobs_delete():
    for job in made["jobs"]:
        steps.delete(job)
        until_job(job, "JOB_STATE_DELETED")
    tombstones = rest("GET", "/v1/accounts/local/rlorTrainerJobs?showDeleted=true")["totalSize"]
    return [len(list(steps.list())), tombstones]


@found.step
def deployments_create():
    deployment = client.deployments.create(
        deployment_id="one", base_model=MODEL, min_replica_count=0, max_replica_count=2
    )
    until_deployment("one", "READY")
    return [deployment.name, deployment.max_replica_count]


@found.step
def deployments_list():
    return [d.name for d in client.deployments.list(filter='state="READY"', page_size=1)]


@found.step
def deployments_update():
    updated = client.deployments.update("one", base_model=MODEL, description="changed")
    return [updated.description, updated.max_replica_count]


@found.step
def deployments_scale():
    client.deployments.scale("one", replica_count=2)
    until(lambda: client.deployments.get("one").replica_stats.ready_replica_count == 2)
    client.deployments.scale("one", replica_count=0)
    until(lambda: client.deployments.get("one").replica_count == 0)
    scaled = client.deployments.get("one")
    return [scaled.replica_count, scaled.max_replica_count]


@found.step
def deployments_scale_beyond():
    client.deployments.scale("one", replica_count=3)


@found.step
def deployments_undelete():
    client.deployments.scale("one", replica_count=1)
    until_deployment("one", "READY")
    client.deployments.delete("one")
    until_deployment("one", "DELETED")
    listed = len(list(client.deployments.list()))
    shown = [d.state for d in client.deployments.list(show_deleted=True)]
    client.deployments.undelete("one", body={})
    until_deployment("one", "READY")
    return {"listed": listed, "shown": shown, "kept": client.deployments.get("one").description}


@found.step
def deployments_delete_hard():
    client.deployments.delete("one", hard=True, ignore_checks=True)
    until(lambda: not list(client.deployments.list(show_deleted=True)))


@found.step
def deployments_get_of_nothing():
    client.deployments.get("one")


@found.step
def models_list():
    names = [model.name for model in client.models.list()]
    return [MODEL in names, client.models.get("tiny", account_id="local").state]


@found.step
def datasets_list():
    list(client.datasets.list())


found.report()
