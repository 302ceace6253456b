"""A sample that the `tinker` client gives up while it runs."""

from __future__ import annotations

import threading

import tinker
from findings import Findings
from tinker_kit import BASE, RELEASE, ROWS, post

found = Findings()
service = tinker.ServiceClient()
base = service.create_sampling_client(base_model=BASE)
if RELEASE >= (0, 38):
    base = base.result()


@found.step
def a_cancelled_sample():
    """It is asked for again by the id that the client told the server to cancel."""
    cancelled = threading.Event()
    ids = []
    enqueue = base.holder.enqueue_cancel

    def noting(request_id: str) -> None:
        ids.append(request_id)
        enqueue(request_id)
        cancelled.set()

    base.holder.enqueue_cancel = noting
    prompt = tinker.ModelInput.from_ints(ROWS[0])
    one, many = (tinker.SamplingParams(max_tokens=n, stop=[]) for n in (1, 2000))
    base.sample(prompt, 1, one).result()  # the sampler runs
    long = base.sample(prompt, 1, many)
    base.sample(prompt, 1, one).result()  # the long one was accepted before it
    (long.future() if RELEASE >= (0, 38) else long).cancel()
    cancelled.wait(30)
    return post("retrieve_future", request_id=ids[0])


found.report()
