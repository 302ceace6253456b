"""`RestClient`, call by call, on a run that this script trains. With every release from 0.15.0 on."""

from __future__ import annotations

import base64
import io
import tarfile
import urllib.request

import tinker
from findings import Findings
from tinker_kit import RELEASE, finish, forward, made, trained_adapter

found = Findings()
service = tinker.ServiceClient()
client = trained_adapter(service, steps=2)
run = client.model_id
session = run.partition(":")[0]
state = client.save_state("mark").result().path
snapshot = client.save_weights_for_sampler("mark").result().path
rest = tinker.RestClient() if RELEASE >= (0, 38) else service.create_rest_client()


def plain(checkpoint) -> dict:
    return checkpoint.model_dump(mode="json")


def fetched(url: str) -> bytes:
    """No key, no headers, no redirects to follow."""
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(url) as response:
        return response.read()


@found.step
def trained():
    return {"run": run, "state": state, "snapshot": snapshot}


@found.step
def list_training_runs():
    page = rest.list_training_runs(limit=1).result()
    return {"runs": [plain(each) for each in page.training_runs], "cursor": plain(page.cursor)}


@found.step
def get_training_run():
    by_path = rest.get_training_run_by_tinker_path(state).result()
    return [plain(rest.get_training_run(run).result()), plain(by_path)]


@found.step
def get_training_run_of_no_run():
    rest.get_training_run("ts-0000000000000000:train:0").result()


@found.step
def list_checkpoints():
    return [plain(each) for each in rest.list_checkpoints(run).result().checkpoints]


@found.step
def list_user_checkpoints():
    page = rest.list_user_checkpoints(limit=2, offset=1).result()
    return {"checkpoints": [plain(c) for c in page.checkpoints], "cursor": plain(page.cursor)}


@found.step
def get_weights_info_by_tinker_path():
    info = [rest.get_weights_info_by_tinker_path(path).result() for path in (state, snapshot)]
    return [plain(each) for each in info]


@found.step
def publish_checkpoint_from_tinker_path():
    seen = []
    for change in (
        rest.publish_checkpoint_from_tinker_path,
        rest.unpublish_checkpoint_from_tinker_path,
    ):
        change(state).result()
        seen += [c.public for c in rest.list_checkpoints(run).result().checkpoints]
    return seen


@found.step
def set_checkpoint_ttl_from_tinker_path():
    seen = []
    for ttl in (7200, None):
        rest.set_checkpoint_ttl_from_tinker_path(state, ttl).result()
        by_path = {c.tinker_path: c for c in rest.list_checkpoints(run).result().checkpoints}
        seen.append(plain(by_path[state])["expires_at"])
    return seen


@found.step
def set_checkpoint_ttl_too_short():
    rest.set_checkpoint_ttl_from_tinker_path(state, 60).result()


if RELEASE < (0, 36):

    @found.step
    def get_checkpoint_archive_url_from_tinker_path():
        """The members of the tars of a state and of a snapshot, in base64."""
        archives = {}
        for path in (state, snapshot):
            url = rest.get_checkpoint_archive_url_from_tinker_path(path).result().url
            with tarfile.open(fileobj=io.BytesIO(fetched(url))) as tar:
                files = {each.name: tar.extractfile(each) for each in tar.getmembers()}
                archives[path] = {
                    name: base64.b64encode(file.read()).decode() for name, file in files.items()
                }
        return archives


if RELEASE >= (0, 28):

    @found.step
    def get_external_weights_urls():
        path = client.save_weights_external("out").result().path
        urls = rest.get_external_weights_urls(path).result().urls
        files = {name: base64.b64encode(fetched(url)).decode() for name, url in urls.items()}
        rest.delete_checkpoint_from_tinker_path(path).result()
        return files


if RELEASE >= (0, 38):

    @found.step
    def copy_weights():
        copied = rest.copy_weights(state, "archive").result()
        again = made(service.create_training_client_from_state(copied))
        return {"path": copied, "logprobs": [forward(client), forward(again)]}


@found.step
def get_session():
    listed = rest.list_sessions(limit=5).result().sessions
    return {"listed": listed, "one": plain(rest.get_session(session).result())}


if RELEASE >= (0, 22):

    @found.step
    def assign_session_project():
        rest.assign_session_project(session, "kept").result()
        page = rest.list_training_runs(project_id="kept").result()
        return [each.training_run_id for each in page.training_runs]


if RELEASE >= (0, 36):

    @found.step
    def search_sessions():
        import warnings

        from tinker.types import SessionSearchRequest

        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            first = rest.search_sessions(SessionSearchRequest(limit=1)).result()
            request = SessionSearchRequest(session_id=session)
            (one,) = rest.search_sessions(request).result().sessions
            request = SessionSearchRequest(limit=1, cursor=first.next_cursor)
            second = rest.search_sessions(request).result()
        pages = [[each.session_id for each in page.sessions] for page in (first, second)]
        return {"one": plain(one), "pages": pages}


if RELEASE >= (0, 24):

    @found.step
    def export_session_trace():
        rest.export_session_trace(session).result()


@found.step
def delete_checkpoint():
    rest.delete_checkpoint(run, "weights/mark").result()
    rest.delete_checkpoint_from_tinker_path(snapshot).result()
    return [c.tinker_path for c in rest.list_checkpoints(run).result().checkpoints]


@found.step
def delete_checkpoint_by_a_bare_name():
    rest.delete_checkpoint(run, "mark").result()


finish(client)
found.report()
