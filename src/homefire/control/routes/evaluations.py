"""Evaluation records."""

from __future__ import annotations

from starlette.requests import Request
from starlette.responses import Response

from homefire.control.endpoints import Endpoint
from homefire.control.plane import ControlPlane
from homefire.control.routes.accounts import own_account
from homefire.http.bodies import json_response, read_json
from homefire.wire.records import Evaluation, EvaluationEntry, EvaluationList, PromptSet

_ALL = "/v1/accounts/{account}/evaluations"


async def list_evaluations(plane: ControlPlane, request: Request) -> Response:
    job = request.query_params.get("job", "").rpartition("/")[2]
    found = await plane.records.evaluations(own_account(request), job_id=job or None)
    return json_response(EvaluationList(found))


async def get_evaluation(plane: ControlPlane, request: Request) -> Response:
    account, name = own_account(request), request.path_params["evaluation"]
    return json_response(await plane.records.evaluation(account, name))


async def get_prompts(plane: ControlPlane, request: Request) -> Response:
    account, name = own_account(request), request.path_params["evaluation"]
    return json_response(await plane.records.prompts(account, name))


async def add_evaluation(plane: ControlPlane, request: Request) -> Response:
    account = own_account(request)
    entry = await read_json(request, EvaluationEntry)
    return json_response(await plane.records.add_evaluation(account, entry))


ENDPOINTS = [
    Endpoint(
        "GET",
        _ALL,
        list_evaluations,
        "Evaluations, oldest first; of one job with `job`",
        EvaluationList,
        query=("job",),
    ),
    Endpoint("GET", f"{_ALL}/{{evaluation}}", get_evaluation, "One evaluation", Evaluation),
    Endpoint(
        "GET", f"{_ALL}/{{evaluation}}/prompts", get_prompts, "What it asked, as tokens", PromptSet
    ),
    Endpoint("POST", _ALL, add_evaluation, "Add an evaluation record", Evaluation, EvaluationEntry),
]
