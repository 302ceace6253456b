"""The control plane's HTTP application: every route behind the service secret."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import asynccontextmanager

from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import ASGIApp

from homefire.control.endpoints import Endpoint, starlette_routes
from homefire.control.openapi import openapi_document
from homefire.control.plane import ControlPlane
from homefire.control.routes import (
    accounts,
    deployments,
    downloads,
    evaluations,
    homefire,
    hosted,
    hot_load,
    inference,
    internal,
    jobs,
    lineage,
    models,
    shapes,
    tinker,
    tinker_checkpoints,
    tinker_listing,
)
from homefire.http.app import service_app
from homefire.http.bodies import json_response


async def openapi(plane: ControlPlane, request: Request) -> Response:
    return json_response(openapi_document(ENDPOINTS))


ENDPOINTS: list[Endpoint] = [
    *accounts.ENDPOINTS,
    *shapes.ENDPOINTS,
    *jobs.ENDPOINTS,
    *deployments.ENDPOINTS,
    *models.ENDPOINTS,
    *evaluations.ENDPOINTS,
    *lineage.ENDPOINTS,
    *hot_load.ENDPOINTS,
    *homefire.ENDPOINTS,
    *inference.ENDPOINTS,
    *tinker.ENDPOINTS,
    *tinker_checkpoints.ENDPOINTS,
    *tinker_listing.ENDPOINTS,
    *downloads.ENDPOINTS,
    *internal.ENDPOINTS,
    *hosted.ENDPOINTS,
    Endpoint("GET", "/v1/openapi.json", openapi, "This document"),
]


def control_app(plane: ControlPlane) -> ASGIApp:
    """Starts the plane with the application. Stopping its processes is the server's to ask."""

    @asynccontextmanager
    async def lifespan(app: Starlette) -> AsyncGenerator[None]:
        await plane.start()
        try:
            yield
        finally:
            await plane.close()

    return service_app(
        starlette_routes(plane, ENDPOINTS), secret=plane.spec.listen.secret, lifespan=lifespan
    )
