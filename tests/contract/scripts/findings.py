"""What a client script reports: named findings, or the error that a step raised.

    found = Findings()

    @found.step
    def one_step_lowers_the_loss():
        return {"before": 2.3, "after": 2.1}

    found.report()

A step that raises does not end the script. Runs in the client's environment, so it imports the
standard library only.
"""

from __future__ import annotations

import json
import os
import re
import sys
import time
import traceback
import urllib.request
from collections.abc import Callable

MARK = "FINDINGS "
_CODE = re.compile(r"""["']code["']: ?["'](\w+)["']""")


class Findings:
    def __init__(self) -> None:
        self._results: dict[str, dict[str, object]] = {}

    def step(self, function: Callable[[], object]) -> Callable[[], object]:
        """Runs the function now; what it returns or raises is the finding of its name. Steps that
        FINDINGS_ONLY does not name, where it is set, are left out."""
        only = os.environ.get("FINDINGS_ONLY")
        if only and function.__name__ not in only.split(","):
            return function
        started = time.monotonic()
        try:
            result: dict[str, object] = {"value": function()}
        except Exception as exc:  # noqa: BLE001  what a step raises is its finding
            result = {"error": description(exc)}
        took_s = round(time.monotonic() - started, 2)
        self._results[function.__name__] = result
        print(f"{function.__name__}: {took_s} s", file=sys.stderr, flush=True)
        return function

    def report(self) -> None:
        print(MARK + json.dumps(self._results), flush=True)


def description(error: BaseException) -> dict[str, object]:
    return {
        "type": type(error).__name__,
        "message": str(error),
        "code": code_of(error),
        "traceback": "".join(traceback.format_exception(error)),
    }


def code_of(error: BaseException) -> str | None:
    """The code of homefire's error, from whatever the client made of it."""
    cause: BaseException | None = error
    while cause is not None:
        if type(cause).__name__ == "RequestFailedError":
            return _code_of_future(str(getattr(cause, "request_id", "")))
        text = json.dumps(getattr(cause, "body", None), default=str) + _answer(cause) + str(cause)
        if named := _CODE.search(text):
            return named.group(1)
        cause = cause.__cause__ or cause.__context__
    return None


def _answer(error: BaseException) -> str:
    """The body that the server answered with, where the client keeps the response or its reason."""
    if reason := getattr(error, "reason", None):
        return json.dumps({"code": str(reason).lower()})
    return str(getattr(getattr(error, "response", None), "text", ""))


def _code_of_future(request_id: str) -> str:
    """tinker keeps the message and category of a failed future only, so it is asked for again."""
    request = urllib.request.Request(
        f"{os.environ['TINKER_BASE_URL']}/api/v1/retrieve_future",
        data=json.dumps({"request_id": request_id}).encode(),
        headers={
            "X-API-Key": os.environ["TINKER_API_KEY"],
            "Content-Type": "application/json",
            "Accept": "application/json",
        },
    )
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request) as response:
        return json.load(response)["error_class"]
